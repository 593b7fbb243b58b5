"""The drawings of a layer study: the shift of every stage on one scale, and a small histogram for each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from .inside import channels, digits, most_moved, ratio
from .parts import Record
from .svg import Axis, Point, joined, picture, tag
from .wording import percent, plain

DRAWN = 24  # stages
WIDTH, ROW, TOP = 640, 26, 6
RIGHT = 520  # where bars end at most; their names stand before them, their numbers behind
LETTER = 7.5  # width of a letter, about
SMALL = (300, 132)
NAME = 22  # characters of a stage before a bar

Multiple = tuple[str, str, Markup]  # title, what it shows, drawing


def shifts(stages: Sequence[Record]) -> Markup | None:
    """Return the relative shift of every stage with its interval, the largest marked; None where none was measured."""
    most = most_moved(stages)
    if most is None:
        return None
    top = max(max(stage["l2"]["high"], stage["l2"]["value"]) for stage in stages if stage["l2"] is not None)
    left = 20 + LETTER * max(len(_short(stage)) for stage in stages)
    x = Axis(0.0, top if top > 1e-12 else 1.0, left, RIGHT, 5, share=False)
    bottom = TOP + ROW * len(stages)
    marks = [tag("line", x1=x(v), x2=x(v), y1=TOP, y2=bottom, class_="grid") for v in x.ticks()]
    marks += [tag("text", x.label(v), x=x(v), y=bottom + 18, text_anchor="middle") for v in x.ticks()]
    rows = [mark for i, stage in enumerate(stages) for mark in _row(stage, x, TOP + ROW * i, stage is most)]
    label = tag("text", "relative shift (L2)", x=RIGHT, y=bottom + 38, text_anchor="end", class_="label")
    title = "How far the attack moves the output of each stage, relative to its own length, with 95 % intervals"
    return picture(title, *marks, *rows, label, class_="curve shifts", viewBox=f"0 0 {WIDTH} {bottom + 46}")


def _row(stage: Record, x: Axis, y: float, most: bool) -> list[Markup]:
    found, middle = stage["l2"], y + ROW / 2
    name = plain(stage["stage"])
    title = tag("title", f"{name[:200]}: {ratio(found)}")
    kind, left = "most" if most else "label", x.start
    marks = [tag("text", title, _short(stage), x=left - 10, y=middle + 4, text_anchor="end", class_=kind)]
    if found is None:
        return [*marks, tag("text", ratio(None), x=left + 6, y=middle + 4)]
    low, value, high = (min(max(x(found[key]), left), RIGHT) for key in ("low", "value", "high"))
    marks.append(tag("rect", x=left, y=y + 5, width=value - left, height=ROW - 10, class_="most" if most else "less"))
    marks.append(tag("line", x1=low, x2=high, y1=middle, y2=middle, class_="whisker"))
    marks += [tag("line", x1=at, x2=at, y1=middle - 4, y2=middle + 4, class_="whisker") for at in (low, high)]
    marks.append(tag("text", digits(found["value"]), x=RIGHT + 16, y=middle + 4, class_=kind))
    return marks


def _short(stage: Record) -> str:
    """Return the end of a stage's name, which tells it from others."""
    name = plain(stage["stage"])
    return name if len(name) <= NAME else f"...{name[3 - NAME :]}"


def maps(stages: Sequence[Record]) -> list[Multiple]:
    """Return for each stage the histograms of its feature maps, clean and under attack; of many those that move most."""
    ranked = sorted(stages, key=lambda stage: -(stage["l2"]["value"] if stage["l2"] else -math.inf))
    chosen = {id(stage) for stage in ranked[:DRAWN]}
    return [_map(stage) for stage in stages if id(stage) in chosen]


def _map(stage: Record) -> Multiple:
    name = plain(stage["stage"])[:80]
    drawing = _histogram(
        f"Feature maps of {name}, clean and under attack", stage["edges"], stage["clean"], stage["adversarial"]
    )
    told = "relative shift not measured" if stage["l2"] is None else f"relative shift {digits(stage['l2']['value'])}"
    if stage["largest"] is not None:
        told += f", largest change {percent(stage['largest'], 0)} of the range"
    if stage["moved"] and stage["channels"] > 1:
        told += f"; channels that move most: {channels({'moved': stage['moved'][:3]})}"
    return name, told, drawing


def weights(stages: Sequence[Record]) -> list[Multiple]:
    """Return for each stage the histogram of its weights, of the first `DRAWN` stages."""
    return [_weights(stage) for stage in stages[:DRAWN]]


def _weights(stage: Record) -> Multiple:
    name, n = plain(stage["stage"])[:80], sum(stage["counts"])
    told = f"{n:,} weights, standard deviation {digits(stage['std'])}"
    told += f"; {percent(stage['zeros'])} are 0" if stage["zeros"] else ""
    return name, told, _histogram(f"Weights of {name}", stage["edges"], stage["counts"])


def _histogram(title: str, edges: Sequence[float], first: Sequence[int], second: Sequence[int] | None = None) -> Markup:
    """Return counts as a filled shape, and others over them as a line; heights are logarithmic."""
    width, height = SMALL
    bottom = height - 24
    low, high = min(edges), max(edges)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(size, 1e-9):  # all but one value
        low, high = low - max(0.5, 0.01 * size), high + max(0.5, 0.01 * size)
    x = Axis(low, high, 6, width - 6, 4, share=False)
    top = math.log1p(max(max(first), max(second or (0,)), 1))
    marks = [tag("line", x1=x(v), x2=x(v), y1=bottom, y2=bottom + 4, class_="axis") for v in x.ticks()]
    marks += [tag("text", x.label(v), x=min(max(x(v), 14), width - 14), y=bottom + 18, text_anchor="middle") for v in x.ticks()]
    shape = joined([(x.start, bottom), *_steps(first, x, bottom, top), (x.end, bottom)])
    drawn = [tag("polygon", points=shape, class_="clean")]
    if second is not None:
        drawn.append(tag("polyline", points=joined(_steps(second, x, bottom, top)), class_="line"))
    axis = tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis")
    return picture(title, *drawn, axis, *marks, class_="chart multiple", viewBox=f"0 0 {width} {height}")


def _steps(counts: Sequence[int], x: Axis, bottom: float, top: float) -> list[Point]:
    """Return the outline of a histogram."""
    wide = (x.end - x.start) / len(counts)
    heights = [bottom - (bottom - 8) * math.log1p(count) / top for count in counts]
    return [(x.start + wide * (i + side), at) for i, at in enumerate(heights) for side in (0, 1)]
