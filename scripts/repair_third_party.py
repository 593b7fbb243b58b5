"""Repair backdoored networks that others trained, and put what comes out beside what their authors report.

    python scripts/repair_third_party.py CHECKPOINTS CIFAR10.npz -o results/auto/third-party --set precision=bfloat16

CHECKPOINTS holds the authors' files: I-BAU's (github YiZeng623/I-BAU @d4bfa526) and NAD's (github bboylyg/NAD @f17b7139); their
triggers lie in ``../triggers``. CIFAR10.npz holds test_x, test_y (uint8, NHWC): 2500 test images are the clean data unless told
otherwise, the others measure. None was in the networks' training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from secateur import runs
from secateur.cli.options import literal
from secateur.data import stratified
from secateur.intake import load
from secateur.state import generator
from secateur.types import ImageSet, Trigger

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GRID = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])


def patch(last: int, values: torch.Tensor, target: int) -> Trigger:
    """Return a patch whose lower right corner lies at row and column ``last``."""
    mask, pattern = torch.zeros(1, 32, 32), torch.zeros(3, 32, 32)
    rows, columns = (slice(last + 1 - side, last + 1) for side in values.shape)
    mask[:, rows, columns], pattern[:, rows, columns] = 1, values
    return Trigger("blend", {"alpha": 1.0}, {"mask": mask, "pattern": pattern}, target)


def cases(folder: Path) -> dict[str, tuple[str, Trigger, str]]:
    """Return name -> file, trigger, and what the authors report of their own repair (accuracy / ASR)."""
    triggers = folder.parent / "triggers"
    image = {name: torch.from_numpy(_pixels(triggers / f"{name}.png")) for name in ("l0_inv", "trojan_sq")}
    mask = torch.from_numpy(np.load(triggers / "mask.npy")).float()
    return {
        "I-BAU badnets": ("ibau_badnets_8_02_ckpt.pth", patch(30, torch.ones(4, 4), 8), "83.08 / 9.36"),
        "I-BAU l0_inv": (
            "ibau_l0_inv_0_02_ckpt.pth",
            Trigger("blend", {"alpha": 1.0}, {"mask": mask, "pattern": image["l0_inv"]}, 0),
            "",
        ),
        "I-BAU trojan_sq": ("ibau_trojan_sq_2_02_ckpt.pth", Trigger("add", {}, {"pattern": image["trojan_sq"]}, 2), ""),
        "NAD grid": ("nad_backdoored_WRN-16-1_grid_t5.pth.tar", patch(31, GRID, 5), "82.12 / 3.57"),
    }


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).transpose(2, 0, 1).astype(np.float32) / 255


def main() -> None:
    """Repair each network and write its record and a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--only", nargs="*", help="part of a network's name")
    parser.add_argument("--clean", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    arrays = np.load(given.data)
    test = ImageSet(
        torch.from_numpy(arrays["test_x"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays["test_y"]).long(), CLASSES
    )
    seen, measured = stratified(test.y, [given.clean, len(test) - given.clean], generator=generator(given.seed))
    settings = {name: literal(value) for name, _, value in (text.partition("=") for text in given.set)}
    given.output.mkdir(parents=True, exist_ok=True)
    for name, (file, trigger, reported) in cases(given.checkpoints).items():
        if given.only and not any(part in name for part in given.only):
            continue
        run = runs.repair(
            load(given.checkpoints / file),
            test.subset(seen),
            method=given.method,
            arguments=settings,
            test=test.subset(measured),
            trigger=trigger,
            seed=given.seed,
        )
        before, after, notes = run.result.before, run.result.after, run.result.details["notes"]
        row = {
            "network": name,
            "method": run.result.method,
            "before": {key: before[key] for key in ("accuracy", "attack_success", "triggered_accuracy")},
            "after": {key: after[key] for key in ("accuracy", "attack_success", "triggered_accuracy")},
            "reported": reported,
            "seconds": round(run.result.cost["seconds"]),
            "notes": notes,
        }
        (given.output / f"{given.method} {name}.json".replace(" ", "-")).write_text(json.dumps(row, indent=1) + "\n", "utf-8")
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(given.output.glob("*.json"))]
    (given.output / "table.md").write_text(table(rows), "utf-8")


def table(rows: list[dict]) -> str:
    """Return the records as a Markdown table; every rate in per cent with its 95 % interval."""
    head = (
        "| network | method | before: accuracy / ASR | after: accuracy | ASR | triggered accuracy | authors' repair | minutes |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        before, after = row["before"], row["after"]
        rates = " | ".join(_percent(after[key]) for key in ("accuracy", "attack_success", "triggered_accuracy"))
        first = f"{100 * before['accuracy']['value']:.2f} / {100 * before['attack_success']['value']:.2f}"
        cells = [
            row["network"],
            f"{row['method']['name']} {row['method']['version']}",
            first,
            rates,
            row["reported"] or "-",
            f"{row['seconds'] / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(rate: dict) -> str:
    return f"{100 * rate['value']:.2f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


if __name__ == "__main__":
    main()
