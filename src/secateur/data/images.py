"""Encoded images (PNG, JPEG, WebP ...) and folders of them."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .source import BROKEN, MAX_BYTES, Source, one_split, printable, reason, some

# Named one by one: Pillow also has decoders that start other programs (EPS) or fetch files (WMF on Windows).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".avif")
)
SPLITS = frozenset(("train", "test", "val", "valid", "validation"))

Size = tuple[int, int]


def read_folder(path: Path, split: str | None, size: Size | None) -> Source:
    """Read one folder per class, sorted by name; images may lie deeper inside. Hidden and other files are ignored."""
    folders = _class_folders(path)
    if folders and (split or SPLITS.issuperset(folder.name for folder in folders)):
        path = path / one_split(path, (folder.name for folder in folders), split)
        folders = _class_folders(path)
    if not folders:
        raise DataError(f"{printable(path)} must hold one folder per class, but has none; move the images into such folders")
    files = [_image_files(folder) for folder in folders]
    if not any(files):
        raise DataError(f"the class folders of {printable(path)} hold no images ({some(sorted(SUFFIXES), 20)})")
    y = np.repeat(np.arange(len(folders)), [len(part) for part in files])
    flat = [file for part in files for file in part]
    names = [printable(file.relative_to(path)) for file in flat]

    def fetch(index: np.ndarray) -> np.ndarray:
        return decode([flat[i] for i in index], [names[i] for i in index], size)

    return Source(y, fetch, tuple(printable(folder.name) for folder in folders))


def decode(files: Sequence[Path | bytes], names: Sequence[str], size: Size | None) -> np.ndarray:
    """Decode images to uint8 ``(n, c, h, w)``: one channel when every image is grayscale, else three.

    Args:
        files: Paths, or the encoded bytes.
        names: What to call each of them in errors.
        size: ``(h, w)`` to resize to, bilinear; None keeps the one size they must share.

    Raises:
        DataError: If any image is unreadable (the first five are named, all are counted) or their sizes differ.
    """
    images: list[np.ndarray] = []
    problems: list[str] = []
    total = 0
    with _quiet():
        for file, name in zip(files, names, strict=True):
            try:
                images.append(_decode_one(file, size))
            except (Image.DecompressionBombError, Image.DecompressionBombWarning, *BROKEN) as error:
                problems.append(f"{printable(name)} ({_in_words(error)})")
                continue
            total += images[-1].nbytes
            if total > MAX_BYTES:
                raise DataError(f"data must fit in {MAX_BYTES / 2**30:.3g} GiB; use --limit, or --input-size (size=)")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(names)} images cannot be read: {some(problems)}; replace or remove {_them(problems)}"
        )
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        shown = some(f"{h}x{w} ({count})" for (h, w), count in sizes.most_common())
        raise DataError(f"images must have one size (height x width), got {shown}; resize with --input-size (size=)")
    return _stack(images)


def resize(x: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 ``(n, c, h, w)`` to ``size = (h, w)``, bilinear as for encoded images."""
    out = np.empty((*x.shape[:2], *size), np.uint8)
    for source, target in zip(x.reshape(-1, *x.shape[2:]), out.reshape(-1, *size), strict=True):
        target[:] = np.asarray(_resized(Image.fromarray(np.ascontiguousarray(source)), size))
    return out


def _decode_one(file: Path | bytes, size: Size | None) -> np.ndarray:
    if isinstance(file, Path) and not file.is_file():
        raise ValueError("not a file")
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=FORMATS) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{image.mode} pixels; convert to 8 bits")
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return np.asarray(_resized(image, size))


def _resized(image: Image.Image, size: Size | None) -> Image.Image:
    if size is None or image.size == (size[1], size[0]):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _stack(images: list[np.ndarray]) -> np.ndarray:
    gray = all(image.ndim == 2 for image in images)
    h, w = images[0].shape[:2]
    out = np.empty((len(images), 1 if gray else 3, h, w), np.uint8)
    for target, image in zip(out, images, strict=True):
        target[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _in_words(error: BaseException) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return reason(error)


def _them(problems: Sequence[str]) -> str:
    return "it" if len(problems) == 1 else "them"


def _class_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)
