"""Checks of the attacks: did they stay within the threat model, and did each do what its strength promises?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from ..adversarial import TOLERANCE
from ..intervals import paired_p
from .evidence import Evidence, Run
from .judging import (
    POINT,
    SAME,
    SIGNIFICANCE,
    Skip,
    exceeds,
    images,
    not_stronger,
    run_of,
    usable,
    wins,
    worst,
)
from .values import Verdict

LOSSES = 0.05
RIGHTED = 0.05  # of the images wrong when clean; noise rights next to none, a move away from the network's own answers many


def all_ran(e: Evidence) -> Verdict:
    """Every attack must get gradients and finite answers; one that does not has shown nothing.

    Why: an attack that breaks off for lack of a gradient is the plainest of failures, and scripts that catch the error
    report full accuracy (Pintor et al. 2022, arXiv:2106.09947).

    PASS: every attack ran.
    FAIL: one could not.
    """
    runs = [*e.runs.values(), *e.sweep.values()]
    broken = [run for run in runs if run.error]
    if not broken:
        return Verdict("PASS", 0.0, f"all {len(runs)} attacks ran")
    return Verdict("FAIL", len(broken) / len(runs), f"{len(broken)} of {len(runs)} attacks could not run: {broken[0].error}")


def within_eps(e: Evidence) -> Verdict:
    """No image may lie farther than eps + 1e-6, before rounding; those that do were not counted.

    Why: eps counted after normalisation or for pixels up to 255 is the commonest slip of units; figures compare only within
    the same threat model (Carlini et al. 2019, arXiv:1902.06705; Croce et al. 2021, arXiv:2010.09670).

    PASS: no image is farther than eps + 1e-6.
    FAIL: one is.
    """
    excess = {run.name: run.distance - e.settings.threat.eps for run in _tried(e)}
    name = max(excess, key=lambda key: excess[key])
    told = f"largest distance: {e.settings.threat.eps + excess[name]:.6g} by {name}, allowed {e.settings.threat.eps:.6g}"
    return Verdict("FAIL" if excess[name] > TOLERANCE else "PASS", excess[name], told)


def within_pixels(e: Evidence) -> Verdict:
    """No image may leave [0, 1]; those that do were not counted.

    Why: the threat model is about images: values in [0, 1] (Carlini et al. 2019, arXiv:1902.06705).

    PASS: no value is beyond [0, 1] by more than 1e-6.
    FAIL: one is.
    """
    run = max(_tried(e), key=lambda run: run.outside)
    told = f"farthest beyond [0, 1]: {run.outside:.3g} by {run.name}"
    return Verdict("FAIL" if run.outside > TOLERANCE else "PASS", run.outside, told)


def survives_files(e: Evidence) -> Verdict:
    """What breaks the network as returned must break it as an 8-bit file; WARN beyond a point of accuracy.

    It is no fault of the network, but the number is then one for images that no file holds.

    Why: what reaches a network is mostly a file, and rounding to 8 bit undoes small changes (Kurakin et al. 2017,
    arXiv:1607.02533).

    PASS: at most a point of accuracy comes back.
    WARN: more comes back.
    """
    runs = [*run_of(e, "pgd"), *(e.runs[name] for name in e.given if not e.runs[name].error)]
    lost = {run.name: (run.broken & ~run.stored, int(run.broken.sum()) - int(run.stored.sum())) for run in runs}
    name, (where, net) = max(lost.items(), key=lambda item: item[1][1])
    told = f"{name} breaks {net} images fewer in 8 bit than as returned"
    return Verdict(
        "WARN" if net > POINT * len(e.data) else "PASS", net / len(e.data), told, images(e, where) if net > 0 else ()
    )


def leaves_the_true_label(e: Evidence) -> Verdict:
    """Attacks given must move away from the true label: wrong images stay wrong, and right ones come nearer to an error.

    The second is judged where our own PGD, which gets the true labels, comes nearer: else the gradient is at fault. Wrong
    images that come nearer to being right are a warning, because noise may do that.

    Why: an attack that moves away from the network's own answer, the default of some libraries, leaves images that were wrong
    alone or puts them right (a mistake in the sense of Carlini et al. 2019, arXiv:1902.06705).

    PASS: wrong images stay wrong, and right ones come nearer to an error.
    WARN: wrong images come nearer to being right more often than chance has it.
    FAIL: more than 5 % of the wrong images are put right, or right ones go farther from an error.
    """
    if e.spread > SAME:
        raise Skip("answers differ anyway, and images are righted by chance")
    verdicts = [_true_label(e, e.runs[name]) for name in e.given if not e.runs[name].error]
    return worst(verdicts) if verdicts else Verdict("PASS", 0.0, "all attacks got the labels of the data")


def no_weaker_than_ours(e: Evidence) -> Verdict:
    """The attacks behind the figure must break what ours break; FAIL beyond 5 points, by the paired test on the same images.

    Why: robust accuracy is what the attacks chosen leave, so that a weak attack makes any network look robust (Carlini et al.
    2019, arXiv:1902.06705; Athalye et al. 2018, arXiv:1802.00420).

    PASS: ours break at most a point more.
    WARN: they break up to 5 points more, or more by chance.
    FAIL: they break more, and it is no chance. SKIPPED where no figure was given.
    """
    if e.claimed is None:
        raise Skip("no figure was given")
    if not bool(e.right.any()):
        raise Skip("no image is answered rightly, so there is nothing to attack")
    missed, found = e.claimed & ~e.ours, e.ours & ~e.claimed
    value = (int(missed.sum()) - int(found.sum())) / len(e.data)
    told = (
        f"{int(e.claimed.sum())} of the {len(e.data)} images looked at count as robust, and the checks' own attacks leave "
        f"{int(e.ours.sum())}"
    )
    accident = paired_p(int(missed.sum()), int(found.sum())) > SIGNIFICANCE
    status = "PASS" if value <= POINT else "WARN" if value <= LOSSES or accident else "FAIL"
    return Verdict(status, value, told, images(e, missed) if value > POINT else ())


def _true_label(e: Evidence, run: Run) -> Verdict:
    wrong, righted = int((~e.right & run.tried).sum()), int(run.righted.sum())
    value, told = righted / max(1, wrong), f"{run.name} rights {righted} of {wrong} images that are wrong when clean"
    if wrong and exceeds(righted, wrong, RIGHTED):
        return Verdict("FAIL", value, told, images(e, run.righted))
    closer, farther = wins(run.margin[e.right], e.margin[e.right])
    ours = e.runs["pgd"]
    if not ours.error and paired_p(*wins(ours.margin, e.margin)) <= SIGNIFICANCE >= paired_p(farther, closer):
        told = f"{run.name} brings {closer} right images nearer to an error and {farther} farther from one"
        return Verdict("FAIL", farther / (closer + farther), told)
    back = wins(e.margin[~e.right], run.margin[~e.right])
    if paired_p(*back) <= SIGNIFICANCE:
        return Verdict("WARN", value, f"{told}, and brings {back[0]} nearer to being right")
    return Verdict("PASS", value, told)


def can_reach(e: Evidence) -> Verdict:
    """Steps that together are shorter than eps cannot reach the border of the ball.

    Why: the strongest points lie mostly on the border of the ball, and steps too short never get there (Croce and Hein
    2020, arXiv:2003.01690, on step sizes).

    PASS: steps * step_size is at least eps, or the attack sets its own steps.
    FAIL: it is less.
    """
    ways: dict[str, float] = {}
    for name in ("pgd", *e.given):
        way = _way(e.runs[name].settings)
        if way is not None:
            ways[name] = way
    name, way = min(ways.items(), key=lambda item: item[1])
    told = f"steps * step_size is {way:.2f} * eps in {name}"
    return Verdict("FAIL" if way < 1 - 1e-6 else "PASS", way, told)


def _way(settings: Mapping[str, object]) -> float | None:
    steps, size, eps = (settings.get(name) for name in ("steps", "step_size", "eps"))
    if not isinstance(steps, int) or not isinstance(size, float | int) or not isinstance(eps, float | int) or not eps:
        return None  # an attack's own default, which reaches the border
    return steps * size / eps


def one_step_no_better(e: Evidence) -> Verdict:
    """FGSM, and one step from a random point, must not break more images than PGD; FAIL beyond a point, by the paired test.

    Why: where one step does better than many, the gradient near the image points elsewhere than farther out: a sign of
    masking (Athalye et al. 2018, arXiv:1802.00420, section 3.1; Tramer et al. 2018, arXiv:1705.07204).

    PASS: neither breaks more than a point more.
    WARN: one does, which may be chance.
    FAIL: one does, and it is no chance.
    """
    fgsm, one, many = run_of(e, "fgsm", "one step", "pgd")
    return worst([not_stronger(e, fgsm, many), not_stronger(e, one, many)])


def union_adds_little(e: Evidence) -> Verdict:
    """PGD alone must be within a point of the union over all attacks, which is the claim; else WARN.

    Why: robust accuracy is that of the worst attack on each image; one attack alone is an overstatement (Carlini et al.
    2019, arXiv:1902.06705; Croce and Hein 2020, arXiv:2003.01690).

    PASS: PGD misses at most a point.
    WARN: it misses more.
    """
    [pgd] = run_of(e, "pgd")
    missed = e.right & ~e.standing & ~pgd.broken
    value = int(missed.sum()) / len(e.data)
    told = f"pgd misses {int(missed.sum())} images that other attacks break"
    return Verdict("WARN" if value > POINT else "PASS", value, told, images(e, missed))


def twice_the_steps(e: Evidence) -> Verdict:
    """Twice the steps must break no more than a point more images; FAIL beyond it, by the paired test.

    Why: an attack that has not converged says how long it ran, not how robust the network is (Carlini et al. 2019,
    arXiv:1902.06705; Pintor et al. 2022, arXiv:2106.09947).

    PASS: at most a point more falls.
    WARN: more falls, which may be chance.
    FAIL: more falls, and it is no chance.
    """
    once, twice = run_of(e, "pgd", "pgd, twice the steps")
    return not_stronger(e, twice, once)


def losses_agree(e: Evidence) -> Verdict:
    """PGD on the margin and on cross-entropy must agree within a point; FAIL beyond 5 points, by the paired test.

    No factor on the logits changes the sign of the margin's gradient. Sound networks differ by 1 to 3 points between the two,
    those that hide gradients by tens.

    Why: large logits blind cross-entropy and leave losses without a scale alone (Croce and Hein 2020, arXiv:2003.01690;
    Mosbach et al. 2018, arXiv:1810.12042).

    PASS: they agree within a point.
    WARN: they differ by up to 5 points, or by more by chance.
    FAIL: they differ by more, and it is no chance.
    """
    entropy, margin = run_of(e, "pgd", "pgd, margin")
    found = [not_stronger(e, margin, entropy, margin=LOSSES), not_stronger(e, entropy, margin, margin=LOSSES)]
    return worst(found)


def better_than_noise(e: Evidence) -> Verdict:
    """PGD must come nearer to an error than ten draws of noise on most images, by the sign test; FAIL if not even in count.

    Margins tell it where both break nothing, or nearly nothing, and the rates cannot.

    Why: random changes are the weakest attack there is; a gradient that does no better carries nothing (Carlini et al.
    2019, arXiv:1902.06705, on brute force).

    PASS: PGD comes nearer to an error on most images, beyond chance, or breaks all of them.
    WARN: on most in count only; or not on most, where PGD leaves a point at most and single images decide.
    FAIL: not on most, and PGD leaves more than that.
    """
    pgd, noise = run_of(e, "pgd", "random noise")
    ahead, behind = wins(pgd.margin, noise.margin)
    told = f"pgd comes nearer to an error than random noise on {ahead} images, noise on {behind}"
    if paired_p(ahead, behind) <= SIGNIFICANCE or (ahead >= behind and bool(pgd.broken[e.right].all())):
        return Verdict("PASS", ahead / max(1, ahead + behind), told)
    left = int((e.right & ~pgd.broken).sum())
    worthless = ahead <= behind and left > max(1, POINT * len(e.data))
    return Verdict("FAIL" if worthless else "WARN", ahead / max(1, ahead + behind), told)


def square_no_better(e: Evidence) -> Verdict:
    """Square must break nothing that white-box attacks leave; WARN for any image, FAIL beyond 1 % by a binomial test.

    Why: an attack that only asks for answers has less to go by than one with gradients; where it wins, they are masked
    (Andriushchenko et al. 2020, arXiv:1912.00049; Athalye et al. 2018, arXiv:1802.00420, section 3.1).

    PASS: it breaks no more images.
    WARN: it breaks some.
    FAIL: it breaks more than 1 %, beyond chance.
    """
    return _exceptions(e, "square")


def transfer_no_better(e: Evidence) -> Verdict:
    """MI-FGSM on the surrogate must break nothing that white-box attacks leave; WARN for any, FAIL beyond 1 % by a test.

    Why: images made on another network have less to go by than the network's own gradient; where they win, it is masked
    (Papernot et al. 2017, arXiv:1602.02697; Athalye et al. 2018, arXiv:1802.00420, section 3.1).

    PASS: they break no more images.
    WARN: they break some.
    FAIL: they break more than 1 %, beyond chance.
    """
    return _exceptions(e, "transfer")


def _exceptions(e: Evidence, name: str) -> Verdict:
    [run] = run_of(e, name)
    alone = int(run.broken.sum())
    told = f"{name} breaks {alone} of the {int(run.tried.sum())} images that every white-box attack has left"
    status = "FAIL" if exceeds(alone, len(e.data), POINT) else "WARN" if alone else "PASS"
    return Verdict(status, alone / len(e.data), told, images(e, run.broken))


def sweep_is_monotone(e: Evidence) -> Verdict:
    """PGD must not break fewer images at a larger budget: half, once, twice, all; FAIL beyond a point, by the paired test.

    Why: every image within a small ball lies in the larger one, too, so that a better result at a larger budget is a
    failure of the attack (Carlini et al. 2019, arXiv:1902.06705, on varying the budget).

    PASS: no larger budget breaks more than a point less.
    WARN: one does, which may be chance.
    FAIL: one does, and it is no chance.
    """
    [base] = run_of(e, "pgd")
    runs = [run for _, run in sorted({**e.sweep, e.settings.threat.eps: base}.items())]
    return worst([not_stronger(e, small, large) for small, large in pairwise(runs)])


def far_reaches_chance(e: Evidence) -> Verdict:
    """At a budget that can make every image grey, accuracy must fall to chance; FAIL above it by a binomial test.

    A grey image gets one answer, so no network is right more often than the commonest class is there.

    Why: with an unbounded budget every network fails, so that an attack which then does not succeed does not work (Athalye
    et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705).

    PASS: accuracy is at most chance.
    WARN: above it, which may be chance.
    FAIL: above it, and it is no chance.
    """
    [base] = run_of(e, "pgd")
    run = usable(e.sweep.get(e.settings.far, base))
    left, n = int((e.right & ~run.broken).sum()), len(e.data)
    level = max(1 / len(e.data.classes), max(e.data.per_class()) / n)
    told = f"{left} of {n} images stay right at eps={e.settings.far:.4g}; chance is {100 * level:.1f} %"
    status = "PASS" if left <= level * n else "FAIL" if level < 1 and exceeds(left, n, level) else "WARN"
    return Verdict(status, left / n, told)


def _tried(e: Evidence) -> list[Run]:
    runs = [run for run in e.runs.values() if not run.error and bool(run.tried.any())]
    if not runs:
        raise Skip("no attack could run")
    return runs
