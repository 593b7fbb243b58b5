"""``secateur compress``: a network and a little clean data in, a smaller bundle and a report out."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from ..errors import MethodError
from .console import progress, say
from .files import run_folder
from .options import Flag, ModelFlags, Output, RunFlags, Settings, Targets, assignments, budget, fresh
from .repair import check_gates, gates, show, write

ONNX = "model-int8.onnx"
NO_MODEL_FLAGS = ModelFlags()
NO_RUN_FLAGS = RunFlags()


def compress(
    model: Path,
    /,
    *,
    data: str,
    output: Output = None,
    method: str = "pruning",
    target: str | None = None,
    int8: Flag = False,
    bits: int | None = None,
    also: Targets = None,
    set: Settings = None,
    test: str | None = None,
    eps: str = "8/255",
    images: int = 500,
    limit: int | None = None,
    resize: Flag = False,
    max_acc_drop: float | None = None,
    model_flags: ModelFlags = NO_MODEL_FLAGS,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Compress a network with a little clean data, and say what that does to accuracy, size and robustness.

    Writes a bundle with a report: accuracy and robustness (PGD) before and after, how images made on the network before fool
    the one after and the other way round, and sizes. Of 8 bit it writes the integer file, too (model-int8.onnx). Zeros of
    single weights make no dense file smaller.

    Args:
        model: Bundle folder or checkpoint.
        data: Clean images: FILE.npz, FILE.npz:train, a folder of class folders, CIFAR files, Parquet.
        output: Folder to write to (default: secateur-runs/...).
        method: Name of a compressor; see "secateur list compressors".
        target: How many times fewer parameters: 4x, or 4.
        int8: Round weights and feature maps to 8 bit (--bits 8).
        bits: Round to so many, from 2 to 8.
        also: A further target, to be measured alike and drawn beside it, not kept; may be repeated: --also 2x --also 8x.
        set: A setting of the method, name=value; may be repeated.
        test: Labelled images to measure on; without them a fifth of the clean images is held out.
        eps: Budget of the attacks, in units of pixels that go from 0 to 1.
        images: How many images are attacked.
        limit: Use at most this many clean images.
        resize: Resize all images to the size that the network takes.
        max_acc_drop: Exit with 1 when accuracy falls by more than this, e.g. 0.03.
    """
    folder = fresh(output, overwrite=run_flags.overwrite) if output else None
    check_gates(None, max_acc_drop, None)
    times, further = _times("--target", target) if target else None, [_times("--also", each) for each in also or ()]
    amount = budget("--eps", eps)
    if int8 and bits not in (None, 8):
        raise MethodError(f"--int8 is --bits 8, got --bits {bits} besides; give one of them")
    reading = model_flags.look(model)
    from .. import runs
    from ..data import load_data
    from ..methods import get, settings

    arguments = assignments(set)
    row = get("compressor", method)
    settings(row, {**arguments, **runs.asked(row, times, 8 if int8 else bits, arguments)})
    for each in further:
        runs.asked(row, each, None)
    device = run_flags.set_up()
    network = model_flags.load(reading).to(device)
    size = network.input_shape[1:] if resize else None
    with progress(f"compressing with {method}", show=run_flags.progress) as on_step:
        run = runs.compress(
            network,
            load_data(data, size=size, classes=network.classes, limit=limit),
            method=method,
            arguments=arguments,
            target=times,
            bits=8 if int8 else bits,
            also=further,
            test=load_data(test, size=size, classes=network.classes) if test else None,
            eps=amount,
            images=images,
            seed=run_flags.seed,
            command=["secateur", *sys.argv[1:]],
            on_step=on_step,
            on_note=say if run_flags.progress else None,
        )
    home = folder or run_folder("compress", sys.argv[1:])
    bundle = home if folder else home / "model"
    write(run, home, bundle, ancestor=run.result.inputs[0]["sha256"], earlier=reading.facts.get("steps", ()))
    (home / ONNX).unlink(missing_ok=True)  # of a run that is overwritten
    if "agreement" in run.result.details["compression"].get("runtime", {}):
        from ..compress import export_onnx

        export_onnx(run.model.cpu(), home / ONNX, overwrite=True)
    show(run.result, json=run_flags.json)
    if not run_flags.quiet:
        say(f"written to {home}: open {home / 'report.html'}")
    return gates(run.result, max_asr=None, max_acc_drop=max_acc_drop)


def _times(option: str, text: str) -> float:
    """Read ``4x`` or ``4``."""
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise MethodError(f"{option} must be a number from 1 on, like 4x, got '{text}'")
    return value
