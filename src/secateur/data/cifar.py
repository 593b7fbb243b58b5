"""CIFAR-10 and CIFAR-100 as their authors ship them: binary files, or Python pickles read without running them."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, RefusedError
from .source import BROKEN, Source, one_split, printable, read_bytes, reason

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32

# Split -> names of its files, for CIFAR-10 and CIFAR-100.
_BINARY = {"train": ("data_batch_*.bin", "train.bin"), "test": ("test_batch.bin", "test.bin")}
_PYTHON = {"train": ("data_batch_[0-9]", "train"), "test": ("test_batch", "test")}


def find(path: Path) -> dict[str, list[Path]]:
    """Return the CIFAR files of a folder by split; empty when it is no CIFAR folder."""
    for patterns in (_BINARY, _PYTHON):
        found = {split: _glob(path, names) for split, names in patterns.items()}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {}


def read_folder(path: Path, files: dict[str, list[Path]], split: str | None) -> Source:
    """Read one split of the folder ``path``, whose ``files`` `find` returned."""
    parts = [read_file(file) for file in files[one_split(path, files, split)]]
    if len({part.classes is None for part in parts}) > 1:
        raise DataError(f"{printable(path)} mixes CIFAR-10 and CIFAR-100 files; keep them in folders of their own")
    y = np.concatenate([part.y for part in parts])
    x = np.concatenate([part.fetch(np.arange(len(part.y))) for part in parts])
    return Source(y, lambda index: x[index], parts[0].classes)


def read_file(path: Path) -> Source:
    """Read one binary file (``.bin``) or one pickled batch; fine labels for CIFAR-100."""
    x, y, fine = _read_binary(path) if path.suffix == ".bin" else _read_pickle(path)
    images = x.reshape(-1, 3, 32, 32)
    top = 99 if fine else 9
    if len(y) and not 0 <= y.min() <= y.max() <= top:
        raise DataError(f"CIFAR labels must lie in [0, {top}], but {printable(path)} has {y.min()}..{y.max()}")
    return Source(y, lambda index: images[index], None if fine else CIFAR10)


def is_pickle(path: Path) -> bool:
    """Tell whether a file looks like a pickled batch, by its name or its first byte."""
    if any(path.match(name) for names in _PYTHON.values() for name in names):
        return True
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _glob(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    raw = np.frombuffer(read_bytes(path), np.uint8)
    fine = path.name in ("train.bin", "test.bin") or len(raw) % (PIXELS + 1) != 0
    labels = 2 if fine else 1
    if not len(raw) or len(raw) % (PIXELS + labels):
        raise DataError(
            f"CIFAR records take {PIXELS + 1} or {PIXELS + 2} bytes, but {printable(path)} has {len(raw)} bytes; "
            "download it again"
        )
    rows = raw.reshape(-1, PIXELS + labels)
    return rows[:, labels:], rows[:, labels - 1].astype(np.int64), fine


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    try:
        batch = _Unpickler(io.BytesIO(read_bytes(path)), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError("it holds no dictionary")
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        fine = "fine_labels" in batch
        missing = [key for key in ("data", "fine_labels" if fine else "labels") if key not in batch]
        if missing:
            raise ValueError(f"it lacks '{missing[0]}'")
        x = batch["data"].array().reshape(-1, PIXELS)
        labels = batch["fine_labels" if fine else "labels"]
        if not all(type(label) is int for label in labels) or len(labels) != len(x):
            raise ValueError(f"{len(x)} images need as many whole labels")
        return x, np.array(labels, np.int64), fine
    except (pickle.UnpicklingError, *BROKEN) as error:
        raise DataError(f"{printable(path)} is not a readable CIFAR batch ({reason(error)}); download it again") from None


class _Unpickler(pickle._Unpickler):  # the Python one: a huge memo index cannot make it allocate
    """Reads numpy's pickles into stand-ins, so that not even numpy's own rebuilding code runs on untrusted input."""

    def __init__(self, file: io.BytesIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name that arrays need; refuse every other name."""
        known = self._allowed.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise RefusedError(
                f"CIFAR batches need only numpy arrays, but this file asks for {printable(module)}.{printable(name)}; "
                "refused without running it, use the binary version"
            )
        return known


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return fresh stand-ins, because a hostile pickle may set attributes on what it is given."""

    class Dtype:
        def __init__(self, code: Any, *_: Any) -> None:
            self.code = code.decode() if isinstance(code, bytes) else code

        def __setstate__(self, state: Any) -> None:
            """Ignore byte order and fields, which bytes have none of."""

    class Array:
        def __init__(self, *_: Any) -> None:
            self.state: Any = None

        def __setstate__(self, state: Any) -> None:
            self.state = state

        def array(self) -> np.ndarray:
            _, shape, dtype, fortran, raw = self.state
            if not all(type(side) is int for side in shape):
                raise ValueError("its array has no shape")
            if dtype.code != "u1" or not isinstance(raw, bytes) or math.prod(shape) != len(raw):
                raise ValueError("its array is not uint8, or is cut short")
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")

    def encode(text: str, encoding: Any = "latin1") -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise ValueError("its bytes are not in latin1")
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): encode,
    }
