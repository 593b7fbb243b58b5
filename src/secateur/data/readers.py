"""`load_data`: find out what lies at a path, read it, check it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, unknown
from ..state import generator
from ..types import ImageSet
from . import cifar, images
from .arrays import read_npz, read_safetensors
from .fashion_mini import NAME, read_fashion_mini
from .parquet import read_parquet
from .source import MAX_CLASSES, Source, check_bytes, printable
from .splits import stratified


def load_data(
    path: str | Path,
    *,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Read labelled images of any supported layout, told apart by what is there.

    * ``FILE.npz`` or ``FILE.safetensors`` with ``x`` (uint8, or float in [0, 1]; NHWC, NCHW or NHW) and ``y``, or with
      ``:train`` behind the path, with ``train_x`` and ``train_y``;
    * a folder with one folder of images per class, labels in the order of the sorted names; PATH:train when it has splits;
    * CIFAR-10 or CIFAR-100, binary or Python (read without running the pickle): a file, or their folder with ``:train``;
    * Parquet in the Hugging Face image layout, a file or a folder of them (needs the extra ``parquet``);
    * ``fashion-mini:train``, ``fashion-mini:test``, or ``fashion-mini`` for both: the embedded set.

    Args:
        path: Where the data lie, with ``:SPLIT`` behind it where there are several.
        name: What to call the set in reports; default: the last part of the path.
        size: ``(h, w)`` in pixels to resize to, bilinear; None keeps the one size all images must share.
        classes: Names in label order, or their number. Data that name their classes are matched by name, or by order when
            they share no name with ``classes``. Given a number, classes called ``0``, ``1`` ... are matched by that number.
        limit: At most so many images, with about the class shares of the whole; the same ones each time.

    Returns:
        The images, in file order.

    Raises:
        DataError: If the data are missing, damaged, inconsistent, or of a single class.
        RefusedError: If a pickle asks for anything but arrays.
    """
    _check_arguments(size, classes, limit)
    try:
        where, split = _parse(str(path))
        source = _open(where, split, size)
        y, names = _label(where, source, classes)
        index = _choose(y, limit)
        x = source.fetch(index)
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror or printable(error)}") from None
    if size is not None and x.shape[2:] != tuple(size):
        check_bytes(where, len(x) * x.shape[1] * size[0] * size[1])
        x = images.resize(x, size)
    x = np.require(x, requirements=["C", "W"])
    title = name or printable(where.stem if where.is_file() else where.resolve().name) + (f":{split}" if split else "")
    return ImageSet(torch.from_numpy(x), torch.from_numpy(y[index]), names, title)


def _check_arguments(size: tuple[int, int] | None, classes: int | Sequence[str] | None, limit: int | None) -> None:
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= 16384 for side in size)):
        raise DataError(f"the size must be two whole numbers (height, width) in [1, 16384], got {size}")
    if classes is not None and not 2 <= _count(classes) <= MAX_CLASSES:
        raise DataError(f"classes must be 2 to {MAX_CLASSES}, got {_count(classes)}")
    if limit is not None and limit < 1:
        raise DataError(f"the limit must be at least 1 image, got {limit}")


def _parse(path: str) -> tuple[Path, str | None]:
    """Split ``PATH:SPLIT``; a path that exists as it stands has no split."""
    head, _, tail = path.rpartition(":")
    if head and tail.isidentifier() and not Path(path).exists():
        return Path(head), tail
    return Path(path), None


def _open(path: Path, split: str | None, size: tuple[int, int] | None) -> Source:
    if str(path) == NAME and not path.exists():
        return read_fashion_mini(split)
    if path.is_dir():
        return _open_folder(path, split, size)
    if not path.is_file():
        raise DataError(f"no such file or folder: {printable(path)}; check the path, or use '{NAME}:test'")
    kind = path.suffix.lower()
    if kind == ".npz":
        return read_npz(path, split)
    if kind == ".safetensors":
        return read_safetensors(path, split)
    if split:
        raise DataError(f"{printable(path)} holds one split; write the path without ':{split}'")
    if kind == ".parquet":
        return read_parquet(path, split, size)
    if kind == ".bin" or cifar.is_pickle(path):
        return cifar.read_file(path)
    raise DataError(
        f"{printable(path)} is none of .npz, .safetensors, .parquet, a CIFAR batch or a folder of images; convert it to one"
    )


def _open_folder(path: Path, split: str | None, size: tuple[int, int] | None) -> Source:
    entries = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    if not entries:
        raise DataError(f"{printable(path)} is empty; check the path")
    batches = cifar.find(path)
    if batches:
        return cifar.read_folder(path, batches, split)
    if any(name.endswith(".parquet") for name in entries):
        return read_parquet(path, split, size)
    return images.read_folder(path, split, size)


def _label(path: Path, source: Source, wanted: int | Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels, int64, and the names they index, as far as possible in the order of ``wanted``."""
    if not len(source.y):
        raise DataError(f"{printable(path)} holds no images; check how it was made")
    low, high = int(source.y.min()), int(source.y.max())
    top = min(MAX_CLASSES, len(source.classes) if source.classes else _count(wanted))
    if low < 0 or high >= top:
        raise DataError(
            f"labels must lie in [0, {top - 1}], but {printable(path)} has {low}..{high}; "
            "number the classes from 0, or correct --classes (classes=)"
        )
    y = source.y.astype(np.int64)
    if low == high:
        only = f" ('{source.classes[low]}')" if source.classes else ""
        raise DataError(
            f"images of at least two classes are needed, but {printable(path)} shows only class {low}{only}; add others"
        )
    if source.classes:
        y, names = _match(source.classes, y, wanted)
    elif wanted is None or isinstance(wanted, int):
        names = tuple(str(label) for label in range(wanted or high + 1))
    else:
        names = tuple(wanted)
    if len(set(names)) < len(names):
        raise DataError(f"class names must differ, but {printable(path)} repeats one; rename it")
    return y, names


def _count(wanted: int | Sequence[str] | None) -> int:
    if wanted is None:
        return MAX_CLASSES
    return wanted if isinstance(wanted, int) else len(wanted)


def _match(own: tuple[str, ...], y: np.ndarray, wanted: int | Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if wanted is None:
        return y, own
    numbered = isinstance(wanted, int) and all(name.isdecimal() and len(name) < 10 for name in own)
    names = tuple(str(i) for i in range(wanted)) if isinstance(wanted, int) else tuple(wanted)
    keys = [str(int(name)) for name in own] if numbered else list(own)
    place = {name: i for i, name in enumerate(names)}
    strangers = [key for key in keys if key not in place]
    if not strangers and len(set(keys)) == len(keys):
        return np.array([place[key] for key in keys])[y], names
    if not strangers:
        raise DataError(f"class names must differ, but the data name {', '.join(keys[:8])}; rename them")
    if len(own) == len(names) and (isinstance(wanted, int) or len(strangers) == len(own)):
        return y, own if isinstance(wanted, int) else names
    if isinstance(wanted, int):
        raise DataError(f"the data have {len(own)} classes, but {wanted} are wanted; give the names in label order (classes=)")
    raise DataError(unknown("class", printable(strangers[0]), names))


def _choose(y: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(y):
        return np.arange(len(y))
    return np.sort(stratified(torch.from_numpy(y), [limit], generator=generator(0))[0].numpy())
