"""The repair that chooses: it looks for a backdoor, tries masks and healing, and keeps what the evidence is best for.

Ours. Its parts are ANP, BNP, CLP and RNP (see each), trigger inversion (see `secateur.detect.invert`) and `forget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..data import holdout
from ..detect import Kind, Precision, invert
from ..errors import DataError, MethodError, ModelError, check_choice, check_range
from ..measure import correct, wilson
from ..prune.mask import hard, removed
from ..recipe import Recipe
from ..state import generator as seeded_generator
from ..train import OnNote, OnStep
from ..types import ImageSet, Rate, Repaired
from .anp import anp
from .bnp import bnp
from .clp import clp
from .evidence import Evidence, examine, grown, moved_by_noise, regrown
from .forgetting import between, forget
from .rnp import rnp

HELD_OUT = 0.25  # share of the clean images that judges
FLOOR = 0.05  # added to each sign of a backdoor
CLEAR = 0.1  # a candidate neither of whose signs is above this leaves nothing to be done
ALIKE = 1.5  # times a risk up to which another is alike
REGAINED = 0.05  # accuracy that a mask may cost beyond ``drop`` when it is healed
HEALED = 3  # candidates at most
ROUNDS = 2  # of healing: triggers are adapted to what the round before left
SHARP = 2.0  # radius of sharpness-aware healing
SOFTENED = 0.5, 0.75  # shares of the way from the weights before to those healed


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate and what speaks for it.

    Attributes:
        name: What was done.
        repaired: The candidate.
        accuracy: On the images that judge.
        lost: Accuracy lost there, in [-1, 1].
        error: The standard error of that.
        inverted: How often the judge's triggers succeed, adapted to it: the mean over the kinds, of the worst suspect.
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
    def signs(self) -> tuple[float, float]:
        """Both signs of a backdoor; where noise cannot be put, the other one counts twice."""
        return self.inverted, self.inverted if self.noise is None else self.noise

    @property
    def risk(self) -> float:
        """The geometric mean of both signs, a floor added to each: a backdoor shows in both, but none in one is no proof."""
        return math.sqrt(math.prod(sign + FLOOR for sign in self.signs))

    def affordable(self, drop: float) -> bool:
        """Return whether it costs at most ``drop``, give or take a standard error."""
        return self.lost - self.error <= drop

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
    on_note: OnNote | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Look for a backdoor, try masks and healing, return the candidate that evidence without a trigger is best for.

    1. Triggers are inverted and suspects named (see `secateur.repair.evidence.examine`).
    2. Candidates are made until one is clear: the network as it is; the masks of CLP and BNP; the network healed of the
       inverted triggers (see `secateur.repair.forgetting.forget`); the masks of ANP and RNP; the network healed by
       sharpness-aware steps; the best mask, healed. A network that was healed comes with two between it and the one before,
       weight by weight (WiSE-FT, arXiv:2109.01903), which may be more accurate.
    3. Each is judged on a quarter of the clean images, from which nothing was learned: its accuracy, and two signs of a
       backdoor. One is how often the suspects' smallest triggers of four kinds succeed; they are inverted apart from those
       that healing trains against, and adapted to the candidate at their size. The other is the share of images that
       adversarial noise on the neurons sends to a suspect. A candidate is clear when neither is above 10 % and it costs at
       most ``drop``, give or take a standard error. The risk is the geometric mean of both, with 5 points added to each.
    4. Of the candidates that cost no more than that, those of at most one and a half times the lowest risk compete by accuracy.

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
        on_step: Progress of the healing, were all of it needed.
        on_note: Told what inversion found, and of each candidate how it was judged.
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
    tell = on_note or (lambda said: None)
    for note in evidence.notes:
        tell(note)
    untouched = Repaired(deepcopy(model).eval(), None)
    if unflagged == "leave" and not evidence.flagged:
        return Repaired(untouched.model, None, log=evidence.log, notes=evidence.notes)
    judge = _Judge(model, fitted, judged, evidence, steps, precision, generator)
    heal = _Healer(model, fitted, evidence, epochs, precision, on_step, generator)
    contest = _Contest(model, judge, drop, tell)
    contest.enter("as it is", lambda: untouched)
    for name, make, soften in _attempts(model, fitted, heal, drop, iterations, lr, generator):
        contest.enter(name, make, soften=soften)
    masked = [each for each in contest.tried if each.repaired.mask is not None and each.affordable(drop + REGAINED)]
    if masked:
        cut = _best(masked, drop + REGAINED)
        contest.enter(f"{cut.name}, healed", partial(heal, cut.repaired, lr=lr))
    chosen = _best(contest.tried, drop)
    best = chosen.repaired
    log = {**evidence.log, **best.log, "risk_before": contest.tried[0].risk, "risk": chosen.risk}
    notes = (*evidence.notes, *contest.notes, f"chosen: {chosen.name}", *best.notes)
    return Repaired(best.model, best.mask, best.path, log, notes)


def _check_images(clean: ImageSet, judged: ImageSet) -> None:
    if len(clean.classes) < 3:
        raise MethodError(f"auto compares classes and needs at least 3, got {len(clean.classes)}; use anp, rnp or ft-sam")
    if len(judged) < 10 or len(judged.y.unique()) < 2:
        raise DataError(f"auto needs at least 40 clean images, of several classes, got {len(clean)}; give more images")


def _attempts(
    model: nn.Module,
    clean: ImageSet,
    heal: _Healer,
    drop: float,
    iterations: int,
    lr: float,
    generator: torch.Generator,
) -> Iterator[tuple[str, Callable[[], Repaired], bool]]:
    """Yield what to try, and whether what lies on the way to it is to be tried too."""
    given, untouched = {"generator": generator}, Repaired(model, None)
    yield "clp", partial(clp, model, clean, **given), False
    yield "bnp", partial(bnp, model, clean, **given), False
    yield "healed", partial(heal, untouched, lr=lr), True
    yield "anp", partial(anp, model, clean, drop=drop, iterations=iterations, **given), False
    yield "rnp", partial(rnp, model, clean, drop=drop, **given), False
    yield "healed, sharpness-aware", partial(heal, untouched, lr=2 * lr, rho=SHARP), True


def _best(tried: Sequence[Tried], drop: float) -> Tried:
    able = [each for each in tried if each.affordable(drop)]  # the network as it is loses nothing
    least = min(each.risk for each in able)
    return max((each for each in able if each.risk <= least * ALIKE), key=lambda each: each.accuracy.value)


class _Contest:
    """The candidates that were tried, until one is clear, and what was not possible."""

    def __init__(self, model: nn.Module, judge: _Judge, drop: float, tell: OnNote) -> None:
        self.model, self.judge, self.drop, self.tell = model, judge, drop, tell
        self.tried: list[Tried] = []
        self.failed: list[str] = []

    @property
    def over(self) -> bool:
        """Whether a candidate is clear of both signs and affordable."""
        return any(max(each.signs) <= CLEAR and each.affordable(self.drop) for each in self.tried)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried and what failed, for the report."""
        return *(f"tried {each}" for each in self.tried), *self.failed

    def enter(self, name: str, make: Callable[[], Repaired], *, soften: bool = False) -> None:
        """Make and judge a candidate, unless the contest is over; and, if asked, those on the way to it."""
        if self.over:
            return
        try:
            repaired = make()
        except (MethodError, ModelError) as error:
            self._failed(f"{name} was not possible: {error}")
            return
        mask = hard(repaired.mask)
        if mask is not None and not sum(removed(mask).values()):
            self._failed(f"{name} cut nothing")
            return
        self._judge(name, repaired)
        for share in SOFTENED if soften else ():
            part = Repaired(between(self.model, repaired.model, share), None, log=repaired.log, notes=repaired.notes)
            self._judge(f"{name}, {100 * share:.0f} % of the way", part)

    def _judge(self, name: str, repaired: Repaired) -> None:
        self.tried.append(self.judge(name, repaired))
        self.tell(f"tried {self.tried[-1]}")

    def _failed(self, said: str) -> None:
        self.failed.append(said)
        self.tell(said)


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
        self.train = partial(forget, clean=clean, teacher=model, epochs=epochs, generator=generator)
        self.rounds, self.on_step = 0, on_step

    def __call__(self, start: Repaired, *, lr: float, rho: float = 0.0) -> Repaired:
        """Return what a candidate becomes; what it cuts stays cut."""
        now, triggers, mask = start.model, list(self.triggers), hard(start.mask)
        for number in range(ROUNDS):
            triggers += self.grow(now) if number else []
            now = self.train(now, triggers=triggers, mask=mask, lr=lr, rho=rho, on_step=self._counted())
            self.rounds += 1
        return Repaired(now, mask, log=start.log, notes=start.notes)

    def _counted(self) -> OnStep | None:
        """Return what counts the steps of a round among those of all rounds."""
        report, before = self.on_step, self.rounds
        if report is None:
            return None
        return lambda step, steps: report(before * steps + step, HEALED * ROUNDS * steps)


class _Judge:
    """Measures candidates on the same images, with the same triggers and the same draws."""

    def __init__(
        self,
        model: nn.Module,
        fitted: ImageSet,
        judged: ImageSet,
        evidence: Evidence,
        steps: int,
        precision: Precision,
        generator: torch.Generator,
    ) -> None:
        self.before: Tensor = correct(model, judged)
        self.fitted, self.judged, self.suspects = fitted, judged, evidence.suspects
        self.precision: Precision = precision
        self.seed = int(torch.randint(2**31, (), generator=generator))
        look = partial(invert, model, fitted, self.suspects, steps=steps, precision=precision, generator=generator)
        self.triggers = [found for kind in get_args(Kind) for found in look(kind=kind)]

    def __call__(self, name: str, repaired: Repaired) -> Tried:
        right = correct(repaired.model, self.judged)
        lost, gained = int((self.before & ~right).sum()), int((right & ~self.before).sum())
        number, mean = len(right), (lost - gained) / len(right)
        error = math.sqrt(max(0.0, (lost + gained) / number - mean**2) / number)
        accuracy = wilson(int(right.sum()), number)
        return Tried(name, repaired, accuracy, mean, error, self._inverted(repaired.model), self._noise(repaired.model))

    def _inverted(self, model: nn.Module) -> float:
        given = {"precision": self.precision, "generator": seeded_generator(self.seed)}
        rates = [regrown(model, self.fitted, self.judged, each, **given) for each in self.triggers]
        by_suspect = [
            [rate for rate, each in zip(rates, self.triggers, strict=True) if each.target == suspect]
            for suspect in self.suspects
        ]
        return max(sum(some) / len(some) for some in by_suspect)

    def _noise(self, model: nn.Module) -> float | None:
        try:
            moved = moved_by_noise(model, self.judged, generator=seeded_generator(self.seed))
        except (MethodError, ModelError):  # the network cannot be traced, or all its neurons answer
            return None
        return float(moved[list(self.suspects)].max())
