"""Checks of the network: does it answer as a network in use would, and does its gradient say where its answers go?"""

from __future__ import annotations

import torch

from ...attack.losses import Loss
from .evidence import Evidence
from .gather import FORWARDS, STEP
from .judging import Skip, exceeds, images, percent, standing
from .values import Verdict

SAME = 1e-6
TOGETHER = 1e-4
ZERO_SHARE = 0.05
APART = 0.5
APART_WARN, APART_FAIL = 0.1, 0.5
SHARED_FAIL = 0.01


def same_answers(e: Evidence) -> Verdict:
    """Five forwards must agree; FAIL beyond 1e-6 of the largest logit, which is more than the order of additions makes.

    Where draws are averaged on purpose (`eot`) it is a warning.
    """
    told = f"logits of {FORWARDS} forwards differ by {e.spread:.2g} of the largest"
    if e.spread == 0:
        return Verdict("PASS", 0.0, f"{FORWARDS} forwards gave identical logits")
    return Verdict("FAIL" if e.spread > SAME and not e.draws else "WARN", e.spread, told)


def eval_mode(e: Evidence) -> Verdict:
    """No module may come in training mode: dropout draws, batch norm answers by the batch and learns the attacked images."""
    told = "the network came in eval mode" if not e.training else f"{e.training} modules came in training mode"
    return Verdict("FAIL" if e.training else "PASS", float(e.training), told)


def finite(e: Evidence) -> Verdict:
    """All clean logits must be finite."""
    lost = ~e.logits.isfinite().all(dim=1)
    told = f"{int(lost.sum())} of {len(lost)} images get NaN or infinity"
    return Verdict("FAIL" if bool(lost.any()) else "PASS", percent(lost), told, images(e, lost))


def not_probabilities(e: Evidence) -> Verdict:
    """Answers must not all lie in [0, 1] and sum to 1: the cross-entropy of probabilities applies softmax twice."""
    rows = e.logits[e.logits.isfinite().all(dim=1)]
    shares = (rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < 1e-4)
    value = percent(shares)
    told = f"{100 * value:.0f} % of the answers are non-negative and sum to 1"
    return Verdict("FAIL" if value == 1 else "PASS", value, told)


def alone_as_together(e: Evidence) -> Verdict:
    """An image's answer must not depend on the others in its batch; FAIL beyond 1e-4 of the largest logit.

    Other kernels serve other batch sizes, so small differences are no fault.
    """
    if e.spread > SAME:
        raise Skip("answers differ anyway")
    told = f"logits of images alone and in a batch differ by {e.together:.2g} of the largest"
    return Verdict("FAIL" if e.together > TOGETHER else "PASS", e.together, told)


def better_than_chance(e: Evidence) -> Verdict:
    """Clean answers must be better than chance, by a binomial test; FAIL where they are not even so in count.

    A network that answers by chance has nothing to be robust: wrong labels, or the normalisation of another data set.
    """
    hits, n, level = int(e.right.sum()), len(e.right), 1 / len(e.data.classes)
    told = f"{hits} of {n} clean images answered rightly; chance is {100 * level:.1f} %"
    if exceeds(hits, n, level):
        return Verdict("PASS", hits / n, told)
    return Verdict("FAIL" if hits <= level * n else "WARN", hits / n, told)


def gradient_under_cross_entropy(e: Evidence) -> Verdict:
    """Cross-entropy must have a gradient; FAIL where it is 0, missing or not finite on more than 5 % of the images.

    A few images may sit where no unit is active; a network that hides its gradient has them by the dozen.
    """
    return _gradient(e, "cross-entropy")


def gradient_under_margin(e: Evidence) -> Verdict:
    """The margin must have a gradient; FAIL where it is 0, missing or not finite on more than 5 % of the images."""
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
    """No image may stand, pixel for pixel, among the training images; FAIL beyond 1 %, because public test sets share a few."""
    if e.shared is None:
        return Verdict("SKIPPED", None, "cannot be known without the training images")
    value = e.shared / len(e.data)
    told = f"{e.shared} of {len(e.data)} images stand, pixel for pixel, among the training images"
    return Verdict("FAIL" if value > SHARED_FAIL else "WARN" if e.shared else "PASS", value, told)


def enough(e: Evidence) -> Verdict:
    """The interval of what is left must be narrower than 20 points, else WARN; FAIL below ten images."""
    rate = standing(e)
    width = rate.high - rate.low
    told = f"{rate.n} images; what is left has an interval of {100 * width:.1f} points; {e.settings.threat}"
    return Verdict("FAIL" if rate.n < 10 else "WARN" if width > 0.2 else "PASS", width, told)
