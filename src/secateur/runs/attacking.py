"""Honest robustness from end to end: attack, check whether the figure means anything, and write down both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attack import mi_fgsm, pgd
from ..attack.ball import Norm, check_budget
from ..attack.network import Forward
from ..data.splits import stratified
from ..errors import InconclusiveError, MethodError
from ..measure.adversarial import Knowledge, ThreatModel, bind
from ..measure.robustness import Robustness, robustness, robustness_curve
from ..measure.sanity import Sanity, sanity
from ..measure.transfer import transfer_matrix
from ..models import Classifier
from ..prune import adaptives
from ..state import generator
from ..train import OnNote, OnStep
from ..types import ImageSet, Result
from . import robust_records as told
from .evading import GRADIENT_FREE, TRANSFER, Entry, across, chosen
from .records import check_better_than_chance, check_fit, describe, environment, inputs, measure, now, tool
from .studying import look_inside

VERSION = 3  # of the procedure: goes up whenever the same arguments give another result
FEWEST = 10
LOOKED_AT = 200  # images of the checks and of the curve
SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, eq=False)
class AttackRun:
    """A finished measurement of robustness.

    Attributes:
        result: The record.
        robustness: What the attacks did.
        sanity: Whether that means anything.
    """

    result: Result
    robustness: Robustness
    sanity: Sanity


def attack(
    model: Classifier,
    data: ImageSet,
    *,
    eps: float,
    norm: Norm = "linf",
    methods: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    surrogate: Classifier | None = None,
    train: ImageSet | None = None,
    sweep: Sequence[float] | None = None,
    images: int = LOOKED_AT,
    study: bool = False,
    seed: int = 0,
    command: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> AttackRun:
    """Measure what attacks leave of a network's accuracy, and check that the figure is not one to be fooled by.

    Every attack runs on every image; an image counts as robust when none broke it. On a network whose feature maps are
    quantised or edited, gradient attacks are adaptive: they run with each setting ``forward`` of `prune.adaptives`. The checks
    (`secateur.measure.sanity`) attack some of the images in more ways, and judge the attacks chosen there as well. If one
    fails, the figure stands in the record as the bound it is, and the verdict says that robustness was not established.

    Args:
        model: The network; left as it was.
        data: Test images, 10 at least.
        eps: Budget in units of pixels that go from 0 to 1 (8/255), > 0.
        norm: Distance that the budget bounds.
        methods: Names of evasion attacks (``secateur list evasions``); by default PGD on two losses, and Square.
        arguments: Their settings: ``steps`` for all that have it, ``pgd.steps`` for one.
        surrogate: Another network, such as the one before repair: its images are tried on this one, and the other way round.
        train: Images that the network was trained on, to count those that are measured on too.
        sweep: Budgets of the curve, > 0; by default a quarter to four times ``eps``; none for no curve.
        images: How many images the checks and the curve look at, >= 10.
        study: Whether to record what the first attack does to the feature maps of each stage, on at most 100 images. Where a
            network's stages cannot be watched, a note in the record says why.
        seed: Of all randomness.
        command: The command line, for the record.
        on_step: Progress.
        on_note: Told what is being done.

    Raises:
        InconclusiveError: Fewer than 10 images, or the network is no better than chance on them.
        MethodError: Unknown method or setting, or a number out of range.
        ModelError: The images do not fit a network.
    """
    budgets = _check(data, eps, norm, sweep, images)
    forwards = adaptives(model)
    entries = chosen(methods, arguments or {}, eps=eps, norm=norm, forwards=forwards)
    for network in (model, *([surrogate] if surrogate else [])):
        check_fit(network, data)
    before = measure(model, data, None, timed=True)
    check_better_than_chance(before, data)
    run = [*entries, *([across(surrogate, eps=eps, norm=norm)] if surrogate else [])]
    start, threat = time.perf_counter(), ThreatModel(eps, norm, knowledge=_knowledge(run))
    phases = Phases(2 + bool(surrogate) + bool(budgets) + study, on_step, on_note)
    bounds = {entry.name: entry.bound for entry in run}
    step = phases.next(f"attacking {len(data):,} images: {', '.join(bounds)}")
    found = robustness(model, data, bounds, threat, on_step=step, generator=generator(seed))
    seconds = {"attacks_seconds": phases.lap()}
    took = {entry.name: entry.seconds for entry in run}
    # The default attacks are those of the checks with other numbers; to run them once more would tell nothing.
    judged = {f"{entry.name} as measured": entry.plain for entry in entries if methods or arguments or len(forwards) > 1}
    step = phases.next(f"checking what could make the figure wrong, on {min(images, len(data)):,} images")
    checked = sanity(
        model, data, eps=eps, norm=norm, images=images, attacks=judged, forward=next(iter(forwards.values())),
        surrogate=surrogate, train=train, measured=found, on_step=step, generator=generator(seed),
    )  # fmt: skip
    checked = told.with_errors(checked, run)
    seconds["checks_seconds"] = phases.lap()
    details: dict[str, Any] = told.figures(found, checked, run, took)
    if surrogate:
        details["transfer"] = _transfer(model, surrogate, data, threat, phases, generator(seed))
        seconds["transfer_seconds"] = phases.lap()
    if budgets:
        details["curve"] = _curve(model, data, budgets, threat, images, phases, generator(seed), forwards)
        seconds["curve_seconds"] = phases.lap()
    inside, why = {}, ""
    if study:
        phases.next("looking at what the attack does inside, stage by stage")
        inside, why = look_inside(model, data, entries[0], threat, generator=generator(seed))
        seconds["study_seconds"] = phases.lap()
    seconds = {"seconds": time.perf_counter() - start, **seconds}
    notes = [
        f"{entry.name} could not run on {entry.lost:,} of {len(data):,} images: {entry.error}" for entry in run if entry.lost
    ]
    findings = told.findings(checked)
    args = {**(arguments or {}), "eps": eps, "norm": norm, "methods": [entry.name for entry in run],
            "images_checked": min(images, len(data)), "sweep": list(budgets)}  # fmt: skip
    result = Result(
        kind="attack",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=[*inputs(model), *({**entry, "role": "surrogate"} for entry in (inputs(surrogate) if surrogate else ()))],
        data={"test": describe(data), **({"train": describe(train)} if train else {})},
        method={"name": ", ".join(bounds), "version": VERSION, "args": args, "seed": seed},
        before=before | {"accuracy": asdict(found.worst.clean_accuracy), "adversarial_accuracy": asdict(found.robust_accuracy)},
        after={},
        cost=seconds,
        checks=told.checks(checked),
        findings=[*(model.origin or {}).get("findings", ()), *findings],
        verdict="not-established" if any(finding["severity"] == "high" for finding in findings) else "established",
        limitations=told.limitations(found, checked, run, surrogate is not None, train is not None, inside),
        details={
            "robustness": details,
            **({"study": inside} if inside else {}),
            "notes": [*notes, *([f"The layer study was not made: {why}."] if why else [])],
        },
    )
    return AttackRun(result, found, checked)


def _knowledge(entries: Sequence[Entry]) -> Knowledge:
    """Return what the most knowing of some attacks is told of the network."""
    names = {entry.row.name if entry.row else TRANSFER for entry in entries}
    if names - {*GRADIENT_FREE, TRANSFER}:
        return "white-box"
    if "square" in names:
        return "black-box"
    return "transfer" if TRANSFER in names else "none"


def _check(data: ImageSet, eps: float, norm: Norm, sweep: Sequence[float] | None, images: int) -> tuple[float, ...]:
    """Return the budgets of the curve; raise where nothing sensible can be measured."""
    features = data.x.shape[1:].numel()
    limit = 1.0 if norm == "linf" else math.sqrt(features)
    check_budget(eps, norm, features)
    if eps <= 0:
        raise MethodError(f"eps must be above 0, got {eps:g}; without a budget there is nothing to attack")
    if len(data) < FEWEST or images < FEWEST:
        few = min(len(data), images)
        raise InconclusiveError(f"robustness needs at least {FEWEST} images, got {few}; the interval would say nothing")
    budgets = [min(eps * factor, limit) for factor in SWEEP] if sweep is None else sweep
    for value in budgets:
        check_budget(value, norm, features)
        if value <= 0:
            raise MethodError(f"a curve starts at 0 by itself; its other budgets must be above 0, got {value:g}")
    return tuple(sorted(set(budgets)))


class Phases:
    """Parts of a run, each a like share of the progress shown, each with its time."""

    def __init__(self, count: int, on_step: OnStep | None, on_note: OnNote | None) -> None:
        self.count, self.on_step, self.on_note = count, on_step, on_note
        self.number, self.start = -1, time.perf_counter()

    def next(self, note: str) -> Callable[[int, int], None]:
        """Begin a part; return its ``on_step``."""
        self.number += 1
        if self.on_note is not None:
            self.on_note(note)
        done = 1000 * self.number

        def step(step: int, steps: int) -> None:
            if self.on_step is not None:
                self.on_step(done + 1000 * step // max(1, steps), 1000 * self.count)

        return step

    def lap(self) -> float:
        """Return the seconds since the last call."""
        before, self.start = self.start, time.perf_counter()
        return self.start - before


def _transfer(
    model: Classifier, surrogate: Classifier, data: ImageSet, threat: ThreatModel, phases: Phases, draw: torch.Generator
) -> dict[str, Any]:
    networks = {"network": model, "surrogate": surrogate}
    entry = Entry("mi-fgsm", bind(mi_fgsm, eps=threat.eps, norm=threat.norm))
    step = phases.next("showing each network the images made on the other")
    matrix = transfer_matrix(networks, networks, data, entry.bound, threat, on_step=step, generator=draw)
    cells = [
        {"source": source, "target": target, "success": told.rate_of(rate)} for (source, target), rate in matrix.success.items()
    ]
    return {"budget": matrix.budget, "cells": cells, **({"error": entry.error} if entry.error else {})}


def _curve(
    model: Classifier,
    data: ImageSet,
    budgets: Sequence[float],
    threat: ThreatModel,
    images: int,
    phases: Phases,
    draw: torch.Generator,
    forwards: Mapping[str, Forward | None],
) -> dict[str, Any]:
    """Measure PGD on two losses at each budget: enough for a shape, at a fraction of the cost of the attacks chosen."""
    [rows] = stratified(data.y, [min(images, len(data))], generator=draw)
    entries: list[Entry] = []

    def attacks(eps: float) -> dict[str, Any]:
        common = {"eps": eps, "norm": threat.norm, "drop_broken": True}
        here = [
            Entry(f"pgd ({', '.join(filter(None, (loss, name)))})", bind(pgd, **common, loss=loss, forward=forward))
            for loss in ("cross-entropy", "margin")
            for name, forward in forwards.items()
        ]
        entries.extend(here)
        return {entry.name: entry.bound for entry in here}

    step = phases.next("the curve over eps")
    found = robustness_curve(model, data.subset(rows), attacks, budgets, threat, on_step=step, generator=draw)
    clean = {"eps": 0.0, "accuracy": asdict(found[0].worst.clean_accuracy)}
    points = [{"eps": point.threat.eps, "accuracy": asdict(point.robust_accuracy)} for point in found]
    error = next((entry.error for entry in entries if entry.error), "")
    return {"attacks": list(found[0].by_attack), "points": [clean, *points], **({"error": error} if error else {})}
