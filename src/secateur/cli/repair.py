"""``secateur repair``: a network and a little clean data in, a repaired bundle and a report out."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, check_range
from ..report import render, to_json
from .console import complain, out, progress, say
from .files import run_folder, write_result
from .options import Flag, ModelFlags, Output, RunFlags, Settings, assignments, fresh

if TYPE_CHECKING:
    from ..runs import NetworkRun
    from ..types import Result

NO_MODEL_FLAGS = ModelFlags()
NO_RUN_FLAGS = RunFlags()


def repair(
    model: Path,
    /,
    *,
    data: str,
    output: Output = None,
    method: str = "norm-pruning",
    set: Settings = None,
    test: str | None = None,
    trigger: Path | None = None,
    suspect: str | None = None,
    limit: int | None = None,
    resize: Flag = False,
    max_asr: float | None = None,
    max_acc_drop: float | None = None,
    model_flags: ModelFlags = NO_MODEL_FLAGS,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Repair a network with a little clean data and write the result as a bundle with a report.

    The method sees the network and the clean images, nothing else; --test and --trigger only measure.

    Args:
        model: Bundle folder or checkpoint.
        data: Clean images: FILE.npz, FILE.npz:train, a folder of class folders, CIFAR files, Parquet.
        output: Folder to write to (default: secateur-runs/...).
        method: Name of a repair; see "secateur list repairs".
        set: A setting of the method, name=value; may be repeated.
        test: Labelled images to measure on; without them a fifth of the clean images is held out.
        trigger: Folder of a known trigger: attack success is then measured as well.
        suspect: Possibly poisoned images, for the methods that need some ("ep").
        limit: Use at most this many clean images.
        resize: Resize all images to the size that the network takes.
        max_asr: Exit with 1 when attack success afterwards is above this rate, e.g. 0.05.
        max_acc_drop: Exit with 1 when accuracy falls by more than this, e.g. 0.03.
    """
    folder = fresh(output, overwrite=run_flags.overwrite) if output else None
    check_gates(max_asr, max_acc_drop, trigger)
    reading = model_flags.look(model)
    from .. import runs
    from ..data import load_data, load_trigger
    from ..methods import check_suspect, get, settings

    arguments = assignments(set)
    row = get("repair", method)
    settings(row, arguments)
    check_suspect(row, given=suspect is not None)
    if model.is_dir() and (model / "masks.safetensors").exists():
        say("note: the masks of an earlier repair are not held by this one: what was masked may come back")
    device = run_flags.set_up()
    network = model_flags.load(reading).to(device)
    size = network.input_shape[1:] if resize else None
    with progress(f"repairing with {method}", show=run_flags.progress) as on_step:
        run = runs.repair(
            network,
            load_data(data, size=size, classes=network.classes, limit=limit),
            method=method,
            arguments=arguments,
            test=load_data(test, size=size, classes=network.classes) if test else None,
            trigger=load_trigger(trigger) if trigger else None,
            suspect=load_data(suspect, size=size, classes=network.classes) if suspect else None,
            seed=run_flags.seed,
            command=["secateur", *sys.argv[1:]],
            on_step=on_step,
            on_note=say if run_flags.progress else None,
        )
    home = folder or run_folder("repair", sys.argv[1:])
    write(
        run,
        home,
        home if folder else home / "model",
        ancestor=run.result.inputs[0]["sha256"],
        earlier=reading.facts.get("steps", ()),
    )
    show(run.result, json=run_flags.json)
    if not run_flags.quiet:
        say(f"written to {home}: open {home / 'report.html'}")
    return gates(run.result, max_asr=max_asr, max_acc_drop=max_acc_drop)


def write(
    run: NetworkRun, home: Path, bundle: Path, *, ancestor: str | None, earlier: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write bundle, record and report; ``ancestor`` is the digest of what came in, ``earlier`` its steps."""
    from ..models import save

    save(run.model, bundle, masks=run.mask, steps=[*earlier, run.step], ancestor_sha256=ancestor, overwrite=True)
    write_result(run.result, home)


def show(result: Result, *, json: bool) -> None:
    """Print a result on stdout."""
    text = to_json(result)
    out(text if json else render(json_format.loads(text), "text"))


def check_gates(max_asr: float | None, max_acc_drop: float | None, trigger: Path | None) -> None:
    """Raise `MethodError` for a gate that could never fail or never be judged."""
    if max_asr is not None:
        check_range("--max-asr", max_asr, 0, 1)
        if trigger is None:
            raise MethodError("--max-asr needs --trigger: without one attack success is not measured")
    if max_acc_drop is not None:
        check_range("--max-acc-drop", max_acc_drop, 0, 1)


def gates(result: Result, *, max_asr: float | None, max_acc_drop: float | None) -> int:
    """Return 1 when a gate failed, 0 otherwise; each failure is told."""
    failed = []
    if max_asr is not None:
        measured = result.after["attack_success"]
        if measured["value"] > max_asr:
            failed.append(f"attack success is {measured['value']:.4f}, above --max-asr {max_asr:g}")
    if max_acc_drop is not None:
        drop = result.before["accuracy"]["value"] - result.after["accuracy"]["value"]
        if drop > max_acc_drop:
            failed.append(f"accuracy fell by {drop:.4f}, more than --max-acc-drop {max_acc_drop:g}")
    for reason in failed:
        complain(f"gate failed: {reason}")
    return 1 if failed else 0
