"""Attack a network edited in the ways of Kahsolt/adversarial-prune: as its author did, and by attacks made against each edit.

    python scripts/weight_edits.py --model resnet20.th --arch resnet20 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
        --data cifar10.npz:test --limit 1000 --attack published --attack strong -o results/weight-edits/resnet20

Writes ``cells.csv``, one line per edit and attack, and ``provenance.json``; lines that are there are not computed again.
With ``--stages`` writes ``stages.csv`` in place of it: how far the feature maps of the unedited network move at each stage.

*published*: Linf PGD, eps 0.03, step 0.001, 10 steps, random start, rounded to 8 bits, on all images with their true labels,
through the edited network itself; for ``int8``, as the author has it, made on the network in floating point. *strong*: PGD
with restarts on cross-entropy and on DLR, through the edit's adaptive forwards, then Square; an image counts as broken when any
of them changes the clean answer, away from which they go: for an image that is answered rightly that is the true label. A
network that draws is judged by the mean of the probabilities of ten draws.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.attack import pgd, square
from secateur.attack.losses import DLR_CLASSES, Aim
from secateur.attack.network import opened
from secateur.cli.options import ModelFlags
from secateur.compress import quantise
from secateur.data import load_data
from secateur.measure import layer_study
from secateur.measure.robustness import rates
from secateur.models import Classifier
from secateur.prune import (
    Edited,
    Resampled,
    adaptive,
    adaptives,
    clamp,
    clean_bounds,
    edit_activations,
    noise,
    round_activations,
    sparsify,
)
from secateur.state import evaluating, generator, seeded
from secateur.types import ImageSet, to_float

EPS, STEP, STEPS = 0.03, 0.001, 10
FEWER = 3  # of the published attack's steps
STUDIED = 200  # images of which the stages are looked at
INT8 = "int8"
RATES = "clean_accuracy", "remnant_accuracy", "strict_attack_success", "prediction_change_rate"
Make = Callable[[nn.Module, ImageSet], Edited]


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, beside network and data."""

    limit: int
    calibration: int
    seed: int
    steps: int
    restarts: int
    queries: int
    batch_size: int


def rows(seed: int) -> dict[str, Make]:
    """Return name -> edit of each row; feature maps are clamped to what the calibration images need."""
    made: dict[str, Make] = {"none": lambda model, _: Edited(model, 0.0, adaptive(model))}
    for below in (1e-3, 7e-3, 1e-2, 2e-2, 5e-2):
        made[f"E={below:g}"] = lambda model, _, e=below: sparsify(model, below=e)
    for deviations in (7, 5, 3):
        for which in ("not-normal", "all"):
            made[f"S={deviations} {which}"] = lambda model, _, s=deviations, w=which: clamp(model, deviations=s, which=w)
    for radius in (1e-3, 1e-2, 1e-1):
        for kind in ("fixed", "resampled"):
            made[f"R={radius:g} {kind}"] = partial(_noisy, radius=radius, resampled=kind == "resampled", seed=seed)
    for decimals in (2, 1, 0):
        made[f"round={decimals}"] = lambda model, _, n=decimals: round_activations(model, decimals=n)
    for deviations in (5, 3, 2):
        made[f"clamp={deviations}std"] = partial(_clamped, deviations=deviations)
    for quantile in (1.0, 0.999, 0.99):
        made[f"clamp=q{quantile:g}"] = partial(_clamped, quantile=quantile)
    made[INT8] = _rounded
    return made


def _noisy(model: nn.Module, _: ImageSet, *, radius: float, resampled: bool, seed: int) -> Edited:
    return noise(model, radius=radius, resampled=resampled, generator=generator(seed))


def _clamped(model: nn.Module, clean: ImageSet, **bounds: float) -> Edited:
    return edit_activations(model, clean_bounds(model, clean, **bounds))  # type: ignore[arg-type]


def _rounded(model: nn.Module, clean: ImageSet) -> Edited:
    assert isinstance(model, Classifier)
    rounded = quantise(model, clean)
    return Edited(rounded, 1.0, adaptive(rounded))


def answers(edited: Edited, x: Tensor, size: int, seed: int = 1) -> Tensor:
    """Return predicted classes, int64 ``(n,)``; of a network that draws, by the mean of the probabilities of its draws."""
    drawn = edited.forward if isinstance(edited.model, Resampled) else None
    with evaluating(edited.model), torch.no_grad(), seeded(generator(seed)):
        found = []
        for part in x.split(size):
            logits = edited.model(part) if drawn is None else drawn(edited.model, part)
            found.append((logits.softmax(dim=2).mean(dim=0) if logits.ndim == 3 else logits).argmax(dim=1))
    return torch.cat(found)


def published(edited: Edited, x: Tensor, y: Tensor, given: Settings, *, steps: int = STEPS) -> Tensor:
    """Return images attacked as the author's code has it: last points, rounded to 8 bits, perhaps beyond eps."""
    draw, found = generator(given.seed), []
    with opened(edited.model, x[: given.batch_size], forward=None, passes=steps * len(x), generator=draw) as network:
        for images, labels in zip(x.split(given.batch_size), y.split(given.batch_size), strict=True):
            points = (images + EPS * (2 * torch.rand(images.shape, generator=draw) - 1)).clamp(0, 1)
            for step in range(steps):
                _, _, slope = network.slope(points, labels, Aim("cross-entropy"), first=step == 0)
                points = (images + (points + STEP * slope.sign() - images).clamp(-EPS, EPS)).clamp(0, 1)
            found.append((points * 255).round() / 255)
    return torch.cat(found)


def strong(edited: Edited, x: Tensor, clean: Tensor, given: Settings, *, classes: int) -> tuple[Tensor, str]:
    """Return which answers some attack changes, and how many each attack had changed, counted on.

    Args:
        edited: The network and its adaptive forward.
        x: Images.
        clean: Its answers to them.
        given: Steps, restarts, queries.
        classes: How many; DLR needs four, the margin takes its place.
    """
    left, told = torch.ones(len(x), dtype=torch.bool), []
    forwards = [(name or "adaptive", forward) for name, forward in adaptives(edited.model).items()]
    common = {"eps": EPS, "batch_size": given.batch_size}
    climbing = {"steps": given.steps, "restarts": given.restarts, "drop_broken": True}
    attacks = [
        (f"pgd {loss} {name}", partial(pgd, loss=loss, forward=forward, **climbing, **common))
        for loss in ("cross-entropy", "dlr" if classes >= DLR_CLASSES else "margin")
        for name, forward in forwards
    ]
    attacks.append(("square", partial(square, queries=given.queries, forward=forwards[0][1], **common)))
    for number, (name, attack) in enumerate(attacks):
        where = left.nonzero().flatten()
        if len(where):
            adversarial = attack(edited.model, x[where], clean[where], generator=generator(given.seed + number))
            left[where] = answers(edited, adversarial, given.batch_size) == clean[where]
        told.append(f"{name} {len(x) - int(left.sum())}")
    return ~left, "; ".join(told)


def one(name: str, edited: Edited, source: Edited, images: ImageSet, kind: str, given: Settings) -> dict[str, object]:
    """Return one line of the table; published attacks are made on ``source``."""
    start, x, y = time.perf_counter(), to_float(images.x), images.y
    clean, parts = answers(edited, x, given.batch_size), ""
    if kind == "published":
        attacked = answers(edited, published(source, x, y, given), given.batch_size)
    else:
        broken, parts = strong(edited, x, clean, given, classes=len(images.classes))
        attacked = torch.where(broken, -1, clean)  # worst case: -1 is no class
    line: dict[str, object] = {"edit": name, "attack": kind, "changed": f"{edited.changed:.6f}", "n": len(y)}
    found = rates(y, clean, attacked)
    for key in RATES:
        rate = getattr(found, key)
        cells = ("", "", "", "") if rate is None else (*(f"{v:.4f}" for v in (rate.value, rate.low, rate.high)), rate.n)
        line |= dict(zip((key, f"{key}_low", f"{key}_high", f"{key}_n"), cells, strict=True))
    return line | {"changed_answers_after": parts, "seconds": f"{time.perf_counter() - start:.1f}"}


def stage_lines(model: nn.Module, images: ImageSet, given: Settings) -> list[dict[str, object]]:
    """Return how far the feature maps move at the end of each stage: under the random start alone, and under attacks."""
    x, y = to_float(images.x[:STUDIED]), images.y[:STUDIED]
    whole = Edited(model, 0.0, adaptive(model))
    climbed = pgd(model, x, y, eps=EPS, steps=given.steps, batch_size=given.batch_size, generator=generator(given.seed))
    attacked = {
        "random start": published(whole, x, y, given, steps=0),
        f"published, {FEWER} of its steps": published(whole, x, y, given, steps=FEWER),
        "published": published(whole, x, y, given),
        f"pgd, {given.steps} steps": (climbed * 255).round() / 255,
    }
    lines: list[dict[str, object]] = []
    for name, moved in attacked.items():
        wrong = float((answers(whole, moved, given.batch_size) != y).double().mean())
        for shift in layer_study(model, x, moved, batch_size=given.batch_size):
            l2 = ("", "", "") if shift.l2 is None else (f"{v:.4f}" for v in (shift.l2.value, shift.l2.low, shift.l2.high))
            line: dict[str, object] = {"images": name, "n": len(x), "wrong": f"{wrong:.4f}", "stage": shift.stage}
            line |= dict(zip(("l2", "l2_low", "l2_high"), l2, strict=True))
            lines.append(line | {"largest": "" if shift.largest is None else f"{shift.largest:.4f}"})
    return lines


def pick(data: ImageSet, given: Settings) -> tuple[ImageSet, ImageSet]:
    """Return images to attack and others to calibrate clamps with (the same, where there are not enough)."""
    order = torch.randperm(len(data), generator=generator(given.seed))
    attacked, rest = order[: given.limit], order[given.limit : given.limit + given.calibration]
    return data.subset(attacked), data.subset(rest if len(rest) == given.calibration else attacked)


def write(path: Path, lines: list[Mapping[str, object]]) -> None:
    """Write all lines in place of what is there."""
    partial_file = path.with_suffix(".partial")
    with partial_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    partial_file.replace(path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    for flag in ("--arch", "--mean", "--std", "--input-size"):
        parser.add_argument(flag)
    parser.add_argument(
        "--attack", action="append", choices=("published", "strong"), help="may be repeated; default: published"
    )
    parser.add_argument("--stages", action="store_true", help="how far each stage moves instead (stages.csv)")
    parser.add_argument("--rows", help="names separated by commas; default: all")
    parser.add_argument("--limit", type=int, default=1000, help="images to attack")
    parser.add_argument("--calibration", type=int, default=500, help="other images, to which feature maps are clamped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    """Compute the lines that are missing."""
    args = parse()
    flags = ModelFlags(arch=args.arch, mean=args.mean, std=args.std, input_size=args.input_size)
    reading = flags.look(args.model)
    model = flags.load(reading)
    given = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    size = model.input_shape[1:] if args.input_size else None
    images, calibration = pick(load_data(args.data, size=size, classes=len(model.classes)), given)
    known = rows(given.seed)
    wanted = [name.strip() for name in args.rows.split(",")] if args.rows else list(known)
    if strangers := [name for name in wanted if name not in known]:
        raise SystemExit(f"unknown row '{strangers[0]}'; choose from: {', '.join(known)}")
    provenance = {
        "model": {**(model.origin or {}), "path": args.model.name},
        "data": {
            "path": Path(args.data).name,
            "n": len(images),
            "sha256": images.sha256,
            "calibration_sha256": calibration.sha256,
        },
        "settings": asdict(given),
        "versions": {"secateur": __version__, "torch": torch.__version__},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    where, table = args.output / "provenance.json", args.output / "cells.csv"
    text = json.dumps(provenance, indent=1, sort_keys=True, default=str) + "\n"
    if where.exists() and where.read_text("utf-8") != text:
        raise SystemExit(f"{args.output} holds figures of other settings: name another folder")
    where.write_text(text, "utf-8")
    if args.stages:
        write(args.output / "stages.csv", stage_lines(model, images, given))
        return
    lines: list[Mapping[str, object]] = list(csv.DictReader(table.read_text("utf-8").splitlines())) if table.exists() else []
    done = {(line["edit"], line["attack"]) for line in lines}
    for kind in args.attack or ["published"]:
        for name in wanted:
            if (name, kind) not in done:
                edited = known[name](model, calibration)
                source = known["none"](model, calibration) if name == INT8 else edited
                lines.append(one(name, edited, source, images, kind, given))
                write(table, lines)
                shown = ("edit", "attack", *RATES[:2], "seconds")
                print(" ".join(f"{key}={lines[-1][key]}" for key in shown), flush=True)


if __name__ == "__main__":
    main()
