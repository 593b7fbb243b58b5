"""The drawing of accuracy under attack against the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, grid, joined, picture, tag
from .wording import budget, rate

LEAST = 1e-6  # of an axis, so that ticks of next to nothing can be told apart


def sweep(points: Sequence[Mapping[str, Any]], threat: Mapping[str, Any]) -> Markup:
    """Return accuracy under attack against eps with its interval band, and a mark at the budget that was measured in full.

    Args:
        points: Budgets and accuracies (``details.robustness.curve.points``).
        threat: The threat model.
    """
    levels = 255 if threat["norm"] == "linf" else 1
    ordered = sorted(points, key=lambda point: point["eps"])
    x = Axis(0.0, max(levels * ordered[-1]["eps"], LEAST), LEFT, RIGHT, 8, share=False)
    y = Axis(0.0, 1.0, BOTTOM, TOP, 5)
    at = [(x(levels * point["eps"]), point["accuracy"]) for point in ordered]
    line = [(across, y(found["value"])) for across, found in at]
    band = [(across, y(found["high"])) for across, found in at] + [(across, y(found["low"])) for across, found in reversed(at)]
    dots = [_dot(spot, point, threat["norm"], point["eps"] == threat["eps"]) for spot, point in zip(line, ordered, strict=True)]
    return picture(
        "Accuracy under attack against eps, with 95 % intervals",
        *grid(x, y, "eps in grey levels of 255" if levels == 255 else "eps, L2"),
        tag("polygon", points=joined(band), class_="band"),
        tag("polyline", points=joined(line), class_="line"),
        *dots,
        class_="curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
    )


def _dot(at: tuple[float, float], point: Mapping[str, Any], norm: str, chosen: bool) -> Markup:
    said = tag("title", f"{budget({'eps': point['eps'], 'norm': norm})}: {rate(point['accuracy'])}")
    circle = tag("circle", said, cx=at[0], cy=at[1], r=6 if chosen else 3, class_="chosen" if chosen else "point")
    anchor, shift = ("end", -12) if at[0] > (LEFT + RIGHT) / 2 else ("start", 12)
    label = tag("text", "the budget attacked", x=at[0] + shift, y=max(at[1] - 10, TOP + 10), text_anchor=anchor, class_="label")
    return circle + label if chosen else circle
