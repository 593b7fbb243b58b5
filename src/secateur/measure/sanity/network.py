"""Checks of the network: does it answer as a network in use would, and does its gradient say where its answers go?"""

from __future__ import annotations

import torch

from ...attack.losses import Loss
from .evidence import Evidence
from .gather import FORWARDS, STEP
from .judging import SAME, Skip, exceeds, images, percent, standing
from .values import Verdict

TOGETHER = 1e-4
ZERO_SHARE = 0.05
APART = 0.5
APART_WARN, APART_FAIL = 0.1, 0.5
SHARED_FAIL = 0.01


def same_answers(e: Evidence) -> Verdict:
    """Five forwards must agree; FAIL beyond 1e-6 of the largest logit, which is more than the order of additions makes.

    Where draws are averaged on purpose (`eot`) it is a warning.

    Why: an attack follows the gradient of one draw and is judged by another, which looks like robustness; draws are to be
    averaged by the attack (Athalye et al. 2018, arXiv:1802.00420).

    PASS: the logits of five forwards are identical.
    WARN: they differ by at most 1e-6 of the largest, or `forward` averages draws on purpose.
    FAIL: they differ by more.
    """
    told = f"logits of {FORWARDS} forwards differ by {e.spread:.2g} of the largest"
    if e.spread == 0:
        return Verdict("PASS", 0.0, f"{FORWARDS} forwards gave identical logits")
    return Verdict("FAIL" if e.spread > SAME and not e.draws else "WARN", e.spread, told)


def eval_mode(e: Evidence) -> Verdict:
    """No module may come in training mode: dropout draws, batch norm answers by the batch and learns the attacked images.

    Why: batch norm answers differently in the two modes, and adversarial images seen in training mode change its statistics
    (Pang et al. 2021, arXiv:2010.00467).

    PASS: all modules came in eval mode.
    FAIL: one did not.
    """
    told = "the network came in eval mode" if not e.training else f"{e.training} modules came in training mode"
    return Verdict("FAIL" if e.training else "PASS", float(e.training), told)


def finite(e: Evidence) -> Verdict:
    """All clean logits must be finite.

    Why: losses and gradients from NaN or infinity stop an attack without breaking the network (Pintor et al. 2022,
    arXiv:2106.09947).

    PASS: all logits are finite.
    FAIL: one is not.
    """
    lost = ~e.logits.isfinite().all(dim=1)
    where = images(e, lost)
    if e.measured is not None:  # all images, not only those looked at
        lost = e.measured.clean == -1
        where = tuple(lost.nonzero()[:, 0].tolist())
    told = f"{int(lost.sum())} of {len(lost)} images get NaN or infinity"
    return Verdict("FAIL" if bool(lost.any()) else "PASS", percent(lost), told, where)


def not_probabilities(e: Evidence) -> Verdict:
    """Answers must not all lie in [0, 1] and sum to 1: the cross-entropy of probabilities applies softmax twice.

    Why: a softmax that is sure has a gradient of 0 in floating point, which is how defensive distillation withstood attacks
    until they used the logits (Carlini and Wagner 2017, arXiv:1608.04644).

    PASS: some answers are negative or do not sum to 1.
    FAIL: all answers are shares.
    """
    rows = e.logits[e.logits.isfinite().all(dim=1)]
    shares = (rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < 1e-4)
    value = percent(shares)
    told = f"{100 * value:.0f} % of the answers are non-negative and sum to 1"
    return Verdict("FAIL" if value == 1 else "PASS", value, told)


def alone_as_together(e: Evidence) -> Verdict:
    """An image's answer must not depend on the others in its batch; FAIL beyond 1e-4 of the largest logit.

    Other kernels serve other batch sizes, so small differences are no fault.

    Why: a defence that adapts to its batch answers other questions than the ones attacked, and such defences lost most of
    what they claimed when evaluated so that it counts (Croce et al. 2022, arXiv:2202.13711).

    PASS: the logits agree within 1e-4.
    FAIL: they do not.
    """
    if e.spread > SAME:
        raise Skip("answers differ anyway")
    told = f"logits of images alone and in a batch differ by {e.together:.2g} of the largest"
    return Verdict("FAIL" if e.together > TOGETHER else "PASS", e.together, told)


def better_than_chance(e: Evidence) -> Verdict:
    """Clean answers must be better than chance, by a binomial test; FAIL where they are not even so in count.

    A network that answers by chance has nothing to be robust: wrong labels, or the normalisation of another data set.

    Why: accuracy without an attack belongs beside every robustness figure, and there is nothing to lose for a network that
    guesses (Carlini et al. 2019, arXiv:1902.06705).

    PASS: better than one over the number of classes, beyond chance.
    WARN: better in count, but it may be chance.
    FAIL: not even so in count.
    """
    hits, n, level = int(e.right.sum()), len(e.right), 1 / len(e.data.classes)
    told = f"{hits} of {n} clean images answered rightly; chance is {100 * level:.1f} %"
    if exceeds(hits, n, level):
        return Verdict("PASS", hits / n, told)
    return Verdict("FAIL" if hits <= level * n else "WARN", hits / n, told)


def gradient_under_cross_entropy(e: Evidence) -> Verdict:
    """Cross-entropy must have a gradient; FAIL where it is 0, missing or not finite on more than 5 % of the images.

    A few images may sit where no unit is active; a network that hides its gradient has them by the dozen.

    Why: where the network is very sure, cross-entropy rounds to 0 and its gradient with it; attacks stand still and the
    network seems robust (Carlini and Wagner 2016, arXiv:1607.04311; Croce and Hein 2020, arXiv:2003.01690).

    PASS: every image has a gradient.
    WARN: at most 5 % of the images have none, or a single one.
    FAIL: more have none.
    """
    return _gradient(e, "cross-entropy")


def gradient_under_margin(e: Evidence) -> Verdict:
    """The margin must have a gradient; FAIL where it is 0, missing or not finite on more than 5 % of the images.

    Why: rounding, quantisation and detached tensors shatter the gradient under every loss (Athalye et al. 2018,
    arXiv:1802.00420).

    PASS: every image has a gradient.
    WARN: at most 5 % of the images have none, or a single one.
    FAIL: more have none.
    """
    return _gradient(e, "margin")


def _gradient(e: Evidence, loss: Loss) -> Verdict:
    slopes = e.slopes[loss]
    value, count = percent(slopes.unusable), int(slopes.unusable.sum())
    how = "no gradient comes back" if slopes.missing else "the gradient is 0 or not finite"
    told = f"{how} on {count} of {len(slopes.unusable)} images under the {loss} loss"
    bad = value > ZERO_SHARE and (count > 1 or value == 1)
    return Verdict("FAIL" if bad else "WARN" if count else "PASS", value, told)


def gradient_is_the_slope(e: Evidence) -> Verdict:
    """The margin must rise along the gradient as the gradient says; WARN if half off on 10 % of the images, FAIL on 50 %.

    Kinks and curvature make a few percent within a sixteenth of a grey level. With a twin the gradient is an approximation by
    design: then this is at most a warning.

    Why: a gradient can be there and be wrong, because a step has a made-up backward pass or is nearly flat between jumps;
    finite differences tell (Athalye et al. 2018, arXiv:1802.00420, section 3).

    PASS: the two agree within half on nine images of ten.
    WARN: they do not on more than 10 % of the images; with a twin as `forward` this is the worst it gets.
    FAIL: they do not on more than half.
    """
    slopes = e.slopes["margin"]
    largest = torch.maximum(slopes.rises.abs(), slopes.measured.abs())
    apart = (slopes.rises - slopes.measured).abs() > APART * largest
    apart |= ~slopes.measured.isfinite()
    value = percent(apart)
    told = (
        f"gradient and finite difference (step {STEP:g}) differ by more than half on {int(apart.sum())} of {len(apart)} images"
    )
    bad = value > APART_FAIL and e.settings.forward is None
    return Verdict("FAIL" if bad else "WARN" if value > APART_WARN else "PASS", value, told)


def unseen(e: Evidence) -> Verdict:
    """No image may stand, pixel for pixel, among the training images; FAIL beyond 1 %, because public test sets share a few.

    Why: networks are more robust on images they were trained on, and test sets share some with training sets: 3.3 % of
    CIFAR-10's test images have a near duplicate there (Rice et al. 2020, arXiv:2002.11569; Barz and Denzler 2019,
    arXiv:1902.00423).

    PASS: no image is among the training images.
    WARN: at most 1 % are.
    FAIL: more are. SKIPPED without training images.
    """
    if e.shared is None:
        return Verdict("SKIPPED", None, "cannot be known without the training images")
    value = e.shared / len(e.data)
    told = f"{e.shared} of {len(e.data)} images stand, pixel for pixel, among the training images"
    return Verdict("FAIL" if value > SHARED_FAIL else "WARN" if e.shared else "PASS", value, told)


def enough(e: Evidence) -> Verdict:
    """The interval of what is left must be narrower than 20 points, else WARN; FAIL below ten images.

    Why: a rate from few images may be anything; the interval says how much (Wilson's, as Brown et al. 2001,
    doi:10.1214/ss/1009213286, recommend).

    PASS: the interval is at most 20 points wide.
    WARN: it is wider.
    FAIL: there are fewer than ten images.
    """
    rate = standing(e)
    width = rate.high - rate.low
    told = f"{rate.n} images; what is left has an interval of {100 * width:.1f} points; {e.settings.threat}"
    return Verdict("FAIL" if rate.n < 10 else "WARN" if width > 0.2 else "PASS", width, told)
