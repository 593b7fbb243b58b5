"""Parquet files in the Hugging Face image layout: ``image`` or ``img`` with encoded ``bytes``, and ``label``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .images import Size, decode
from .source import BROKEN, Source, check_bytes, one_split, printable, reason


def read_parquet(path: Path, split: str | None, size: Size | None) -> Source:
    """Read a file, or a folder's ``*.parquet``; in a folder, names such as ``train-00000-of-00001.parquet`` name splits."""
    files = _pick(path, split)
    parts = [_read_file(file) for file in files]
    classes = parts[0][2]
    if any(part[2] != classes for part in parts):
        raise DataError(f"the Parquet files of {printable(path)} name different classes; keep one data set per folder")
    encoded = [item for part in parts for item in part[0]]
    names = [f"{file.name} row {row}" for file, part in zip(files, parts, strict=True) for row in range(len(part[0]))]

    def fetch(index: np.ndarray) -> np.ndarray:
        return decode([encoded[i] for i in index], [names[i] for i in index], size)

    return Source(np.concatenate([part[1] for part in parts]), fetch, classes)


def _pick(path: Path, split: str | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(file.stem.split("-")[0], []).append(file)
    if split is None and not any(name in ("train", "test", "validation") for name in splits):
        return files
    return splits[one_split(path, splits, split)]


def _read_file(path: Path) -> tuple[list[bytes], np.ndarray, tuple[str, ...] | None]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"reading {printable(path)} needs pyarrow; run: pip install secateur[parquet]") from None
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            check_bytes(path, sum(group.total_byte_size for group in groups))
            image = _column(path, file.schema_arrow.names, ("image", "img"))
            label = _column(path, file.schema_arrow.names, ("label",))
            table = file.read(columns=[image, label])
        y = table.column(label).to_numpy()
        encoded = [_bytes_of(cell) for cell in table.column(image).to_pylist()]
        classes = _class_names(table.schema.metadata, label)
    except (pyarrow.ArrowException, *BROKEN) as error:
        raise DataError(f"{printable(path)} is not a readable Parquet image file ({reason(error)})") from None
    if y.dtype.kind not in "iu":
        raise DataError(f"'{label}' of {printable(path)} must hold whole numbers, got {y.dtype}; store class indices")
    return encoded, y, classes


def _column(path: Path, found: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in found:
            return name
    has = ", ".join(printable(name) for name in found[:8]) or "nothing"
    raise DataError(f"{printable(path)} must hold a column {' or '.join(map(repr, wanted))}, but has {has}; rename it")


def _bytes_of(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(data, bytes):
        raise ValueError("an image has no bytes; embed the files")
    return data


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Return the names in the ``huggingface`` metadata; None where there are none or they are not as documented."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(printable(name) for name in names)
    return None
