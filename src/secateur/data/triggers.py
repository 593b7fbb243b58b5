"""Triggers on disk: ``trigger.json`` for the numbers, ``trigger.safetensors`` for the arrays; plain data, no code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..effects import build_net
from ..errors import DataError, MethodError, unknown
from ..types import Trigger
from .source import BROKEN, printable, reason, some

FORMAT = 1
MAX_FILE = 64 * 2**20
MAX_PARAMS, MAX_WORD = 64, 200
MAX_WEIGHT = 1e4

# Kind -> its tensors with their range; those of a generator are its weights.
_TENSORS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "blend": {"mask": (0, 1), "pattern": (0, 1)},
    "add": {"pattern": (-1, 1)},
    "warp": {"grid": (-1, 1)},
    "quantise": {},
    "generator": {},
}
_FIELDS = {"format", "kind", "params", "target", "sources"}


def save_trigger(trigger: Trigger, folder: str | Path) -> None:
    """Write ``trigger`` into ``folder`` (made if need be), replacing one that is there.

    Raises:
        DataError: If the trigger breaks a rule of `Trigger`.
    """
    _check(trigger)
    record = {
        "format": FORMAT,
        "kind": trigger.kind,
        "params": dict(trigger.params),
        "target": trigger.target,
        "sources": None if trigger.sources is None else list(trigger.sources),
    }
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in trigger.tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trigger.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "trigger.safetensors").write_bytes(save(tensors))


def load_trigger(folder: str | Path) -> Trigger:
    """Read the trigger in ``folder``, or in its subfolder ``trigger`` as ``secateur poison -o`` writes it.

    Raises:
        DataError: If files are missing or damaged, from a newer version, or break a rule of `Trigger`.
    """
    home = Path(folder)
    try:
        if not (home / "trigger.json").is_file() and (home / "trigger" / "trigger.json").is_file():
            home = home / "trigger"
        record = _read_record(home / "trigger.json")
        tensors = {name: _to_float(value) for name, value in load(_read(home / "trigger.safetensors")).items()}
    except (SafetensorError, *BROKEN) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise DataError(f"no readable trigger in {printable(folder)} ({why}); name a folder with trigger.json") from None
    sources = record["sources"]
    if not isinstance(record["params"], dict) or not isinstance(sources, list | None):
        raise DataError(f"in the trigger of {printable(folder)}, params must be an object and sources a list or null")
    trigger = Trigger(
        kind=record["kind"],
        params=record["params"],
        tensors=tensors,
        target=record["target"],
        sources=None if sources is None else tuple(sources),
    )
    _check(trigger)
    return trigger


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path.name} is larger than {MAX_FILE >> 20} MiB")
    return path.read_bytes()


def _read_record(path: Path) -> dict[str, Any]:
    record = json.loads(_read(path).decode("utf-8"))
    if not isinstance(record, dict) or not _is_int(record.get("format")):
        raise ValueError("trigger.json has no format number")
    if record["format"] > FORMAT:
        raise DataError(f"this trigger has format {record['format']}, newer than {FORMAT}; update secateur")
    if record["format"] < 1 or set(record) != _FIELDS:
        raise ValueError(f"trigger.json must hold exactly {', '.join(sorted(_FIELDS))}, got {some(sorted(record), 8)}")
    return record


def _to_float(value: Tensor) -> Tensor:
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"tensors must be of 16, 32 or 64 bit floats, got {value.dtype}")
    return value.float()


def _check(trigger: Trigger) -> None:
    if not isinstance(trigger.kind, str) or trigger.kind not in _TENSORS:
        raise DataError(unknown("trigger kind", printable(trigger.kind), _TENSORS))
    if len(trigger.params) > MAX_PARAMS or any(len(str(each)) > MAX_WORD for pair in trigger.params.items() for each in pair):
        raise DataError(
            f"a trigger has at most {MAX_PARAMS} parameters, with names and values of at most {MAX_WORD} characters"
        )
    for name, value in trigger.params.items():
        if type(value) not in (int, float, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise DataError(f"trigger parameter '{printable(name)}' must be a finite number or a word, got {printable(value)}")
    _check_params(trigger)
    _check_labels(trigger)
    if trigger.kind == "generator":
        _check_weights(trigger)
    else:
        _check_tensors(trigger)


def _check_params(trigger: Trigger) -> None:
    """Check the numbers that a kind cannot do without."""
    if trigger.kind == "blend":
        alpha = trigger.params.get("alpha")
        if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise DataError(f"alpha of a blend trigger must lie in [0, 1], got {printable(alpha)}")
    if trigger.kind == "quantise":
        levels, dither = trigger.params.get("levels"), trigger.params.get("dither")
        if not _is_int(levels) or not 2 <= int(levels or 0) <= 256:
            raise DataError(f"levels of a quantise trigger must be a whole number in [2, 256], got {printable(levels)}")
        if not _is_int(dither) or dither not in (0, 1):
            raise DataError(f"dither of a quantise trigger must be 0 or 1, got {printable(dither)}")


def _check_weights(trigger: Trigger) -> None:
    """Check that the tensors of a generator are the weights of the network that its numbers describe."""
    try:
        wanted = {name: tuple(value.shape) for name, value in build_net(trigger.params).state_dict().items()}
    except MethodError as error:
        raise DataError(f"in a generator trigger, {printable(error)}") from None
    given = {name: tuple(value.shape) for name, value in trigger.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        raise DataError(f"the weights of a generator trigger do not fit its network: {some(wrong, 4)}")
    for name, value in trigger.tensors.items():
        if not bool((value.abs() <= MAX_WEIGHT).all()):  # so that no sum of products overflows
            raise DataError(f"{name} of a generator trigger must hold numbers in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]")


def _check_labels(trigger: Trigger) -> None:
    classes = trigger.params.get("classes")
    known = isinstance(classes, int) and 2 <= classes <= 2**31
    if not known and (classes is not None or trigger.target == "next"):
        raise DataError(
            f"classes must be a whole number from 2 to 2**31, and given for the target 'next', got {printable(classes)}"
        )
    top = math.inf if classes is None else int(classes) - 1
    labels = list(trigger.sources or ()) + ([] if trigger.target == "next" else [trigger.target])
    bad = [label for label in labels if not _is_int(label) or not 0 <= label <= min(top, 2**31)]
    if bad:
        upper = f" and <= {top}" if classes is not None else ""
        raise DataError(f"target ('next' apart) and sources must be whole numbers >= 0{upper}, got {printable(bad[0])}")
    if trigger.sources is not None and (not trigger.sources or len(set(trigger.sources)) < len(trigger.sources)):
        raise DataError(f"sources must be different classes, at least one, got {list(trigger.sources)}; null means all")


def _check_tensors(trigger: Trigger) -> None:
    ranges = _TENSORS[trigger.kind]
    if set(trigger.tensors) != set(ranges):
        raise DataError(f"a {trigger.kind} trigger holds {', '.join(ranges)}, got {some(sorted(trigger.tensors), 8) or 'none'}")
    for name, (low, high) in ranges.items():
        _check_tensor(name, trigger.tensors[name], low, high)
    if "mask" not in ranges:
        return
    shape = trigger.tensors["pattern"].shape
    if trigger.tensors["mask"].shape not in (shape, torch.Size((1, *shape[1:]))):
        raise DataError(f"mask must be (1 or c, h, w) for a pattern {tuple(shape)}, got {tuple(trigger.tensors['mask'].shape)}")


def _check_tensor(name: str, value: Tensor, low: float, high: float) -> None:
    image = value.ndim == 3 and (value.shape[2] == 2 if name == "grid" else value.shape[0] in (1, 3))
    if value.dtype not in (torch.float32, torch.float64) or not image or not value.numel():
        shape = "(h, w, 2)" if name == "grid" else "(1 or 3, h, w)"
        raise DataError(f"{name} must be float {shape}, got {value.dtype} {tuple(value.shape)}")
    value = value.double()
    if not value.isfinite().all() or value.min() < low or value.max() > high:
        raise DataError(f"{name} must be finite and lie in [{low}, {high}], got {value.min():g}..{value.max():g}")


def _is_int(value: object) -> bool:
    return type(value) is int
