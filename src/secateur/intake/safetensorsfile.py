"""Safetensors files: the library checks the header, our own reading of it says where each tensor lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from .tensors import MAX_DIMENSIONS, Storage, Stored, contiguous

MAX_HEADER = 32 * 2**20
MAX_TENSORS = 100_000
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file of ``size`` bytes that begins like this may be one."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size


def read_safetensors(path: Path, data: memoryview) -> dict[str, Stored]:
    """Return the tensors of a safetensors file whose content is ``data``.

    Raises:
        ModelError: The header is damaged, too large, or of a newer format.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ModelError(f"a safetensors header must have at most {MAX_HEADER} bytes, got {length}")
    try:
        with safe_open(path, framework="numpy"):
            pass
        header: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"not a valid safetensors file: {str(error).splitlines()[0][:200]}") from error
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelError(f"a safetensors file must have at most {MAX_TENSORS} tensors, got {len(header)}")
    return {name: _stored(fields, data[8 + length :]) for name, fields in header.items()}


def _stored(fields: dict[str, Any], data: memoryview) -> Stored:
    if len(fields["shape"]) > MAX_DIMENSIONS:
        raise ModelError(f"a tensor must have at most {MAX_DIMENSIONS} dimensions, got {len(fields['shape'])}")
    shape, (start, stop) = tuple(fields["shape"]), fields["data_offsets"]
    storage = Storage(stop - start)
    storage.fill(data[start:stop])
    return Stored(DTYPES.get(fields["dtype"]) or str(fields["dtype"]), shape, contiguous(shape), 0, storage)
