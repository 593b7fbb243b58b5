"""Make the tables and the picture of docs/compression.md from the tables of the GAP plans.

    python scripts/compression_page.py          # reads results/gap*/cells.csv

Writes ``results/gap/summary.md`` and ``docs/gap.svg``. Needs matplotlib.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs"
ROUNDED = ", 8 bit"
AGAIN = "On another network (share 0.8 and random 3x were added after a look at it)"
ROOM = 40, 88  # clean accuracy between which marks have room for names
FAMILIES = {  # start of a label -> name, colour, marker
    "none": ("uncompressed", "#1d2320", "s"),
    "8 bit alone": ("uncompressed", "#1d2320", "s"),
    "random": ("random", "#85877f", "o"),
    "one ranking (score=random": ("random", "#85877f", "o"),
    "by layer (score=random": ("random, by layer", "#85877f", "^"),
    "one ranking": ("other scores", "#2f7ebc", "o"),
    "by layer": ("other scores, by layer", "#2f7ebc", "^"),
    "GAP": ("GAP", "#c8382e", "o"),
    "redrawn late": ("redrawn late", "#17695c", "x"),
    "redrawn": ("redrawn early (ours)", "#17695c", "D"),
}
RATES = {
    "transfer_parent": "of its parent",
    "transfer_other": "of another ResNet-20",
    "transfer_resnet_56": "of a ResNet-56",
    "transfer_twin": "of its twin",
    "worst_transfer": "worst of these",
    "white_box": "white box",
    "to_parent": "parent, under its",
}
Line = Mapping[str, str]


def read(name: str) -> list[Line]:
    """Return the lines of a plan's table that are done; none if it was not run."""
    path = RESULTS / name / "cells.csv"
    lines = csv.DictReader(path.read_text("utf-8").splitlines()) if path.exists() else []
    return [line for line in lines if line["state"] == "done"]


def rate(line: Line, name: str) -> float | None:
    """Return one rate in percent."""
    return 100 * float(line[name]) if line.get(name) else None


def interval(line: Line, name: str) -> str:
    """Return one rate in percent with its interval."""
    if not line.get(name):
        return ""
    value, low, high = (100 * float(line[name + end]) for end in ("", "_low", "_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def is_random(label: str) -> bool:
    """Return whether this is random pruning in one ranking, the baseline."""
    return label.startswith(("random (", "one ranking (score=random"))


def curve(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Return clean accuracy, rising, and that under the worst transfer, of random pruning at its compressions.

    It ends at the uncompressed network, for which images of its parent are its own.
    """
    shown = {"worst_transfer": [line for line in lines if is_random(line["compress"])]}
    shown["white_box"] = [line for line in lines if line["compress"] == "none"]
    found = sorted((rate(line, "accuracy") or 0, rate(line, metric) or 0) for metric, own in shown.items() for line in own)
    return [clean for clean, _ in found], [value for _, value in found]


def beside_random(line: Line, lines: Sequence[Line]) -> float | None:
    """Return by how many points a network beats random pruning at its own clean accuracy; None below random's range."""
    clean, worst = rate(line, "accuracy"), rate(line, "worst_transfer")
    across, up = curve([other for other in lines if not other["compress"].endswith(ROUNDED)])
    if clean is None or worst is None or not across[0] <= clean <= across[-1]:
        return None
    return worst - float(np.interp(clean, across, up))


def summary(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the table of a plan in which every network has one seed."""
    metrics = [name for name in RATES if any(line.get(name) for line in lines)]
    yield row(["scheme", "clean", *(RATES[name] for name in metrics), "beyond random"])
    yield "|---" * (3 + len(metrics)) + "|"
    for line in lines:
        label = line["compress"]
        beyond = None if label in ("none", "8 bit alone") or is_random(label) else beside_random(line, lines)
        cells = [label, interval(line, "accuracy"), *(interval(line, name) for name in metrics)]
        yield row([*cells, "" if beyond is None else f"{beyond:+.1f}"])
    yield ""


def seeds(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the table of a plan with several seeds: their values side by side."""
    metrics = ["accuracy", *(name for name in RATES if any(line.get(name) for line in lines))]
    yield row(["scheme", "clean", *(RATES[name] for name in metrics[1:])])
    yield "|---" * (1 + len(metrics)) + "|"
    for label in dict.fromkeys(line["compress"] for line in lines):
        own = [line for line in lines if line["compress"] == label]
        cells = [", ".join(f"{rate(line, name):.1f}" for line in own if line.get(name)) for name in metrics]
        yield row([label, *cells])
    yield ""


def is_shown(line: Line, *, rounded: bool) -> bool:
    """Return whether a network belongs to one half of the picture and was measured."""
    return bool(line.get("worst_transfer")) and line["compress"].endswith(ROUNDED) == rounded


def draw(axes: Axes, title: str, lines: Sequence[Line], *, rounded: bool) -> None:
    """Draw worst transfer accuracy against clean accuracy, one mark per network."""
    base = [line for line in lines if is_shown(line, rounded=rounded) or line["compress"] == "none"]
    across, up = curve([line for line in lines if is_shown(line, rounded=False) or line["compress"] == "none"])
    axes.plot(across, up, color="#85877f", linewidth=1, zorder=1)
    axes.plot([0, 100], [0, 100], color="#dddddd", linewidth=0.8, zorder=0)
    for line in base:
        label = line["compress"].removesuffix(ROUNDED)
        name, color, marker = next(found for start, found in FAMILIES.items() if label.startswith(start))
        metric = "white_box" if label == "none" else "worst_transfer"
        clean, value = rate(line, "accuracy"), rate(line, metric)
        if clean is None or value is None:
            continue
        low, high = (100 * float(line[f"{metric}_{end}"]) for end in ("low", "high"))
        axes.plot([clean, clean], [low, high], color=color, linewidth=0.8, zorder=2)
        axes.plot(clean, value, marker, color=color, markersize=5, label=name, zorder=3)
        times = re.search(r"target=([\d.]+)", label)
        if name in ("GAP", "redrawn early (ours)", "random") and times and ROOM[0] < clean < ROOM[1]:
            axes.annotate(f"{times[1]}x", (clean, value), (3, 3), textcoords="offset points", fontsize=5.5, color=color)
    axes.set_title(title, fontsize=9)
    axes.set_xlim(5, 97)
    axes.set_ylim(-2, 75)
    axes.set_xlabel("right on clean images, %", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Write tables and picture."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"
    lines = read("gap")
    text = ["# Compression and transfer, all figures", "", "Rates in % with 95 % intervals; one seed.", "", *summary(lines)]
    for name, title in (("gap-finalists", "Finalists"), ("gap-fresh", AGAIN)):
        found = read(name)
        if found:
            text += [f"## {title}", "", "Seeds side by side, %.", "", *seeds(found)]
    (RESULTS / "gap" / "summary.md").write_text("\n".join(text).rstrip() + "\n", "utf-8")
    kinds = {"floating point": False, "8 bit": True}
    shown = {title: rounded for title, rounded in kinds.items() if any(map(partial(is_shown, rounded=rounded), lines))}
    figure, grid = plt.subplots(1, len(shown), figsize=(1.5 + 5 * len(shown), 4.8), sharey=True, squeeze=False)
    places = list(grid[0])
    for axes, (title, rounded) in zip(places, shown.items(), strict=True):
        draw(axes, title, lines, rounded=rounded)
    places[0].set_ylabel("right under the worst of others' images, %", fontsize=8)
    handles = {label: handle for axes in places for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=7.5, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path = DOCS / "gap.svg"
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")
    plt.close(figure)


if __name__ == "__main__":
    main()
