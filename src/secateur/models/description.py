"""The file ``arch.json`` of a bundle: what it may hold, checked field by field, since nobody vouches for it."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..architectures import is_external
from ..errors import ModelError, unknown
from .files import read_bytes
from .quant import check_quant
from .wrappers import check_wrappers

FORMAT = 1
MAX_BYTES = 16 * 2**20
TEXT = "at most 1000 printable characters"
REQUIRED = ("format", "arch", "input", "classes")
OPTIONAL = {"channels": {}, "masks": None, "wrappers": [], "quant": None, "steps": [], "ancestor_sha256": None}


def read_arch(folder: str | Path) -> dict[str, Any]:
    """Return the checked description of a bundle, every field present.

    Raises:
        ModelError: There is no ``arch.json``, it is of a newer format, or a field is not what it must be.
    """
    path = Path(folder) / "arch.json"
    try:
        content = json.loads(read_bytes(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON") from error
    return check_arch(content)


def check_arch(content: Any) -> dict[str, Any]:
    """Return ``content`` with the optional fields filled in; `ModelError` names the first field that is wrong."""
    fields = _record("the file", content)
    version = fields.get("format", 0)
    _require(type(version) is int and 0 < version < 2**31, "format", "a number from 1 up")
    if version > FORMAT:
        raise ModelError(f"arch.json: format {version} is newer than this version of secateur reads ({FORMAT}): update it")
    for key in fields:
        if key not in REQUIRED and key not in OPTIONAL:
            raise ModelError(f"arch.json: {unknown('field', _short(key), (*REQUIRED, *OPTIONAL))}")
    fields = {**deepcopy(OPTIONAL), **fields}
    _check_network(_record("arch", fields.get("arch")))
    _check_input(_record("input", fields.get("input")))
    _check_classes(fields.get("classes"))
    for site, kept in _record("channels", fields["channels"]).items():
        _check_kept(site, kept)
    _require(fields["masks"] in (None, "masks.safetensors"), "masks", "null or 'masks.safetensors'")
    _require(isinstance(fields["wrappers"], list), "wrappers", "a list")
    _require(fields["quant"] is None or isinstance(fields["quant"], dict), "quant", "null or an object")
    try:
        fields["wrappers"] = check_wrappers(fields["wrappers"])
        fields["quant"] = None if fields["quant"] is None else check_quant(fields["quant"])
    except ModelError as error:
        raise ModelError(f"arch.json: {error}") from error
    _require(isinstance(fields["steps"], list), "steps", "a list")
    for step in fields["steps"]:
        _check_step(_record("steps", step))
    _require(_is_digest_or_none(fields["ancestor_sha256"]), "ancestor_sha256", "null or 64 hexadecimal digits")
    return fields


def _check_network(arch: dict[str, Any]) -> None:
    _require(set(arch) == {"name", "kwargs", "factory"}, "arch", "an object with name, kwargs and factory")
    name, factory = arch["name"], arch["factory"]
    _require((name is None) != (factory is None), "arch", "one with either a name or a factory")
    ok = name is None or _is_word(name) or (isinstance(name, str) and is_external(name))
    _require(ok, "arch.name", "a word, or one after timm: or torchvision:")
    for key, value in _record("arch.kwargs", arch["kwargs"]).items():
        ok = type(value) in (bool, float) or (type(value) is int and abs(value) < 2**31) or _is_word(value)
        _require(ok and _is_word(key), "arch.kwargs", "an object of numbers and words")
    if factory is not None:
        keys = set(_record("arch.factory", factory))
        _require(keys == {"ref", "sha256"}, "arch.factory", "an object with ref and sha256")
        _require(_is_text(factory["ref"]), "arch.factory.ref", TEXT)
        _require(_is_digest_or_none(factory["sha256"]), "arch.factory.sha256", "null or 64 hexadecimal digits")


def _check_input(fields: dict[str, Any]) -> None:
    _require(set(fields) == {"shape", "mean", "std"}, "input", "an object with shape, mean and std")
    shape = fields["shape"]
    ok = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= 4096 for n in shape)
    _require(ok, "input.shape", "three numbers from 1 to 4096")
    for key, low in (("mean", -1e6), ("std", 1e-6)):
        values = fields[key]
        ok = isinstance(values, list) and len(values) == shape[0] and all(_in_range(v, low, 1e6) for v in values)
        _require(ok, f"input.{key}", f"{shape[0]} numbers in [{low:g}, 1e+06], one per channel")


def _check_classes(classes: Any) -> None:
    ok = isinstance(classes, list) and 0 < len(classes) <= 65536
    _require(ok and all(map(_is_text, classes)), "classes", f"a list of 1 to 65536 names, each {TEXT}")


def _check_kept(site: str, kept: Any) -> None:
    ok = _is_text(site) and isinstance(kept, list) and kept and all(type(i) is int and 0 <= i < 2**31 for i in kept)
    ok = ok and all(a < b for a, b in pairwise(kept))
    _require(bool(ok), "channels", "lists of indices by site, each index above the last")


def _check_step(step: dict[str, Any]) -> None:
    _require(set(step) == {"method", "version", "args"}, "steps", "objects with method, version and args")
    _require(_is_text(step["method"]), "steps: method", TEXT)
    _require(type(step["version"]) is int, "steps: version", "a whole number")
    _record("steps: args", step["args"])


def _record(field: str, value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), field, "an object")
    return value


def _require(ok: bool, field: str, rule: str) -> None:
    if not ok:
        raise ModelError(f"arch.json: {field} must be {rule}")


def _in_range(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w{1,60}", value, re.ASCII) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _is_digest_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None)


def _short(text: str) -> str:
    return ascii(text)[1:-1][:60]
