"""``secateur attack``: what evasion attacks leave of a network's accuracy, and whether that figure means anything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ..errors import MethodError, check_range
from ..report import render, to_json
from .console import complain, out, progress, say
from .files import run_folder, write_result
from .options import Flag, ModelFlags, Output, RunFlags, Settings, assignments, budget, fresh

if TYPE_CHECKING:
    from ..intake import Reading
    from ..intake.findings import Severity
    from ..types import Result

NO_MODEL_FLAGS = ModelFlags()
NO_RUN_FLAGS = RunFlags()
Methods = Annotated[list[str] | None, Parameter(name="--method", negative=())]


def attack(
    model: Path,
    /,
    *,
    data: str,
    eps: str,
    norm: Literal["linf", "l2"] = "linf",
    method: Methods = None,
    set: Settings = None,
    limit: int = 1000,
    surrogate: Path | None = None,
    train: str | None = None,
    sweep: str | None = None,
    study: Flag = False,
    resize: Flag = False,
    min_robust: float | None = None,
    fail_on: Literal["info", "low", "medium", "high", "critical"] = "high",
    format: Literal["text", "json", "sarif", "md"] = "text",
    output: Output = None,
    model_flags: ModelFlags = NO_MODEL_FLAGS,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Attack a network, and check whether the figure that comes out can be trusted.

    Default attacks: PGD on cross-entropy (10 steps, 2 starts) and on the margin (20 steps), and Square (200 queries). For a
    ResNet-20 and 1000 images of 32 x 32 all of it takes 3 to 6 minutes of one CPU core. Exits with 1 when a check failed.

    Args:
        model: Bundle folder or checkpoint.
        data: Test images: FILE.npz, FILE.npz:test, a folder of class folders, CIFAR files, Parquet.
        eps: Largest change of each pixel value (linf) or length of the change (l2), for pixels from 0 to 1: 8/255 or 0.03.
        norm: What eps bounds: linf or l2.
        method: An evasion attack in place of the default ones; see "secateur list evasions". May be repeated.
        set: A setting of all attacks that have it, name=value, or of one, method.name=value; may be repeated.
        limit: Attack at most this many images, with the class shares of the whole.
        surrogate: Another network, such as the one before repair: are its images a danger to this one?
        train: Images that the network was trained on, to tell whether it is measured on them.
        sweep: Budgets of the curve, 2/255,4/255,... (default: 1/4 to 4 times eps), or "none".
        study: Show what the first attack does inside the network, stage by stage, on at most 100 images.
        resize: Resize all images to the size that the network takes.
        min_robust: Exit with 1 unless robust accuracy is established and at least this rate, e.g. 0.4.
        fail_on: The lowest severity of a finding that makes the exit code 1: high is a failed check, medium a warning.
        format: How to print the result; sarif has the findings for code-scanning services. --json is --format json.
        output: Folder to write to (default: secateur-runs/...).
    """
    folder = fresh(output, overwrite=run_flags.overwrite) if output else None
    amount, curve = budget("--eps", eps), _sweep(sweep)
    if norm == "linf" and amount > 1:
        raise MethodError(
            f"eps must lie in [0, 1], got {amount:g}: pixels go from 0 to 1, so write {amount:g}/255 for grey levels"
        )
    if run_flags.json and format not in ("text", "json"):
        raise MethodError(f"--json and --format {format} are two forms of one output; give one of them")
    shape = "json" if run_flags.json else format
    if min_robust is not None:
        check_range("--min-robust", min_robust, 0, 1)
    reading = model_flags.look(model)
    other = model_flags.look(surrogate) if surrogate else None
    from .. import runs
    from ..data import load_data
    from ..runs.evading import chosen

    arguments = assignments(set)
    chosen(method or (), arguments, eps=amount, norm=norm)
    device = run_flags.set_up()
    network = _flags(model_flags, reading, other).load(reading).to(device)
    second = _flags(model_flags, other, reading).load(other).to(device) if other else None
    size = network.input_shape[1:] if resize else None
    with progress("attacking", show=run_flags.progress) as on_step:
        run = runs.attack(
            network,
            load_data(data, size=size, classes=network.classes, limit=limit),
            eps=amount,
            norm=norm,
            methods=method or (),
            arguments=arguments,
            surrogate=second,
            train=load_data(train, size=size, classes=network.classes) if train else None,
            sweep=curve,
            study=study,
            seed=run_flags.seed,
            command=["secateur", *sys.argv[1:]],
            on_step=on_step,
            on_note=say if run_flags.progress else None,
        )
    home = folder or run_folder("attack", sys.argv[1:])
    write_result(run.result, home)
    out(render(json.loads(to_json(run.result)), shape))
    if not run_flags.quiet:
        say(f"written to {home}: open {home / 'report.html'}")
    return gates(run.result, min_robust=min_robust, fail_on=fail_on)


def gates(result: Result, *, min_robust: float | None, fail_on: Severity) -> int:
    """Return 1 when a finding is at or above ``fail_on`` or the gate failed, 0 otherwise; a failed gate is told."""
    from ..intake.findings import at_least

    bad = any(at_least(finding["severity"], fail_on) for finding in result.findings)
    left = result.before["adversarial_accuracy"]["value"]
    if min_robust is not None and result.verdict != "established":
        complain("gate failed: robustness is not established, so that no rate meets --min-robust")
        return 1
    if min_robust is not None and left < min_robust:
        complain(f"gate failed: robust accuracy is at most {left:.4f}, below --min-robust {min_robust:g}")
        return 1
    return int(bad)


def _sweep(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(budget("--sweep", part) for part in text.split(","))


def _flags(flags: ModelFlags, reading: Reading, other: Reading | None) -> ModelFlags:
    """Return the flags for one of two networks: a bundle says everything itself, so that they are meant for the other one."""
    if reading.format != "bundle" or other is None or other.format == "bundle":
        return flags
    return replace(flags, arch=None, mean=None, std=None, input_size=None, classes=None)
