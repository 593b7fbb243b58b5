"""The study of layers that a record of robustness may hold: what one attack does inside the network, stage by stage."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import state
from ..data.splits import stratified
from ..errors import DataError, ModelError
from ..measure.adversarial import ThreatModel, answers_of, craft, logits_of
from ..measure.before_after import StageWeights, image_grid, stage_weights
from ..measure.layer_study import StageShift, layer_study
from ..models import stages
from ..types import ImageSet, to_float
from .evading import Entry

STUDIED = 100  # images
BINS = 48
STAGES = 60  # a record holds no more
CHANNELS = 5  # those that move most, of each stage
PICTURES = ((8, 1), (4, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 8))  # how many images, shrunk how many times
LARGEST = 300_000  # bytes of a picture: a record holds at most a million
SMALL = 48  # pixels: images up to this size are drawn twice as large


def look_inside(
    model: nn.Module,
    data: ImageSet,
    entry: Entry,
    threat: ThreatModel,
    *,
    images: int = STUDIED,
    batch_size: int = 32,
    generator: torch.Generator,
) -> tuple[dict[str, Any] | None, str]:
    """Attack some images once more and compare the network's feature maps with those of the same images left alone.

    Args:
        model: Left as it was.
        data: Images, of which some are drawn by class.
        entry: The attack.
        threat: The threat model; images beyond it are replaced by their originals.
        images: At most so many, >= 2.
        batch_size: Images at once, >= 1.
        generator: Source of all randomness.

    Returns:
        What the record says (``details.study``), and an empty text; or None and why there is no study.
    """
    [rows] = stratified(data.y, [min(images, len(data))], generator=generator)
    places = rows.sort().values
    some, after = data.subset(places), _spread(stages(model))
    own = Entry(entry.name, entry.plain, entry.row)
    try:
        with state.seeded(generator):  # for networks that draw
            adversarial, answers = _attacked(model, some, own, threat, batch_size, generator)
            if own.lost:
                return None, f"{own.name} could not run on {own.lost} of {len(some)} images: {own.error}"
            shifts = layer_study(model, some.x, adversarial, after=after, bins=BINS, batch_size=batch_size)
        weights = stage_weights(model, after=after, bins=BINS)
    except ModelError as problem:
        return None, str(problem)
    right = answers == some.y
    broken = (right[0] & ~right[1]).nonzero()[:, 0]
    found = {
        "images": len(some),
        "attack": entry.name,
        "budget": str(entry.bound),
        "right": int(right[0].sum()),
        "stood": int((right[0] & right[1]).sum()),
        "stages": [_shift(shift) for shift in shifts],
        "weights": [_weights(stage) for stage in weights],
        "stages_left_out": len(stages(model)) - len(after),
    }
    shown = broken if len(broken) else torch.arange(len(some))
    shown = shown[:: max(1, len(shown) // PICTURES[0][0])]  # of all classes, where data come class by class
    return {**found, **_picture(to_float(some.x[shown]), adversarial[shown], places[shown])}, ""


def _attacked(
    model: nn.Module, data: ImageSet, entry: Entry, threat: ThreatModel, batch_size: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return images under attack, as returned, and the answers before and under it, int64 ``(2, n)``."""
    made, answers = [], []
    size, classes = state.batch_size(batch_size), len(data.classes)
    for x, y in zip(data.x.split(size), data.y.split(size), strict=True):
        made.append(craft(entry.bound, model, x, y, threat, draw).returned)
        seen = (logits_of(model, part, classes) for part in (x, made[-1]))
        answers.append(torch.stack([answers_of(logits) for logits in seen]))
    return torch.cat(made), torch.cat(answers, dim=1)


def _spread(names: Sequence[str]) -> tuple[str, ...]:
    """Return all names, or `STAGES` of them from the first to the last."""
    if len(names) <= STAGES:
        return tuple(names)
    return tuple(names[i * (len(names) - 1) // (STAGES - 1)] for i in range(STAGES))


def _shift(shift: StageShift) -> dict[str, Any]:
    moved = {channel: value for channel, value in enumerate(shift.channels) if value is not None}
    most = sorted(moved, key=lambda channel: (-moved[channel], channel))[:CHANNELS]
    return {
        "stage": shift.stage,
        "low": shift.low,
        "high": shift.high,
        "edges": [shift.clean.edges[0], shift.clean.edges[-1]],
        "clean": list(shift.clean.counts),
        "adversarial": list(shift.adversarial.counts),
        "l2": None if shift.l2 is None else asdict(shift.l2),
        "largest": shift.largest,
        "channels": len(shift.channels),
        "moved": [{"channel": channel, "shift": moved[channel]} for channel in most],
    }


def _weights(stage: StageWeights) -> dict[str, Any]:
    edges, counts = stage.values.edges, stage.values.counts
    return {
        "stage": stage.stage,
        "edges": [edges[0], edges[-1]],
        "counts": list(counts),
        "mean": stage.mean,
        "std": stage.std,
        "zeros": stage.zeros,
    }


def _picture(clean: Tensor, adversarial: Tensor, places: Tensor) -> dict[str, Any]:
    """Return the field ``grid``: as many images as a record has room for; nothing where images cannot be drawn."""
    side = min(clean.shape[-2:])
    for count, shrunk in PICTURES:
        pair = [
            part[:count] if shrunk == 1 else nn.functional.avg_pool2d(part[:count], shrunk) for part in (clean, adversarial)
        ]
        try:
            grid = image_grid(*pair, zoom=2 if side <= SMALL else 1)
        except DataError:
            return {}
        if len(grid.png) <= LARGEST:
            png = "data:image/png;base64," + base64.b64encode(grid.png).decode()
            return {"grid": {"png": png, "scale": grid.scale, "images": places[:count].tolist(), "shrunk": shrunk}}
    return {}
