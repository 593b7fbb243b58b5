"""Sections of a layer study: what an attack does to feature maps, stage by stage, and what the weights look like."""

from __future__ import annotations

from collections.abc import Sequence

from .parts import Cell, Record, Section, Table, number_cell, text_cell
from .wording import NOT_MEASURED, clip, number, percent, plain

NAME = 80  # characters of a stage in a sentence


def sections(study: Record | None) -> tuple[Section, ...]:
    """Return the sections of a study; none without one."""
    if study is None:
        return ()
    return _moves(study), _maps(study["stages"]), _weights(study["weights"])


def ratio(mean: Record | None) -> str:
    """Return ``0.83 [0.80, 0.86]``, to as many decimals as tell its interval."""
    if mean is None:
        return NOT_MEASURED
    return f"{digits(mean['value'])} [{digits(mean['low'])}, {digits(mean['high'])}]"


def digits(value: float) -> str:
    """Return a number as ``0.031``, ``0.180`` or ``1.22``, and a very small or large one to three digits."""
    size = abs(value)
    return f"{value:.3g}" if size >= 1000 or 0 < size < 0.01 else f"{value:.2f}" if size >= 0.9995 else f"{value:.3f}"


def most_moved(stages: Sequence[Record]) -> Record | None:
    """Return the stage with the largest relative shift; None where none has one."""
    moved = [stage for stage in stages if stage["l2"] is not None]
    return max(moved, key=lambda stage: stage["l2"]["value"], default=None)


def channels(stage: Record) -> str:
    """Return the channels that move most, ``12 (0.83), 3 (0.61)``."""
    return ", ".join(f"{moved['channel']} ({digits(moved['shift'])})" for moved in stage["moved"])


def _moves(study: Record) -> Section:
    stages, n = study["stages"], study["images"]
    lines = [
        f"Looked at: {n:,} images, attacked once more ({plain(study['attack'])}); {study['right']:,} of them are right without "
        f"an attack, {study['stood']:,} under it."
    ]
    if most := most_moved(stages):
        moved = [stage for stage in stages if stage["l2"] is not None]
        least = min(moved, key=lambda stage: stage["l2"]["value"])
        near = [stage for stage in moved if stage is not most and stage["l2"]["high"] >= most["l2"]["low"]]
        said = f" (the interval of {_name(near[0])}{' and others' if len(near) > 1 else ''} overlaps)" if near else ""
        said += f": the attack changes its output by {ratio(most['l2'])} of its own length"
        said += f". Least moves {_name(least)}, by {digits(least['l2']['value'])}" if least is not most else ""
        lines.insert(0, f"{_name(most)} moves most{said}.")
    lines.append(
        "Relative shift: for each image the L2 length of the change over that of the clean output; mean over images with its "
        "95 % interval. Largest change: of any one value, against the range of the clean ones."
    )
    if study["stages_left_out"]:
        lines.append(f"{study['stages_left_out']:,} stages between these had no room in the record.")
    rows = tuple(
        (
            text_cell(stage["stage"]),
            Cell(ratio(stage["l2"]), key=None if stage["l2"] is None else stage["l2"]["value"]),
            _share(stage["largest"]),
        )
        for stage in stages
    )
    head = ("Stage", "Relative shift", "Largest change")
    return Section("study", "Where the attack moves the network", tuple(lines), (Table(head, rows),))


def _maps(stages: Sequence[Record]) -> Section:
    rows = tuple(
        (
            text_cell(stage["stage"]),
            Cell(f"{number(stage['low'])} to {number(stage['high'])}"),
            number_cell(stage["channels"]),
            Cell(channels(stage)),
        )
        for stage in stages
    )
    head = ("Stage", "Clean values", "Channels", "Those that move most (relative shift)")
    return Section("maps", "Feature maps, clean and under attack", tables=(Table(head, rows),))


def _weights(stages: Sequence[Record]) -> Section:
    rows = tuple(
        (
            text_cell(stage["stage"]),
            number_cell(sum(stage["counts"])),
            number_cell(float(f"{stage['mean']:.3g}")),
            number_cell(float(f"{stage['std']:.3g}")),
            Cell(" to ".join(f"{edge:.3g}" for edge in stage["edges"])),
            Cell(percent(stage["zeros"]), key=stage["zeros"]),
        )
        for stage in stages
    )
    head = ("Stage", "Weights", "Mean", "Standard deviation", "Range", "Zero")
    return Section("weights", "Weights, stage by stage", tables=(Table(head, rows),))


def _share(value: float | None) -> Cell:
    return number_cell(None) if value is None else Cell(percent(value), key=value)


def _name(stage: Record) -> str:
    return clip(stage["stage"], NAME)
