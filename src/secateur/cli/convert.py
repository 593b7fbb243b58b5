"""``secateur convert``: a checkpoint of any kind in, a bundle out, which nothing needs to be unpickled for."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from .console import out, say
from .files import run_folder
from .options import Flag, ModelFlags, Output, fresh

NO_MODEL_FLAGS = ModelFlags()


def convert(
    file: Path,
    /,
    *,
    output: Output = None,
    overwrite: Flag = False,
    json: Flag = False,
    model_flags: ModelFlags = NO_MODEL_FLAGS,
) -> int:
    """Write a checkpoint as a bundle: safetensors and JSON, without a pickle.

    Args:
        file: Checkpoint or Hugging Face folder.
        output: Folder to write to (default: secateur-runs/...).
        overwrite: Write into an output folder that is not empty.
        json: Print what was read as JSON on stdout.
    """
    folder = fresh(output, overwrite=overwrite) if output else None
    reading = model_flags.look(file)
    from ..models import save

    model = model_flags.load(reading)
    origin = model.origin or {}
    home = folder or run_folder("convert", [str(file)])
    save(model, home, steps=reading.facts.get("steps", ()), ancestor_sha256=origin["sha256"], overwrite=True)
    network = {"arch": model.arch, "input_shape": list(model.input_shape), "classes": len(model.classes)}
    if json:
        out(json_format.dumps({**network, "origin": origin, "bundle": str(home)}, indent=2))
    else:
        name = model.arch["name"] or model.arch["factory"]["ref"]
        out(f"{name}: {len(model.classes)} classes, images {'x'.join(map(str, model.input_shape))}, read as {origin['loader']}")
        for finding in origin["findings"]:
            say(f"{finding['severity']}: {finding['rule']}: {finding['message']}")
        say(f"written to {home}")
    return 0
