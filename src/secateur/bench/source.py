"""What stands for the images of a plan in its keys: a digest of their bytes, wherever they lie."""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path

from ..errors import DataError
from .plan import EMBEDDED


def digest(path: str) -> str:
    """Return a digest of the images at ``PATH`` or ``PATH:split``, the split's name behind it.

    For a file it is the sha256 of its bytes, for a folder that of the names and bytes of all files in it.

    Raises:
        DataError: There is nothing at the path.
    """
    where, split = _parse(path)
    try:
        return hashlib.sha256(f"{_of(where)} {split}".encode()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the images at {path}: {error.strerror}; check [data] or --data") from None


def _parse(path: str) -> tuple[Path | None, str]:
    """Return file or folder and split; None for the embedded images."""
    head, _, tail = path.rpartition(":")
    where, split = (Path(head), tail) if head and tail.isidentifier() and not Path(path).exists() else (Path(path), "")
    return (None if str(where) == EMBEDDED and not where.exists() else where), split


def _of(where: Path | None) -> str:
    if where is None:
        assets = files("secateur").joinpath("data", "assets")
        packed = sorted((asset for asset in assets.iterdir() if asset.name.endswith(".xz")), key=lambda asset: asset.name)
        return hashlib.sha256(b"".join(asset.read_bytes() for asset in packed)).hexdigest()
    return content(where)


def content(where: Path) -> str:
    """Return the sha256 of a file's bytes, or of the names and bytes of all files in a folder.

    Raises:
        OSError: It cannot be read.
    """
    if not where.is_dir():
        return _of_file(where)
    digests = hashlib.sha256()
    names = (Path(folder, name) for folder, _, found in os.walk(where, followlinks=True) for name in found)
    for path in sorted(names):
        digests.update(f"{path.relative_to(where).as_posix()} {_of_file(path)}\n".encode("utf-8", "surrogateescape"))
    return digests.hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
