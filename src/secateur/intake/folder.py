"""A folder as Hugging Face keeps it: which files are its weights, and what its JSON files say of the network.

Everything in it is somebody else's word: sizes are bounded, fields checked, code is named and not run. Nothing is fetched.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..models.files import read_bytes
from .findings import Finding

MAX_JSON = 16 * 2**20
MAX_DEPTH = 32
MAX_FILES = 10_000
MAX_SHARDS = 1000
MAX_CLASSES = 65536
MAX_SIDE = 4096
MAX_SHOWN = 20
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
CODE_KEYS = ("auto_map", "custom_pipelines")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = ((".safetensors",), (".bin",), (".pth", ".pt"))
OTHER = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")  # what trainers leave behind
MAX_IMAGE = 1024
SETTINGS = re.compile("num_classes|in_chans|global_pool|img_size|[a-z_]*drop[a-z_]*_rate")  # of timm: read, or without effect


@dataclass(frozen=True, eq=False)
class HubFolder:
    """What a folder holds.

    Attributes:
        weights: Its weights: one file, or all shards in the order of their names.
        arch: ``timm:NAME`` when the folder says so; None when its weights have to tell.
        kwargs: Arguments for ``arch``.
        classes: Class names, in label order; None when it gives none.
        mean: Mean per channel, for images in [0, 1].
        std: Standard deviation per channel.
        input_size: Height and width of the images.
        findings: Code in the folder, and settings that name code.
        note: Why there is no ``arch`` although the folder names a network; else an empty text.
    """

    weights: tuple[Path, ...]
    arch: str | None = None
    kwargs: Mapping[str, int | str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int] | None = None
    findings: tuple[Finding, ...] = ()
    note: str = ""


def read_folder(path: str | Path) -> HubFolder:
    """Read what a Hugging Face folder says about its network, and find its weights.

    Raises:
        ModelError: There are no weights, or more than one set; a file is damaged, too large or not what it must be.
    """
    folder = Path(path)
    names = _names(folder)
    config = _json(folder / "config.json") if "config.json" in names else {}
    images = _json(folder / "preprocessor_config.json") if "preprocessor_config.json" in names else {}
    given = _of_timm(config) if "architecture" in config or "pretrained_cfg" in config else _of_transformers(config)
    given |= {key: value for key, value in _of_images(images).items() if value is not None}
    _check_channels(given)
    findings = (*_code(folder), *_named_code("config.json", config), *_named_code("preprocessor_config.json", images))
    return HubFolder(_weights(folder, names), findings=findings, **given)


def _names(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder; links count when they lead to a file."""
    if not folder.is_dir():
        raise ModelError(f"{_show(str(folder))} must be a folder")
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for _, entry in zip(range(MAX_FILES + 1), entries, strict=False) if entry.is_file()]
    except OSError as error:
        raise ModelError(f"cannot read {_show(str(folder))}: {error.strerror}") from error
    if len(names) > MAX_FILES:
        raise ModelError(f"a folder must hold at most {MAX_FILES} files")
    return frozenset(names)


def _weights(folder: Path, names: frozenset[str]) -> tuple[Path, ...]:
    """Return the weights by the hub's order of preference."""
    for name in WEIGHTS:
        if name in names:
            return _shards(folder, name, names) if name.endswith(".json") else (folder / name,)
    for suffixes in SUFFIXES:
        found = sorted(name for name in names if name.endswith(suffixes) and not OTHER.fullmatch(name))
        if len(found) > 1:
            shown = ", ".join(map(_show, found[:3])) + (", ..." if len(found) > 3 else "")
            raise ModelError(f"a folder must hold one file of weights, found {len(found)} ({shown}): name the file itself")
        if found:
            return (folder / found[0],)
    raise ModelError(
        "a folder must be a bundle (arch.json) or hold weights (model.safetensors, pytorch_model.bin); it has neither"
    )


def _shards(folder: Path, index: str, names: frozenset[str]) -> tuple[Path, ...]:
    """Return the files that an index names; each must lie in the folder itself."""
    placed = _json(folder / index).get("weight_map")
    suffix = ".safetensors" if "safetensors" in index else ".bin"
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index}: weight_map must say in which file each tensor is")
    for name in placed.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) or not name.endswith(suffix):
            raise ModelError(f"{index}: every file must be a plain name that ends in {suffix}, got {_show(name)}")
    files = sorted(set(placed.values()))
    if len(files) > MAX_SHARDS:
        raise ModelError(f"{index}: there must be at most {MAX_SHARDS} files, got {len(files)}")
    for name in files:
        if name not in names:
            raise ModelError(f"{index}: the folder must hold {name}, which is missing: fetch it too")
    return tuple(folder / name for name in files)


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ``config.json`` that timm writes; older ones have no ``pretrained_cfg`` but its fields."""
    inner, settings = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(inner, dict) or not isinstance(settings, dict):
        raise ModelError("config.json: pretrained_cfg and model_args must be objects")
    name = config.get("architecture", inner.get("architecture"))
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,90}(\.\w{1,90})?", name, re.ASCII):
        raise ModelError(f"config.json: architecture must be a word, got {_show(name)}")
    name = f"timm:{name.partition('.')[0]}"
    own_channels, own_sides = _sizes(inner.get("input_size"))
    image = settings.get("img_size")
    sides = own_sides if image is None else _sides("config.json: img_size", image)
    labels = next((place[key] for place, key in _label_places(config, inner) if place.get(key) is not None), None)
    found: dict[str, Any] = {
        "classes": _labels("label_names", labels),
        "mean": _numbers("config.json: mean", inner.get("mean")),
        "std": _numbers("config.json: std", inner.get("std")),
        "input_size": sides,
    }
    count = config.get("num_classes", settings.get("num_classes", inner.get("num_classes")))
    foreign = sorted(key for key, value in settings.items() if value is not None and not SETTINGS.fullmatch(key))
    odd = image is not None and (sides is None or sides[0] != sides[1] or sides[0] > MAX_IMAGE)
    if foreign or odd or count == 0:
        why = "no classifier" if count == 0 else f"its own {', '.join(map(_show, foreign[:3] or ['img_size']))}"
        return {**found, "note": f"config.json asks for {name} with {why}, which is not read by name: use --arch file.py:make"}
    channels = settings.get("in_chans") or own_channels
    kwargs = {"classes": count, "in_channels": None if channels == 3 else channels}
    for key, value in kwargs.items():
        if value is not None and not (type(value) is int and 0 < value <= MAX_CLASSES):
            raise ModelError(f"config.json: the number of {key} must lie in [1, {MAX_CLASSES}], got {_show(value)}")
    pool = settings.get("global_pool")
    if pool is not None and not (isinstance(pool, str) and re.fullmatch(r"\w{0,60}", pool, re.ASCII)):
        raise ModelError(f"config.json: global_pool must be a word, got {_show(pool)}")
    kwargs |= {"global_pool": pool, "img_size": sides[0] if image is not None and sides else None}
    return {**found, "arch": name, "kwargs": {key: value for key, value in kwargs.items() if value}}


def _label_places(*places: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    return ((place, key) for place in places for key in ("label_names", "labels"))


def _of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ``config.json`` of transformers, as far as it is about labels and size."""
    labels = config.get("id2label")
    if labels is not None:
        if not isinstance(labels, dict) or not all(re.fullmatch("0|[1-9][0-9]{0,5}", key) for key in labels):
            raise ModelError("config.json: id2label must give names by whole numbers")
        if sorted(map(int, labels)) != list(range(len(labels))):
            raise ModelError(f"config.json: id2label must number its {len(labels)} names from 0 up without a gap")
        labels = [labels[str(i)] for i in range(len(labels))]
    named = config.get("architectures") or config.get("model_type")
    named = named[0] if isinstance(named, list) and named else named
    note = f"config.json asks for {_show(named)} of transformers, which is not read by name" if isinstance(named, str) else ""
    size = None if config.get("image_size") is None else _sides("config.json: image_size", config["image_size"])
    return {"classes": _labels("id2label", labels), "input_size": size, "note": note}


def _of_images(images: Mapping[str, Any]) -> dict[str, Any]:
    """Read a ``preprocessor_config.json``; mean and std are returned as they act on images in [0, 1]."""
    where = "preprocessor_config.json"
    mean = _numbers(f"{where}: image_mean", images.get("image_mean"))
    std = _numbers(f"{where}: image_std", images.get("image_std"))
    factor = images.get("rescale_factor", 1 / 255) if images.get("do_rescale", True) is not False else 1.0
    if not _is_number(factor) or not 1e-6 <= factor <= 1e6:
        raise ModelError(f"{where}: rescale_factor must lie in [1e-06, 1e+06], got {_show(factor)}")
    scale = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-6) else 255 * factor
    if images.get("do_normalize") is False or (mean is None and std is None and scale != 1):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is not None and std is not None:
        mean, std = tuple(value / scale for value in mean), tuple(value / scale for value in std)
    crop = images.get("crop_size") if images.get("do_center_crop", True) is not False else None
    size = images.get("size") if crop is None else crop
    sides = None if size is None else _sides(f"{where}: {'size' if crop is None else 'crop_size'}", size)
    return {"mean": mean, "std": std, "input_size": sides}


def _check_channels(given: Mapping[str, Any]) -> None:
    mean, std = given.get("mean"), given.get("std")
    if len(mean or ()) != len(std or ()):
        raise ModelError("the folder must give mean and standard deviation for the same channels, or neither")
    if std and min(std) <= 0:
        raise ModelError(f"the folder's standard deviations must be above 0, got {min(std)}")


def _code(folder: Path) -> Iterator[Finding]:
    """Yield a finding for each file of code in a folder, links to folders left out."""
    seen = told = 0
    for home, _, files in os.walk(folder):
        seen += len(files) + 1
        if seen > MAX_FILES:
            raise ModelError(f"a folder must hold at most {MAX_FILES} files")
        for name in sorted(files):
            told += name.lower().endswith(CODE)
            if name.lower().endswith(CODE) and told <= MAX_SHOWN:
                where = _show(str(Path(home, name).relative_to(folder)))
                yield Finding("LOD-006", f"holds the program text {where}", where)
    if told > MAX_SHOWN:
        yield Finding("LOD-006", f"holds {told - MAX_SHOWN} more files of code")


def _named_code(file: str, content: Mapping[str, Any]) -> Iterator[Finding]:
    for key in CODE_KEYS:
        if content.get(key):
            yield Finding("LOD-006", f"{file} names code of its author ({key})", file)


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        content = json.loads(read_bytes(path, MAX_JSON), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} must hold an object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
    if level:
        raise ModelError(f"{path.name} must be nested at most {MAX_DEPTH} deep")
    return content


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _labels(what: str, names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    ok = isinstance(names, list) and 0 < len(names) <= MAX_CLASSES
    if not ok or not all(isinstance(name, str) and len(name) <= 1000 and name.isprintable() for name in names):
        raise ModelError(f"config.json: {what} must be 1 to {MAX_CLASSES} names, each at most 1000 printable characters")
    return tuple(names)


def _numbers(what: str, values: Any) -> tuple[float, ...] | None:
    """Return one number per channel; a single one counts for three channels."""
    if values is None:
        return None
    values = [values] * 3 if _is_number(values) else values
    ok = isinstance(values, list) and 0 < len(values) <= MAX_SIDE and all(_is_number(v) and abs(v) <= 1e6 for v in values)
    if not ok:
        raise ModelError(f"{what} must be numbers in [-1e+06, 1e+06], one per channel")
    return tuple(float(value) for value in values)


def _sizes(size: Any) -> tuple[int | None, tuple[int, int] | None]:
    """Return the channels and the height and width of an ``input_size``."""
    if size is None:
        return None, None
    if not (isinstance(size, list) and len(size) == 3 and all(map(_is_side, size))):
        raise ModelError(f"config.json: input_size must be three numbers from 1 to {MAX_SIDE}, got {_show(size)}")
    return size[0], (size[1], size[2])


def _sides(what: str, size: Any) -> tuple[int, int] | None:
    """Return height and width from the spellings of transformers; None for one that fixes neither."""
    if isinstance(size, dict):
        one = size.get("shortest_edge")
        size = [size.get("height", one), size.get("width", one)]
        if size == [None, None]:
            return None
    pair = size if isinstance(size, list) else [size, size]
    if len(pair) != 2 or not all(map(_is_side, pair)):
        raise ModelError(f"{what} must be one or two numbers from 1 to {MAX_SIDE}")
    return pair[0], pair[1]


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIDE


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def _show(value: Any) -> str:
    """A text from a file may hold anything: escape and shorten it."""
    text = str(value) if not isinstance(value, list | dict) else type(value).__name__
    short = text if len(text) <= 100 else text[:100] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]
