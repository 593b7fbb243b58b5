"""Files from outside, read within bounds."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError

MAX_BYTES = 8 * 2**30


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes."""
    if not path.is_file():
        raise ModelError(f"{path} must be a file, found {'a folder' if path.is_dir() else 'none'}")
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(f"{path} must have at most {limit} bytes, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
