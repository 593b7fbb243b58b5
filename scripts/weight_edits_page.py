"""Make the table and the pictures of docs/weight-edits.md from what `weight_edits.py` wrote.

    python scripts/weight_edits_page.py          # reads results/weight-edits/*/cells.csv and stages.csv

Writes ``results/weight-edits/table.md``, ``docs/weight-edits.svg`` and ``docs/weight-edits-stages.svg``. Needs matplotlib.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "results" / "weight-edits", ROOT / "docs"
NETWORKS = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "mobilenet": "MobileNetV1 x0.25, ImageNet",
    "squeezenet": "SqueezeNet 1.0, ImageNet",
}
# Kahsolt/adversarial-prune, ResNet-18, 1000 images: changed, clean, remnant, strict attack success, prediction change, in %,
# with the headings of the last two put right.
REPORTED: dict[str, tuple[float, float, float, float, float]] = {
    "none": (0, 91.8, 0.2, 99.78, 94.8),
    "E=0.001": (4.8, 92.0, 0.2, 99.78, 94.9),
    "E=0.007": (32.0, 92.5, 0.2, 99.78, 95.4),
    "E=0.01": (44.0, 90.7, 0.2, 99.78, 94.7),
    "E=0.02": (72.9, 37.1, 0.1, 99.73, 72.7),
    "E=0.05": (95.9, 0.1, 0.1, 0, 0.1),
    "S=7 not-normal": (0.018, 91.7, 0.2, 99.78, 94.5),
    "S=5 not-normal": (0.092, 85.9, 32.6, 63.56, 66.2),
    "S=3 not-normal": (0.93, 23.5, 7.2, 76.17, 78.6),
    "int8": (0, 91.2, 0.2, 99.78, 95.2),
    "R=0.001 fixed": (100, 91.9, 34.2, 63.44, 65.1),
    "R=0.01 fixed": (100, 87.1, 30.6, 66.13, 68.7),
    "R=0.1 fixed": (100, 0.2, 0.1, 50.0, 45.0),
}
SHOWN = "clean_accuracy", "remnant_accuracy", "strict_attack_success", "prediction_change_rate"
CLEAN, WEAKER, WEAK, STRONG = "#4d4d4d", "#8fc1e3", "#2f7ebc", "#c8382e"
Line = Mapping[str, str]
Found = dict[str, dict[tuple[str, str], Line]]


def read(name: str) -> dict[str, list[Line]]:
    """Return the lines of a table of each network that has one."""
    paths = {network: RESULTS / network / name for network in NETWORKS}
    return {
        network: list(csv.DictReader(path.read_text("utf-8").splitlines())) for network, path in paths.items() if path.exists()
    }


def percent(line: Line | None, name: str) -> str:
    """Return one rate in percent."""
    return "" if line is None or not line[name] else f"{100 * float(line[name]):.1f}"


def interval(line: Line | None, name: str) -> str:
    """Return one rate in percent with its interval."""
    if line is None or not line[name]:
        return ""
    return f"{percent(line, name)} [{percent(line, f'{name}_low')}, {percent(line, f'{name}_high')}]"


def row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def beside(found: Found) -> Iterator[str]:
    """Yield the published table with what was measured beside it."""
    yield row(["edit", "*reported*, ResNet-18", *(NETWORKS[network] for network in found)])
    yield "|---" * (2 + len(found)) + "|"
    for edit, (_, clean, remnant, success, _) in REPORTED.items():
        cells = [f"{clean:g} / {remnant:g} / {success:g}"]
        for lines in found.values():
            line = lines.get((edit, "published"))
            cells.append(" / ".join(percent(line, name) for name in SHOWN[:3]))
        yield row([edit.replace(" not-normal", "").replace(" fixed", ""), *cells])


def whole(network: str, lines: Mapping[tuple[str, str], Line]) -> Iterator[str]:
    """Yield everything that was measured on one network."""
    provenance = json.loads((RESULTS / network / "provenance.json").read_text("utf-8"))
    yield f"## {NETWORKS[network]}"
    yield ""
    yield f"{provenance['model']['path']}, {provenance['data']['n']} images; rates in % with 95 % intervals."
    yield ""
    head = ["edit", "changed", "clean", "published: remnant", "strict ASR", "change", "strong: remnant", "strict ASR"]
    yield row(head)
    yield "|---" * len(head) + "|"
    for edit in dict.fromkeys(name for name, _ in lines):
        weak, strong = lines.get((edit, "published")), lines.get((edit, "strong"))
        one = weak or strong
        assert one is not None
        cells = [edit, f"{100 * float(one['changed']):.3g}", interval(one, SHOWN[0])]
        cells += [interval(weak, SHOWN[1]), percent(weak, SHOWN[2]), percent(weak, SHOWN[3])]
        yield row([*cells, interval(strong, SHOWN[1]), percent(strong, SHOWN[2])])
    yield ""


def panel(axes: Axes, title: str, edits: Sequence[str], rates: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Draw clean accuracy and accuracy under attack of each edit, each with its interval, in %."""
    styles = {"clean": (CLEAN, "o", "none"), "published": (WEAK, "o", WEAK), "strong": (STRONG, "D", STRONG)}
    for name, points in rates.items():
        color, marker, fill = styles[name]
        for place, edit in enumerate(edits):
            if edit in points:
                value, low, high = points[edit]
                axes.plot([low, high], [place, place], color=color, linewidth=1)
                axes.plot(value, place, marker, color=color, markerfacecolor=fill, markersize=4, clip_on=False)
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(edits) - 0.5, -0.5)
    axes.set_yticks(range(len(edits)), edits, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_edits(found: Found, path: Path) -> None:
    """Draw accuracy of every edit on every network, clean and attacked, and what was reported."""
    edits = list(dict.fromkeys(edit for lines in found.values() for edit, _ in lines))
    figure, places = plt.subplots(1, 1 + len(found), figsize=(2.9 + 2.2 * (1 + len(found)), 6), sharey=True)
    reported = {name: {e: (v[i],) * 3 for e, v in REPORTED.items()} for name, i in (("clean", 1), ("published", 2))}
    panel(places[0], "reported: ResNet-18, ImageNet", edits, reported)
    for axes, (network, lines) in zip(places[1:], found.items(), strict=True):
        rates: dict[str, dict[str, tuple[float, float, float]]] = {"clean": {}, "published": {}, "strong": {}}
        for (edit, attack), line in lines.items():
            for name, key in (("clean", SHOWN[0]), (attack, SHOWN[1])):
                value, low, high = (100 * float(line[f"{key}{end}"]) for end in ("", "_low", "_high"))
                rates[name][edit] = value, low, high
        panel(axes, NETWORKS[network], edits, rates)
    for color, marker, fill, name in (
        (CLEAN, "o", "none", "clean images"),
        (WEAK, "o", WEAK, "under the published attack"),
        (STRONG, "D", STRONG, "under attacks made against the edit"),
    ):
        places[0].plot([], [], marker, color=color, markerfacecolor=fill, markersize=5, label=name)
    figure.legend(*places[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel("images answered rightly, %", fontsize=8, y=0.05)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)


def draw_stages(found: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Draw how far the feature maps move, stage by stage."""
    figure, places = plt.subplots(1, len(found), figsize=(3 * len(found), 3.6), sharey=True, squeeze=False)
    for axes, (network, lines) in zip(places[0], found.items(), strict=True):
        stages = list(dict.fromkeys(line["stage"] for line in lines))
        attacks = dict.fromkeys(line["images"] for line in lines)
        for color, name in zip((CLEAN, WEAKER, WEAK, STRONG), attacks, strict=True):
            points = [(stages.index(line["stage"]), line) for line in lines if line["images"] == name and line["l2"]]
            places_at = [at for at, _ in points]
            low, high = ([float(line[f"l2_{end}"]) for _, line in points] for end in ("low", "high"))
            axes.fill_between(places_at, low, high, color=color, alpha=0.25, linewidth=0)
            wrong = 100 * float(points[0][1]["wrong"])
            values = [float(line["l2"]) for _, line in points]
            axes.plot(places_at, values, "o-", color=color, markersize=3, linewidth=1.2, label=f"{name} ({wrong:.0f} % wrong)")
        axes.set_title(NETWORKS[network], fontsize=9)
        axes.set_yscale("log")
        axes.set_xticks(range(len(stages)), stages, fontsize=6, rotation=60 if len(stages) > 6 else 0)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.34))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    places[0][0].set_ylabel("relative shift of feature maps (L2)", fontsize=7)
    figure.tight_layout()
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture that is the same each time, on white."""
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")
    plt.close(figure)


def main() -> None:
    """Write table and pictures."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"
    found = {network: {(line["edit"], line["attack"]): line for line in lines} for network, lines in read("cells.csv").items()}
    text = [
        "# Weight and activation edits, all figures",
        "",
        *beside(found),
        "",
        "Clean / remnant / strict attack success, %.",
        "",
    ]
    for network, lines in found.items():
        text += whole(network, lines)
    (RESULTS / "table.md").write_text("\n".join(text).rstrip() + "\n", "utf-8")
    draw_edits(found, DOCS / "weight-edits.svg")
    draw_stages(read("stages.csv"), DOCS / "weight-edits-stages.svg")


if __name__ == "__main__":
    main()
