"""``.npz`` and safetensors files with images ``x`` and labels ``y`` (``train_x``, ``train_y`` for the split ``train``)."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import DataError
from ..types import ImageSet
from .source import BROKEN, Source, check_bytes, printable, reason

_SAFE_DTYPES = {"U8", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U16", "U32", "U64"}


def read_npz(path: Path, split: str | None) -> Source:
    """Read images, labels and (where present) class names from ``path``, without pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            x_key, y_key = _keys(path, members, split)
            wanted = [key for key in (x_key, y_key, "classes") if key in members]
            check_bytes(path, sum(_declared(archive, members[key]) for key in wanted))
            arrays = {key: _member(archive, members[key]) for key in wanted}
    except BROKEN as error:
        raise DataError(f"{printable(path)} is not a readable .npz file ({reason(error)}); write it with numpy.savez") from None
    classes = _class_names(path, arrays["classes"]) if "classes" in arrays else None
    return _source(path, arrays[x_key], arrays[y_key], classes)


def read_safetensors(path: Path, split: str | None) -> Source:
    """Read images and labels from ``path``."""
    try:
        with safe_open(path, framework="numpy") as archive:
            x_key, y_key = _keys(path, archive.keys(), split)
            for key in (x_key, y_key):
                dtype = archive.get_slice(key).get_dtype()
                if dtype not in _SAFE_DTYPES:
                    raise DataError(f"'{key}' of {printable(path)} has dtype {dtype}; store images as uint8, labels as int64")
            x, y = archive.get_tensor(x_key), archive.get_tensor(y_key)
    except (SafetensorError, *BROKEN) as error:
        raise DataError(f"{printable(path)} is not a readable safetensors file ({reason(error)})") from None
    return _source(path, x, y, None)


def save_npz(data: ImageSet, path: str | Path, *, compressed: bool = False) -> None:
    """Write ``data`` so that `load_data` reads it back; equal data give equal bytes.

    Args:
        data: What to write: ``x`` as uint8 ``(n, h, w, c)``, ``y`` as int64 and the class names as ``classes``.
        path: The file, ending in ``.npz``; an existing one is replaced.
        compressed: Deflate the arrays.
    """
    arrays = {
        "x": data.x.permute(0, 2, 3, 1).contiguous().cpu().numpy(),
        "y": data.y.cpu().numpy(),
        "classes": np.array(data.classes, dtype=np.str_),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _keys(path: Path, found: Iterable[str], split: str | None) -> tuple[str, str]:
    prefix = f"{split}_" if split else ""
    keys = f"{prefix}x", f"{prefix}y"
    there = sorted(found)
    missing = [key for key in keys if key not in there]
    if missing:
        splits = [key.removesuffix("_x") for key in there if key.endswith("_x")]
        remedy = f"; write {printable(path)}:{printable(splits[0])}" if splits else "; add or rename them"
        has = ", ".join(printable(key) for key in there[:8]) or "nothing"
        raise DataError(f"{printable(path)} must hold {' and '.join(map(repr, keys))}, but has {has}{remedy}")
    return keys


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"array format {version} is not supported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape, _, dtype = readers[version](file)
    return shape, dtype


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return the bytes a member will take, from its header alone; refuse object arrays and headers that lie."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is packed by an unusual method")
    with archive.open(info) as file:
        shape, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects; only plain arrays are read")
    if dtype.kind not in "biufU" or not dtype.itemsize:
        raise ValueError(f"{info.filename} has the unusual dtype {dtype}")
    count = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or count > info.file_size:
        raise ValueError(f"{info.filename} declares the shape {shape}, but is shorter")
    return count


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.lib.format.read_array(file, allow_pickle=False)


def _class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"'classes' of {printable(path)} must be a list of names, got {names.dtype} {names.shape}")
    return tuple(printable(name) for name in names)


def _source(path: Path, x: np.ndarray, y: np.ndarray, classes: tuple[str, ...] | None) -> Source:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"labels must be whole numbers (n,), but {printable(path)} has {y.dtype} {y.shape}; store class indices"
        )
    if x.ndim in (3, 4) and len(x) != len(y):
        raise DataError(f"images and labels must be equally many, but {printable(path)} has {len(x)} and {len(y)}")
    images = _to_uint8(path, _to_nchw(path, x))
    return Source(y, lambda index: images[index], classes)


def _to_nchw(path: Path, x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
        raise DataError(
            f"images must have 1 or 3 channels, (n, h, w, c), (n, c, h, w) or (n, h, w), but {printable(path)} has {x.shape}"
        )
    return x


def _to_uint8(path: Path, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise DataError(f"images must be uint8, or float in [0, 1], but {printable(path)} has {x.dtype}; convert them")
    if x.size and not np.isfinite(x).all():
        raise DataError(f"float images must be finite, but {printable(path)} holds NaN or infinity; save them as uint8")
    if x.size and not 0 <= x.min() <= x.max() <= 1:
        raise DataError(
            f"float images must lie in [0, 1], but {printable(path)} spans [{x.min():g}, {x.max():g}]; "
            "undo the normalisation or save them as uint8"
        )
    out = np.empty(x.shape, np.uint8)
    for i in range(len(x)):  # one image at a time, so that no second float copy of the whole set is needed
        out[i] = np.rint(x[i].astype(np.float64) * 255)
    return out
