"""Source 1's comparison: where to prune, by which norm, and what fine-tuning adds (Mishra et al., IC3 2023).

    python results/norm-pruning/study.py run --data cifar10.npz --store FOLDER     # resumes; two workers of one thread
    python results/norm-pruning/study.py table --store FOLDER                       # writes the tables beside this script

``cifar10.npz`` holds ``train_x train_y test_x test_y`` (uint8 NHWC). Each victim is a ResNet-20 of width 8, trained on 95 % of
the training images with 10 % of them poisoned; the defender holds the other 5 %. Of these, four fifths choose the cut and heal,
and one fifth judges the row that is recommended. Test images and trigger only measure.

A pilot on one other victim per attack (another split, seed 0) set the learning rate of the fine-tuning and the drop.

THE RULE, stated before any result of this study was looked at: of all rows that prune by a norm and fine-tune, take those whose
accuracy on the judging images, averaged over the seeds, is at most 1 point below that of their victims (if there is none, the
one with the highest); among these the one that cuts the largest share of all weights, averaged over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from secateur import __version__, runs
from secateur.data import load_data
from secateur.measure import Evaluation, correct, evaluate
from secateur.models import Classifier
from secateur.poison import badnets, blended
from secateur.prune import Sentence, Until, apply_and_heal, magnitude, prune
from secateur.repair.fine_tuning import fine_tuning, healing
from secateur.state import generator
from secateur.train import Recipe, train
from secateur.types import ImageSet, Poisoning, Repaired

HOME = Path(__file__).parent
ATTACKS = {"badnets": badnets, "blended": blended}
SEEDS = (0, 1, 2)
RATE, TARGET, CLEAN, JUDGE, TEST = 0.1, 0, 0.05, 0.2, 5000
VICTIM = Recipe(epochs=10, lr=0.4, schedule="triangle", milestones=(0.2,), augment=("crop", "flip"), precision="bfloat16")
DROP = 0.1  # cut until accuracy on the clean images has fallen by this much, then heal
EPOCHS, LR = 5, 0.02
FINE_TUNING = {"fine-tuning alone": LR, "fine-tuning alone, small steps": LR / 4}
PLACES = {
    "all layers, layer-wise": ("all", "layer"),
    "all layers, global": ("all", "global"),
    "early third": ("early", "layer"),
    "middle third": ("middle", "layer"),
    "late third": ("late", "layer"),
    "last conv": ("last-conv", "layer"),
    "last layer": ("last-layer", "layer"),
}
FOR_RANDOM = ("all layers, layer-wise", "all layers, global", "late third", "last conv", "last layer")
SCORES = {"l1": magnitude.l1, "l2": magnitude.l2, "random": magnitude.random}


def cells() -> Iterator[tuple[str, str, str]]:
    """Yield ``(granularity, norm, place)``; l1 and l2 rank single weights alike, and a filter of the last layer is a class."""
    for place in PLACES:
        for norm in SCORES:
            if norm == "random" and place not in FOR_RANDOM:
                continue
            if place != "last layer":
                yield "channel", norm, place
            if norm != "l2":
                yield "weight", norm, place


def spread(y: torch.Tensor, sizes: list[int], random: torch.Generator) -> list[torch.Tensor]:
    """Draw disjoint stratified index sets, exactly as for the committed results (made before `secateur.data.stratified`)."""
    order = torch.randperm(len(y), generator=random)
    labels = y[order]
    places = torch.empty(len(y), dtype=torch.float64)
    for label, count in enumerate(labels.bincount().tolist()):
        offset = torch.rand((), generator=random, dtype=torch.float64)
        places[labels == label] = (torch.arange(count, dtype=torch.float64) + offset) / count
    parts = order[places.argsort(stable=True)][: sum(sizes)].split(sizes)
    return [part[torch.randperm(len(part), generator=random)] for part in parts]


def split(data: ImageSet, share: float, random: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split off a share."""
    size = round(share * len(data))
    first, rest = spread(data.y, [size, len(data) - size], random)
    return data.subset(first), data.subset(rest)


def sample(seed: int, data: str) -> tuple[ImageSet, ImageSet, ImageSet, ImageSet]:
    """Return the victim's training images, the defender's, the judging ones and the test images."""
    random = generator(1000 + seed)
    clean, rest = split(load_data(f"{data}:train"), CLEAN, random)
    judge, clean = split(clean, JUDGE, random)
    test = load_data(f"{data}:test")
    return rest, clean, judge, test.subset(spread(test.y, [TEST], random)[0])


def make_victim(attack: str, seed: int, data: ImageSet, folder: Path) -> tuple[Classifier, Poisoning]:
    """Train the victim, or resume where a killed run stopped."""
    random = generator(seed)
    poisoning = ATTACKS[attack](data, rate=RATE, target=TARGET, generator=random)
    network = runs.new_network(data, "resnet20", kwargs={"width": 8}, generator=random)
    victim = train(network, poisoning.data, VICTIM, generator=random, checkpoint=folder / "victim.checkpoint")
    assert isinstance(victim, Classifier)
    return victim, poisoning


def rates(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain data."""
    return {name: asdict(rate) for name, rate in vars(evaluation).items()}


def one_victim(job: tuple[str, int, str, str]) -> str:
    """Train one victim and run every cell on it; finished cells are skipped."""
    attack, seed, data, store = job
    torch.set_num_threads(1)
    folder = Path(store) / f"{attack}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rest, clean, judge, test = sample(seed, data)
    start = time.perf_counter()
    victim, poisoning = make_victim(attack, seed, rest, folder)

    def record(name: str, row: dict[str, str], repaired: Repaired, seconds: float) -> None:
        result = {
            **row,
            "attack": attack,
            "seed": seed,
            "seconds": seconds,
            "share": repaired.log.get("removed_share", 0.0),
            "of_all": _of_all(victim, repaired),
            "judge": int(correct(repaired.model, judge).sum()) / len(judge),
            **rates(evaluate(repaired.model, test, trigger=poisoning.trigger)),
        }
        temporary = folder / f".{name}.tmp"
        temporary.write_text(json.dumps(result), "utf-8")
        temporary.replace(folder / f"{name}.json")

    blank = {"granularity": "", "norm": "", "place": "", "heal": ""}
    if not (folder / "none.json").exists():
        record("none", {**blank, "name": "no repair"}, Repaired(victim, None), time.perf_counter() - start)
    for name, lr in FINE_TUNING.items():
        if not (folder / f"{name}.json").exists():
            start = time.perf_counter()
            tuned = fine_tuning(victim, clean, epochs=EPOCHS, lr=lr, generator=generator(seed))
            record(name, {**blank, "name": name, "heal": "yes"}, tuned, time.perf_counter() - start)
    for granularity, norm, place in cells():
        name = f"{granularity}-{norm}-{place}"
        if (folder / f"{name}-yes.json").exists():
            continue
        row = {"name": "pruning", "granularity": granularity, "norm": norm, "place": place}
        layers, scope = PLACES[place]
        start = time.perf_counter()
        sentence = Sentence(SCORES[norm], Until(DROP), granularity, layers, scope)  # type: ignore[arg-type]
        cut = prune(victim, clean, sentence, generator=generator(seed))
        record(f"{name}-no", {**row, "heal": "no"}, cut, time.perf_counter() - start)
        healed = apply_and_heal(victim, clean, cut.mask, heal=healing(EPOCHS, LR), generator=generator(seed))  # type: ignore[arg-type]
        record(f"{name}-yes", {**row, "heal": "yes"}, healed, time.perf_counter() - start)
    return f"{attack}, seed {seed}"


def _of_all(victim: Classifier, repaired: Repaired) -> float:
    """Return the share of all conv and linear weights that the mask silences."""
    if repaired.mask is None:
        return 0.0
    net = victim.net
    total = sum(p.numel() for n, p in net.named_parameters() if p.ndim > 1)
    keep: dict[str, torch.Tensor] = repaired.mask.keep  # type: ignore[union-attr, assignment]
    if all(name.endswith(".weight") for name in keep):
        return sum(int((~mask).sum()) for mask in keep.values()) / total
    writers = {site: net.get_submodule(site.replace("bn", "conv")).weight[0].numel() for site in keep}  # type: ignore[union-attr]
    return sum(int((~mask).sum()) * int(writers[site]) for site, mask in keep.items()) / total


def run(data: str, store: str, workers: int) -> None:
    """Run everything that is not in the store yet."""
    jobs = [(attack, seed, data, store) for seed in SEEDS for attack in ATTACKS]
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done in pool.imap_unordered(one_victim, jobs):
            print(f"{time.time() - start:7.0f} s  {done}", flush=True)


def load(store: str) -> list[dict[str, Any]]:
    """Return every cell in the store."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(Path(store).glob("*/*.json"))]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what names a row of the table."""
    return tuple(row[name] for name in ("name", "granularity", "norm", "place", "heal"))


def recommended(found: list[dict[str, Any]], attack: str) -> tuple[str, ...]:
    """Apply THE RULE of the module docstring."""
    mine = [row for row in found if row["attack"] == attack]
    before = statistics.mean(row["judge"] for row in mine if row["name"] == "no repair")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in mine:
        if row["name"] == "pruning" and row["norm"] != "random" and row["heal"] == "yes":
            groups.setdefault(key(row), []).append(row)
    judge = {name: statistics.mean(row["judge"] for row in rows) for name, rows in groups.items()}
    share = {name: statistics.mean(row["of_all"] for row in rows) for name, rows in groups.items()}
    near = [name for name in groups if judge[name] >= before - 0.01]
    return max(near, key=lambda name: share[name]) if near else max(groups, key=lambda name: judge[name])


def table(found: list[dict[str, Any]], attack: str) -> str:
    """Return one attack's table in Markdown."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        if row["attack"] == attack:
            groups.setdefault(key(row), []).append(row)
    best = recommended(found, attack)
    lines = [
        "| repair | of | by | where | cut | accuracy | ASR | worst ASR | triggered accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in groups.items():
        mark = "**" if name == best else ""
        what = name[0] if name[0] != "pruning" else ("pruning + fine-tuning" if name[4] == "yes" else "pruning")
        norm = "l1 = l2" if name[1] == "weight" and name[2] == "l1" else name[2]
        cells = [what, name[1], norm, name[3], f"{100 * statistics.mean(r['share'] for r in rows):.0f} %"]
        cells += [_spread(rows, "accuracy"), _spread(rows, "attack_success")]
        cells += [f"{100 * max(r['attack_success']['value'] for r in rows):.1f}", _spread(rows, "triggered_accuracy")]
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in cells) + " |")
    return "\n".join(lines)


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    values = [100 * row[name]["value"] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.1f} (one seed)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def write(store: str) -> None:
    """Write cells.csv, provenance.json and the tables."""
    found = sorted(load(store), key=lambda r: (r["attack"], _order(r), r["seed"]))
    fields = ["attack", "seed", "name", "granularity", "norm", "place", "heal", "share", "of_all", "judge"]
    measures = ("accuracy", "attack_success", "triggered_accuracy")
    with (HOME / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*fields, *(f"{m}{end}" for m in measures for end in ("", "_low", "_high", "_n"))])
        for row in found:
            shown = [f"{row[f]:.4f}" if isinstance(row[f], float) else row[f] for f in fields]
            for measure in measures:
                rate = row[measure]
                shown += [f"{rate['value']:.4f}", f"{rate['low']:.4f}", f"{rate['high']:.4f}", rate["n"]]
            out.writerow(shown)
    provenance = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "secateur": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads_per_worker": 1,
        "cells": len(found),
        "cpu_seconds_of_repairs": round(sum(r["seconds"] for r in found if r["name"] != "no repair")),
        "seconds_per_victim": {f"{r['attack']}-{r['seed']}": round(r["seconds"]) for r in found if r["name"] == "no repair"},
        "victim": asdict(VICTIM),
        "heal": asdict(healing(EPOCHS, LR)),
        "settings": {
            "rate": RATE,
            "target": TARGET,
            "clean": CLEAN,
            "judge": JUDGE,
            "test": TEST,
            "drop": DROP,
            "seeds": SEEDS,
        },
    }
    (HOME / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
    for attack in ATTACKS:
        (HOME / f"{attack}.md").write_text(table(found, attack) + "\n", "utf-8")
        print(f"{attack}: {recommended(found, attack)}")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ["no repair", *FINE_TUNING, "pruning"]
    places = ["", *PLACES]
    return names.index(row["name"]), places.index(row["place"]), row["granularity"], row["norm"], row["heal"]


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", default="cifar10.npz")
    parser.add_argument("--store", required=True)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.data, arguments.store, arguments.workers)
    write(arguments.store)


if __name__ == "__main__":
    main()
