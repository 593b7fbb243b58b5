"""What every reader returns, and the checks they share."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError

MAX_BYTES = 8 * 2**30
MAX_CLASSES = 100_000

# What parsers of the standard library, numpy, Pillow and pyarrow raise on damaged files (OSError includes Pillow's
# UnidentifiedImageError, ValueError includes UnicodeDecodeError and pyarrow's ArrowInvalid).
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set whose labels are known and whose images are decoded on demand.

    Attributes:
        y: Labels, any integer dtype ``(n,)``.
        fetch: Takes indices, int64 ``(m,)``; returns images, uint8 ``(m, c, h, w)`` with one or three channels.
        classes: Class names in label order, or None when the file has none.
    """

    y: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]
    classes: tuple[str, ...] | None = None


def printable(text: object) -> str:
    """Return ``text`` on one line, control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def reason(error: BaseException) -> str:
    """Return a library's error as a few words on one line."""
    text = " ".join(printable(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def some(items: Iterable[object], limit: int = 5) -> str:
    """Join up to ``limit`` items by commas, with ``...`` for the rest."""
    items = list(items)
    return ", ".join(printable(item) for item in items[:limit]) + (", ..." if len(items) > limit else "")


def check_bytes(path: Path, count: int) -> None:
    """Raise `DataError` when ``count`` bytes are more than the tool will hold in memory."""
    if count > MAX_BYTES:
        raise DataError(
            f"data must fit in {MAX_BYTES / 2**30:.3g} GiB, but {printable(path)} declares {count / 2**30:.3g} GiB; split it"
        )


def read_bytes(path: Path) -> bytes:
    """Return a whole file, refusing those beyond the memory bound."""
    check_bytes(path, path.stat().st_size)
    return path.read_bytes()


def one_split(path: Path, found: Iterable[str], split: str | None) -> str:
    """Return the split to read: the one asked for, or the only one there is."""
    names = sorted(found)
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return split
    shown, given = printable(path), f"'{printable(split)}'" if split else "none was named"
    remedy = f"write {shown}:{names[0]}" if names else "check the path"
    raise DataError(f"{shown} holds the splits: {', '.join(names) or 'none'}; got {given}; {remedy}")
