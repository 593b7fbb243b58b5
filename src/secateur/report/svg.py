"""Drawings as inline SVG. Their colours come from the page's style sheet, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from .neurons import View
from .parts import Bar, Span
from .wording import SHARES, clip, human, learned, percent, rate

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 620, 14, 252
SMALL, SQUARE = (400, 216), 320
DOTS = 60

Point = tuple[float, float]


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """Return an element; a trailing ``_`` of an attribute is dropped and other ``_`` become ``-``. Everything is escaped."""
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), round(value, 2) if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(pairs), Markup("").join(children))


def picture(title: str, *children: str, **attributes: Any) -> Markup:
    """Return a drawing with its title."""
    return tag("svg", tag("title", title), *children, role="img", aria_label=title, **attributes)


def bar(drawn: Bar) -> Markup:
    """Return a horizontal bar, the removed share filled."""
    size = {"y": 0, "height": 8}
    whole = tag("rect", x=0, width=100, class_="rest", **size)
    cut = tag("rect", x=0, width=100 * drawn.share, class_="cut", **size)
    title = f"{percent(drawn.share)} removed"
    return picture(title, whole, cut, class_="bar", viewBox="0 0 100 8", preserveAspectRatio="none")


def span(drawn: Span) -> Markup:
    """Return two rates with their intervals on one scale from 0 to 100 %."""
    scale = tag("line", x1=0, x2=100, y1=10, y2=10, class_="axis")
    pairs = ((drawn.before, "before", 6), (drawn.after, "after", 14))
    shown = [(value, name, y) for value, name, y in pairs if value is not None]
    marks = [mark for value, name, y in shown for mark in _interval(value, name, y)]
    title = "; ".join(f"{name} {rate(value)}" if len(shown) > 1 else rate(value) for value, name, _ in shown)
    return picture(title, scale, *marks, class_="span", viewBox="0 0 100 20", preserveAspectRatio="none")


def _interval(value: Mapping[str, Any], name: str, y: float) -> tuple[Markup, Markup]:
    # A line of no length with round caps is a dot that the stretched view box does not distort.
    centre = 100 * value["value"]
    return (
        tag("line", x1=100 * value["low"], x2=100 * value["high"], y1=y, y2=y, class_=f"{name} range"),
        tag("line", x1=centre, x2=centre, y1=y, y2=y, class_=f"{name} dot"),
    )


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``, larger.
        start: Pixel.
        end: Pixel.
        most: About how many ticks there is room for.
        share: Whether values are shares, to be written in percent.
    """

    low: float
    high: float
    start: float
    end: float
    most: int = 6
    share: bool = True

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values along the axis."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [i * self.step for i in range(first, last + 1)]

    @property
    def step(self) -> float:
        """Distance of the ticks."""
        return _round_step((self.high - self.low) / self.most)

    def label(self, tick: float) -> str:
        """Return how a tick is written: no more decimals than tell it from the next."""
        factor = 100 if self.share else 1
        value, step = factor * tick, factor * self.step
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if decimals > 6 or abs(value) >= 1e15:
            text = f"{value:.3g}"
        else:
            text = human(value) if step >= 1000 else f"{value:,.{decimals}f}"
        return text.replace("-", "\N{MINUS SIGN}") + " %" * self.share


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
    ordered = [step["amount"] for step in path] == [
        step["amount"] for step in steps
    ]  # else each cut is another, not a larger one
    rates = [step["holdout"] for step in steps]
    bottom = math.floor(10 * min(min(r["low"], r["value"]) for r in rates)) / 10
    top = math.ceil(10 * max(max(r["high"], r["value"]) for r in rates)) / 10
    x = Axis(0.0, max(steps[-1]["amount"], 0.01), LEFT, RIGHT)
    y = Axis(min(bottom, top - 0.1), top, BOTTOM, TOP) if top > 0 else Axis(0.0, 0.1, BOTTOM, TOP)
    across = [x(step["amount"]) for step in steps]
    line = [(a, y(r["value"])) for a, r in zip(across, rates, strict=True)]
    if ordered:
        band = [(a, y(r["high"])) for a, r in zip(across, rates, strict=True)]
        band += [(a, y(r["low"])) for a, r in reversed(list(zip(across, rates, strict=True)))]
        drawn = [tag("polygon", points=joined(band), class_="band"), tag("polyline", points=joined(line), class_="line")]
    else:
        drawn = [
            tag("line", x1=a, x2=a, y1=y(r["low"]), y2=y(r["high"]), class_="range") for a, r in zip(across, rates, strict=True)
        ]
    dots = [_dot(point, step, removed) for point, step in zip(line, steps, strict=True)]
    return picture(
        "Accuracy on the hold-out against the share cut, with 95 % intervals",
        *grid(x, y, "share cut"),
        *drawn,
        *dots,
        class_="curve",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
    )


def joined(spots: Sequence[Point]) -> str:
    """Return points as an attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


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


def grid(x: Axis, y: Axis, label: str) -> list[Markup]:
    """Return both axes with their ticks and lines, and what goes along the horizontal one."""
    left, right, bottom = x.start, x.end, y.start
    marks = [tag("line", x1=left, x2=right, y1=y(v), y2=y(v), class_="grid") for v in y.ticks()]
    marks += [tag("text", y.label(v), x=left - 8, y=y(v) + 4, text_anchor="end") for v in y.ticks()]
    marks += [tag("line", x1=x(v), x2=x(v), y1=bottom, y2=bottom + 5, class_="axis") for v in x.ticks()]
    marks += [tag("text", x.label(v), x=x(v), y=bottom + 20, text_anchor="middle") for v in x.ticks()]
    marks.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    marks.append(tag("text", label, x=right, y=bottom + 42, text_anchor="end", class_="label"))
    return marks


def chart(points: Sequence[Point], name: str, title: str, along: tuple[str, str]) -> Markup:
    """Return a small chart of one number over the course of learning.

    Args:
        points: Where it stood when, in order, two at least.
        name: Of the number, in the history.
        title: Of the number, for people.
        along: Name and title of what goes along the horizontal axis.
    """
    width, height = SMALL
    x = _axis([at for at, _ in points], LEFT, width - 12, 5, along[0] in SHARES)
    y = _rounded(_axis([value for _, value in points], height - 48, 10, 4, name in SHARES))
    line = [(x(at), y(value)) for at, value in points]
    dots = [
        tag("circle", tag("title", f"{learned(name, value)} at {learned(along[0], at)}"), cx=a, cy=b, r=2, class_="point")
        for (at, value), (a, b) in zip(points, line, strict=True)
    ]
    return picture(
        clip(f"{title} against {along[1].lower()}", 200),
        *grid(x, y, clip(along[1].lower(), 40)),
        tag("polyline", points=joined(line), class_="line"),
        *(dots if len(dots) <= DOTS else ()),
        class_="chart",
        viewBox=f"0 0 {width} {height}",
    )


def _axis(values: Sequence[float], start: float, end: float, most: int, share: bool) -> Axis:
    """Return an axis that holds the values; where they are all but equal, it is longer, so that ticks stay short."""
    low, high = float(min(values)), float(max(values))
    size = max(abs(low), abs(high))
    least = 0.005 * size if size > 1e-9 else 0.01 if share else 1.0
    room = max(0.0, least - (high - low)) / 2
    return Axis(low - room, high + room, start, end, most, share)


def _rounded(axis: Axis) -> Axis:
    """Return an axis that is longer by what takes it from tick to tick."""
    low, high = math.floor(axis.low / axis.step + 1e-9), math.ceil(axis.high / axis.step - 1e-9)
    return replace(axis, low=low * axis.step, high=high * axis.step, most=max(1, high - low))


def neurons(view: View) -> Markup:
    """Return the graph of a layer's neurons: kept ones round, cut ones square on a corner."""
    at = view.layout()
    x = _axis([a for a, _ in at.values()], 10, SQUARE - 10, 1, False)
    y = _axis([b for _, b in at.values()], 10, SQUARE - 10, 1, False)
    spots = {node: (round(x(a), 1), round(y(b), 1)) for node, (a, b) in at.items()}
    size = 5 if len(spots) <= 64 else 4
    links: dict[bool, list[str]] = {False: [], True: []}
    for i, j in view.edges:
        (a, b), (c, d) = spots[i], spots[j]
        links[i in view.cut or j in view.cut].append(f"M{a} {b}L{c} {d}")
    paths = [tag("path", d="".join(drawn), class_="link near" if near else "link") for near, drawn in links.items() if drawn]
    marks = [
        _neuron(node, spot, node in view.cut, size) for node, spot in sorted(spots.items(), key=lambda s: s[0] in view.cut)
    ]
    return picture(clip(f"Graph: {view.caption}", 400), *paths, *marks, class_="graph", viewBox=f"0 0 {SQUARE} {SQUARE}")


def _neuron(number: int, at: Point, cut: bool, size: int) -> Markup:
    title = tag("title", f"neuron {number}, {'cut' if cut else 'kept'}")
    if not cut:
        return tag("circle", title, cx=at[0], cy=at[1], r=size - 1, class_="kept")
    corner, turned = size + 1.5, f"M{at[0]} {at[1]}"
    turned += f"m0 {-corner}l{corner} {corner}l{-corner} {corner}l{-corner} {-corner}z"
    return tag("path", title, d=turned, class_="gone")
