"""The drawing of what each target of a compression leaves of accuracy, and of accuracy under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, grid, joined, picture, tag
from .wording import clip, plain, rate

Choice = Mapping[str, Any]
KINDS = {"transfer": "under images made on the network before", "white_box": "under its own images"}
NARROW, LEAST = 0.05, 0.2  # least lengths of the axes of clean accuracy and of accuracy under attack


def pareto(choices: Sequence[Choice]) -> Markup:
    """Return accuracy under attack against clean accuracy, one mark per choice and kind of attack, with 95 % intervals.

    Args:
        choices: ``details.compression.choices``; the second is the one that was made.
    """
    shares = [choice["accuracy"] for choice in choices]
    low, high = min(share["low"] for share in shares), max(share["high"] for share in shares)
    low = min(math.floor(20 * low) / 20, 1 - NARROW)
    x = Axis(low, max(math.ceil(20 * high) / 20, low + NARROW), LEFT, RIGHT)
    tallest = max(choice[kind]["high"] for choice in choices for kind in KINDS)
    y = Axis(0.0, max(math.ceil(10 * tallest) / 10, LEAST), BOTTOM, TOP, 5)
    ordered = sorted(choices, key=lambda choice: choice["accuracy"]["value"])
    lines = [
        tag("polyline", points=joined([_at(choice, kind, x, y) for choice in ordered]), class_=f"line {kind}") for kind in KINDS
    ]
    marks = [mark for number, choice in enumerate(choices) for mark in _marks(choice, number, x, y)]
    return picture(
        "Accuracy under attack against clean accuracy, one mark per target, with 95 % intervals",
        *grid(x, y, "clean accuracy"),
        *lines,
        *marks,
        class_="curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
    )


def _at(choice: Choice, kind: str, x: Axis, y: Axis) -> tuple[float, float]:
    return x(choice["accuracy"]["value"]), y(choice[kind]["value"])


def _marks(choice: Choice, number: int, x: Axis, y: Axis) -> list[Markup]:
    chosen, name = number == 1, clip(plain(choice["name"]), 20)
    found = []
    for kind, words in KINDS.items():
        across, up = _at(choice, kind, x, y)
        own, clean = choice[kind], choice["accuracy"]
        said = tag("title", f"{name}: {rate(clean)} clean, {rate(own)} {words}")
        found += [
            tag("line", x1=across, x2=across, y1=y(own["low"]), y2=y(own["high"]), class_=f"range {kind}"),
            tag("line", x1=x(clean["low"]), x2=x(clean["high"]), y1=up, y2=up, class_=f"range {kind}"),
            tag("circle", said, cx=across, cy=up, r=6 if chosen else 3, class_=f"{'chosen' if chosen else 'point'} {kind}"),
        ]
    across, up = _at(choice, "transfer", x, y)
    right = across > (LEFT + RIGHT) / 2
    anchor, shift = ("end", -9) if right else ("start", 9)
    height = max(up - 9 - 14 * (number % 3), TOP + 10)  # neighbours need not lie on each other
    return [*found, tag("text", name, x=across + shift, y=height, text_anchor=anchor, class_="label")]
