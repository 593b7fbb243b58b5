"""Drawings as inline SVG. Their colours come from the page's style sheet, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .sections import Bar, Span
from .wording import percent, rate

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 620, 14, 252

Point = tuple[float, float]


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """Return an element; a trailing ``_`` of an attribute is dropped and other ``_`` become ``-``. Everything is escaped."""
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), round(value, 2) if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(pairs), Markup("").join(children))


def _picture(title: str, *children: str, **attributes: Any) -> Markup:
    return tag("svg", tag("title", title), *children, role="img", aria_label=title, **attributes)


def bar(drawn: Bar) -> Markup:
    """Return a horizontal bar, the removed share filled."""
    size = {"y": 0, "height": 8}
    whole = tag("rect", x=0, width=100, class_="rest", **size)
    cut = tag("rect", x=0, width=100 * drawn.share, class_="cut", **size)
    title = f"{percent(drawn.share)} removed"
    return _picture(title, whole, cut, class_="bar", viewBox="0 0 100 8", preserveAspectRatio="none")


def span(drawn: Span) -> Markup:
    """Return two rates with their intervals on one scale from 0 to 100 %."""
    scale = tag("line", x1=0, x2=100, y1=10, y2=10, class_="axis")
    pairs = ((drawn.before, "before", 6), (drawn.after, "after", 14))
    shown = [(value, name, y) for value, name, y in pairs if value is not None]
    marks = [mark for value, name, y in shown for mark in _interval(value, name, y)]
    title = "; ".join(f"{name} {rate(value)}" if len(shown) > 1 else rate(value) for value, name, _ in shown)
    return _picture(title, scale, *marks, class_="span", viewBox="0 0 100 20", preserveAspectRatio="none")


def _interval(value: Mapping[str, Any], name: str, y: float) -> tuple[Markup, Markup]:
    # A line of no length with round caps is a dot that the stretched view box does not distort.
    centre = 100 * value["value"]
    return (
        tag("line", x1=100 * value["low"], x2=100 * value["high"], y1=y, y2=y, class_=f"{name} range"),
        tag("line", x1=centre, x2=centre, y1=y, y2=y, class_=f"{name} dot"),
    )


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values along the axis."""
        step = _round_step((self.high - self.low) / 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def curve(path: Sequence[Mapping[str, Any]], removed: int) -> Markup:
    """Return hold-out accuracy against the share cut, with its interval band.

    Args:
        path: The cuts that were considered (``details.path``).
        removed: What was cut in the end, to mark it.
    """
    steps = sorted(path, key=lambda step: step["amount"])
    rates = [step["holdout"] for step in steps]
    bottom = math.floor(10 * min(min(r["low"], r["value"]) for r in rates)) / 10
    top = math.ceil(10 * max(max(r["high"], r["value"]) for r in rates)) / 10
    x = Axis(0.0, max(steps[-1]["amount"], 0.01), LEFT, RIGHT)
    y = Axis(min(bottom, top - 0.1), top, BOTTOM, TOP) if top > 0 else Axis(0.0, 0.1, BOTTOM, TOP)
    across = [x(step["amount"]) for step in steps]
    band = [(a, y(r["high"])) for a, r in zip(across, rates, strict=True)]
    band += [(a, y(r["low"])) for a, r in reversed(list(zip(across, rates, strict=True)))]
    line = [(a, y(r["value"])) for a, r in zip(across, rates, strict=True)]
    dots = [_dot(point, step, removed) for point, step in zip(line, steps, strict=True)]
    return _picture(
        "Accuracy on the hold-out against the share cut, with 95 % intervals",
        *_grid(x, y),
        tag("polygon", points=_points(band), class_="band"),
        tag("polyline", points=_points(line), class_="line"),
        *dots,
        class_="curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
    )


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dot(at: Point, step: Mapping[str, Any], removed: int) -> Markup:
    chosen = step.get("chosen", step["removed"] == removed)
    said = f"{percent(step['amount'])} cut ({step['removed']:,}): {rate(step['holdout'])}"
    title = tag("title", f"{said}, the cut that was made" if chosen else said)
    circle = tag("circle", title, cx=at[0], cy=at[1], r=6 if chosen else 3, class_="chosen" if chosen else "point")
    if not chosen:
        return circle
    anchor = "end" if at[0] > (LEFT + RIGHT) / 2 else "start"
    shift = -12 if anchor == "end" else 12
    label = tag("text", "the cut that was made", x=at[0] + shift, y=at[1] + 22, text_anchor=anchor, class_="label")
    return circle + label


def _grid(x: Axis, y: Axis) -> list[Markup]:
    marks = [tag("line", x1=LEFT, x2=RIGHT, y1=y(v), y2=y(v), class_="grid") for v in y.ticks()]
    marks += [tag("text", f"{100 * v:.3g} %", x=LEFT - 8, y=y(v) + 4, text_anchor="end") for v in y.ticks()]
    marks += [tag("line", x1=x(v), x2=x(v), y1=BOTTOM, y2=BOTTOM + 5, class_="axis") for v in x.ticks()]
    marks += [tag("text", f"{100 * v:.3g} %", x=x(v), y=BOTTOM + 20, text_anchor="middle") for v in x.ticks()]
    marks.append(tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    marks.append(tag("text", "share cut", x=RIGHT, y=BOTTOM + 42, text_anchor="end", class_="label"))
    return marks
