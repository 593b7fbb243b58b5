"""The repair that chooses: it looks for a backdoor, tries masks and healing, and keeps what the evidence is best for.

Ours. Its parts are ANP, BNP, CLP and RNP (see each), trigger inversion (see `secateur.detect.invert`) and `forget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..data import holdout
from ..detect import Precision
from ..errors import DataError, MethodError, ModelError, check_choice, check_range
from ..measure import correct, wilson
from ..prune.mask import hard
from ..recipe import Recipe
from ..train import OnStep
from ..types import ImageSet, Rate, Repaired
from .anp import anp
from .bnp import bnp
from .clp import clp
from .evidence import Evidence, examine, grown, moved_by_noise, regrown
from .forgetting import forget
from .rnp import rnp

HELD_OUT = 0.25  # share of the clean images that judges
FLOOR = 0.05  # added to each sign of a backdoor
ALIKE = 0.03  # risks that differ by less are alike
REGAINED = 0.05  # accuracy that a mask may cost beyond ``drop`` when it is healed
ROUNDS = 2  # of healing: triggers are adapted to what the round before left
SHARP = 2.0  # radius of sharpness-aware healing


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate and what speaks for it.

    Attributes:
        name: What was done.
        repaired: The candidate.
        accuracy: On the images that judge.
        lost: Accuracy lost there, in [-1, 1].
        error: The standard error of that.
        inverted: Mean success of the inverted triggers, adapted to it.
        noise: Share of images of other classes that neuron noise sends to a suspect; None where noise cannot be put.
    """

    name: str
    repaired: Repaired
    accuracy: Rate
    lost: float
    error: float
    inverted: float
    noise: float | None

    @property
    def risk(self) -> float:
        """The geometric mean of both signs, a floor added to each: a backdoor shows in both, but none in one is no proof."""
        signs = (self.inverted, self.inverted if self.noise is None else self.noise)
        return math.sqrt(math.prod(sign + FLOOR for sign in signs))

    def __str__(self) -> str:
        noise = "" if self.noise is None else f", neuron noise on {100 * self.noise:.0f} %"
        return (
            f"{self.name}: accuracy {100 * self.accuracy.value:.1f} % ({0 - 100 * self.lost:+.1f} +- {100 * self.error:.1f}), "
            f"inverted triggers succeed on {100 * self.inverted:.0f} %{noise}"
        )


def auto(
    model: nn.Module,
    clean: ImageSet,
    *,
    drop: float = 0.02,
    steps: int = 80,
    iterations: int = 60,
    epochs: int = 3,
    lr: float = 0.01,
    unflagged: Literal["heal", "leave"] = "heal",
    precision: Precision = "float32",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Look for a backdoor, try masks and healing, return the candidate that evidence without a trigger is best for.

    1. Triggers are inverted and suspects named (see `secateur.repair.evidence.examine`).
    2. Candidates: the network as it is; the masks of CLP, BNP, ANP and RNP; the network healed of the inverted triggers, by
       plain and by sharpness-aware steps (see `secateur.repair.forgetting.forget`); the best mask, healed.
    3. Each is judged on a quarter of the clean images, from which no weight was learned: its accuracy, and its risk. The risk
       is the geometric mean of how often the suspects' smallest triggers of four kinds succeed after they were adapted to the
       candidate at their size, and of the share of images that adversarial noise on the neurons sends to a suspect, with 5
       points added to each. The triggers that judge start from those that healing trains against: for a healed candidate
       their success is an optimistic sign, which the noise is to balance.
    4. Of the candidates that cost at most ``drop``, give or take a standard error, those of the lowest risk (within 3 points)
       compete by accuracy.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        drop: Clean accuracy that the repair may cost, in [0, 1].
        steps: Batches per inversion, >= 1.
        iterations: Batches from which ANP learns, >= 1.
        epochs: Of each of the two rounds of healing, >= 0.
        lr: Largest learning rate of plain healing, > 0; sharpness-aware healing takes twice that.
        unflagged: What to do when inversion flags no class: ``heal`` all the same, as an insurance against backdoors that it
            does not see, or ``leave`` the network as it is.
        precision: Of the inversion; ``bfloat16`` is faster on processors that have it.
        on_step: Progress of each round of healing in turn.
        generator: Source of all randomness.

    Raises:
        DataError: There are fewer than 40 clean images, or those that judge are of one class.
        MethodError: An argument is out of range, or there are fewer than three classes.
    """
    check_range("drop", drop, 0, 1)
    check_range("iterations", iterations, 1, 2**31)
    check_choice("unflagged", unflagged, ("heal", "leave"))
    Recipe(epochs=epochs, lr=2 * lr)  # refuses now what would be refused after minutes
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    _check_images(clean, judged)
    evidence = examine(model, fitted, steps=steps, precision=precision, generator=generator)
    untouched = Repaired(deepcopy(model).eval(), None)
    if unflagged == "leave" and not evidence.flagged:
        return Repaired(untouched.model, None, log=evidence.log, notes=evidence.notes)
    judge = _Judge(model, judged, evidence, precision, generator)
    heal = _Healer(model, fitted, evidence, epochs, precision, on_step, generator)
    tried, failed = [judge("as it is", untouched)], []

    def attempt(name: str, make: Callable[[], Repaired]) -> None:
        try:
            repaired = make()
        except (MethodError, ModelError) as error:
            failed.append(f"{name} was not possible: {error}")
        else:
            tried.append(judge(name, repaired))

    for name, make in _masks(model, fitted, drop, iterations, generator):
        attempt(name, make)
    cut = _best(tried, drop + REGAINED)
    attempt("healed", partial(heal, untouched, lr=lr))
    attempt("healed, sharpness-aware", partial(heal, untouched, lr=2 * lr, rho=SHARP))
    if cut.repaired.mask is not None:
        attempt(f"{cut.name}, healed", partial(heal, cut.repaired, lr=lr))
    chosen = _best(tried, drop)
    best = chosen.repaired
    log = {**evidence.log, **best.log, "risk_before": tried[0].risk, "risk": chosen.risk}
    notes = (*evidence.notes, *(f"tried {each}" for each in tried), *failed, f"chosen: {chosen.name}", *best.notes)
    return Repaired(best.model, best.mask, best.path, log, notes)


def _check_images(clean: ImageSet, judged: ImageSet) -> None:
    if len(clean.classes) < 3:
        raise MethodError(f"auto compares classes and needs at least 3, got {len(clean.classes)}; use anp, rnp or ft-sam")
    if len(judged) < 10 or len(judged.y.unique()) < 2:
        raise DataError(f"auto needs at least 40 clean images, of several classes, got {len(clean)}; give more images")


def _masks(
    model: nn.Module, clean: ImageSet, drop: float, iterations: int, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], Repaired]]]:
    """Yield the masks to try, the cheap ones first."""
    given = {"generator": generator}
    yield "clp", partial(clp, model, clean, **given)
    yield "bnp", partial(bnp, model, clean, **given)
    yield "anp", partial(anp, model, clean, drop=drop, iterations=iterations, **given)
    yield "rnp", partial(rnp, model, clean, drop=drop, **given)


def _best(tried: Sequence[Tried], drop: float) -> Tried:
    able = [each for each in tried if each.lost - each.error <= drop]  # the network as it is loses nothing
    least = min(each.risk for each in able)
    return max((each for each in able if each.risk <= least + ALIKE), key=lambda each: each.accuracy.value)


class _Healer:
    """Heals networks of the inverted triggers, and of those that still work after that."""

    def __init__(
        self,
        model: nn.Module,
        clean: ImageSet,
        evidence: Evidence,
        epochs: int,
        precision: Precision,
        on_step: OnStep | None,
        generator: torch.Generator,
    ) -> None:
        self.grow = partial(grown, clean=clean, smallest=evidence.smallest, precision=precision, generator=generator)
        self.triggers = self.grow(model)
        self.train = partial(forget, clean=clean, teacher=model, epochs=epochs, on_step=on_step, generator=generator)

    def __call__(self, start: Repaired, *, lr: float, rho: float = 0.0) -> Repaired:
        """Return what a candidate becomes; what it cuts stays cut."""
        now, triggers, mask = start.model, list(self.triggers), hard(start.mask)
        for number in range(ROUNDS):
            triggers += self.grow(now) if number else []
            now = self.train(now, triggers=triggers, mask=mask, lr=lr, rho=rho)
        return Repaired(now, mask, log=start.log, notes=start.notes)


class _Judge:
    """Measures candidates on the same images, with the same triggers."""

    def __init__(
        self, model: nn.Module, judged: ImageSet, evidence: Evidence, precision: Precision, generator: torch.Generator
    ) -> None:
        self.before: Tensor = correct(model, judged)
        self.judged, self.evidence, self.generator = judged, evidence, generator
        self.precision: Precision = precision

    def __call__(self, name: str, repaired: Repaired) -> Tried:
        right = correct(repaired.model, self.judged)
        lost, gained = int((self.before & ~right).sum()), int((right & ~self.before).sum())
        number, mean = len(right), (lost - gained) / len(right)
        rates = regrown(repaired.model, self.judged, self.evidence.smallest, precision=self.precision, generator=self.generator)
        return Tried(
            name,
            repaired,
            wilson(int(right.sum()), number),
            mean,
            math.sqrt(max(0.0, (lost + gained) / number - mean**2) / number),
            sum(rates) / len(rates),
            self._noise(repaired.model),
        )

    def _noise(self, model: nn.Module) -> float | None:
        try:
            moved = moved_by_noise(model, self.judged, generator=self.generator)
        except (MethodError, ModelError):  # the network cannot be traced, or all its neurons answer
            return None
        return float(moved[list(self.evidence.suspects)].max())
