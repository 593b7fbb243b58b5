"""A memory as a file: what reads files reads a mapped one without a copy, and never much of it at once."""

from __future__ import annotations

import hashlib
import io
import mmap
from typing import Any

BLOCK = 2**16
MAX_READ = 2**28
MAX_LINE = 2**20


def sha256(data: memoryview) -> str:
    """Return the digest of a mapped file; its pages do not stay in memory."""
    total = hashlib.sha256()
    for start in range(0, len(data), MAX_READ // 16):
        total.update(data[start : start + MAX_READ // 16])
        release(data)
    return total.hexdigest()


def release(data: memoryview) -> None:
    """Let the system take back the pages of a mapped file; they are read again when they are looked at."""
    if isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        data.obj.madvise(mmap.MADV_DONTNEED)


class View(io.BufferedReader):
    """A memory as a file to read from. Who asks for more than there is, or than `MAX_READ`, gets less."""

    def __init__(self, data: memoryview, *, max_line: int = MAX_LINE) -> None:
        super().__init__(_Raw(data), BLOCK)
        self.length, self.max_line = len(data), max_line

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes; all that are left when it is negative or None."""
        if size is None or size < 0 or size > BLOCK:
            left = max(0, self.length - self.tell())
            size = min(left if size is None or size < 0 else size, left, MAX_READ)
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the next line, or its first ``max_line`` bytes."""
        return super().readline(self.max_line)


class _Raw(io.RawIOBase):
    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (0, self.place, len(self.data))[whence]
        if place < 0:
            raise OSError("before the start")
        self.place = place
        return place

    def readinto(self, buffer: Any) -> int:
        part = self.data[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)
