"""Tensors as a file describes them: type, shape and place, checked against the bytes there before anything is copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from .view import release

MAX_DIMENSIONS = 25
MAX_SIDE = 2**48
LARGE = 2**24
BLOCK = 2**20  # elements looked at in one go

DTYPES: dict[str, int] = {  # bytes of a value
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "complex32": 4},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1},
}
EXPONENTS: dict[str, tuple[str, int]] = {  # all of these bits set: NaN or infinite
    "float64": ("<u8", 0x7FF0 << 48),
    "float32": ("<u4", 0x7F80 << 16),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "complex128": ("<u8", 0x7FF0 << 48),
    "complex64": ("<u4", 0x7F80 << 16),
    "complex32": ("<u2", 0x7C00),
    "float8_e4m3fn": ("<u1", 0x7F),
    "float8_e5m2": ("<u1", 0x7C),
}


@dataclass(eq=False, slots=True)
class Storage:
    """A run of bytes that tensors look into.

    Attributes:
        size: Bytes that the file says it has.
        dtype: Type of its elements; None when it is untyped.
        data: The bytes themselves, once they are known.
    """

    size: int
    dtype: str | None = None
    data: memoryview | None = None

    def fill(self, data: memoryview) -> None:
        """Say where the bytes are; `ModelError` when there are fewer than claimed."""
        if len(data) < self.size:
            raise ModelError(f"a tensor's storage must have {self.size} bytes, got {len(data)}: the file is cut or lies")
        self.data = data[: self.size]


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A tensor in a file: it lies within its storage.

    Attributes:
        dtype: As torch spells it, e.g. ``float32``.
        shape: Its sizes.
        stride: Elements from one index to the next, per dimension.
        offset: Elements of the storage before it.
        storage: Where its values are.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or len(self.shape) > MAX_DIMENSIONS:
            raise ModelError(f"a tensor must have as many strides as sizes, at most {MAX_DIMENSIONS}")
        if not all(type(n) is int and 0 <= n < MAX_SIDE for n in numbers):
            raise ModelError("a tensor's sizes, strides and offset must be whole numbers from 0 up")
        if math.prod(max(side, 1) for side in self.shape) * max([1, *self.stride]) >= 2**62:
            raise ModelError("a tensor's sizes and strides must be those of a real one")
        if self.dtype not in DTYPES:
            raise ModelError(f"a tensor's type must be a known one, got {str(self.dtype)[:40]!a}")
        if self.size > self.storage.size or self.span[1] > self.storage.size:
            raise ModelError("a tensor claims more values than its storage holds")

    @property
    def size(self) -> int:
        """Bytes that a copy takes."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    @property
    def span(self) -> tuple[int, int]:
        """First byte in the storage that it touches, and the one after the last."""
        item = DTYPES[self.dtype]
        start = self.offset * item
        if 0 in self.shape:
            return start, start
        reach = sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        return start, start + (reach + 1) * item

    @property
    def dense(self) -> bool:
        """Whether its values lie one after another."""
        expected = 1
        for side, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if side != 1 and step != expected:
                return False
            expected *= max(side, 1)
        return True

    def bytes(self) -> memoryview:
        """Return the bytes of `span`."""
        assert self.storage.data is not None
        return self.storage.data[slice(*self.span)]

    def release(self) -> None:
        """Let the system take back the pages of a large tensor of a mapped file."""
        if self.size > LARGE and self.storage.data is not None:
            release(self.storage.data)

    def count_nonfinite(self) -> int | None:
        """Return how many values are NaN or infinite; None for types that are not looked into."""
        if self.dtype not in EXPONENTS:
            return None if self.dtype.startswith("float8") else 0
        kind, mask = EXPONENTS[self.dtype]
        bits = (block.view(kind) for block in self.blocks())
        return sum(int(np.count_nonzero((block & block.dtype.type(mask)) == mask)) for block in bits)

    def blocks(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Yield the bytes of its values in order, a few at a time."""
        data = np.frombuffer(self.bytes(), np.uint8)
        item = DTYPES[self.dtype]
        if self.dense or not len(data):
            yield from (data[start : start + BLOCK * item] for start in range(0, len(data), BLOCK * item))
        else:
            strides = (*(step * item for step in self.stride), 1)
            yield np.lib.stride_tricks.as_strided(data[:item], (*self.shape, item), strides).reshape(-1)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: As in the file.
        dtype: As torch spells it.
        shape: Its sizes.
        nonfinite: How many values are NaN or infinite; None when that was not looked at.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nonfinite: int | None


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor."""
    stride, strides = 1, []
    for side in reversed(shape):
        strides.append(stride)
        stride *= max(side, 1)
    return tuple(reversed(strides))


def check_total(tensors: Iterable[Stored], size: int) -> None:
    """Raise `ModelError` when copies of all tensors would dwarf the ``size`` of their file."""
    if sum(max(tensor.size, tensor.span[1] - tensor.span[0]) for tensor in tensors) > 4 * size:
        raise ModelError("the weights together claim more values than the file holds")
