"""The record of a run as a file: written for machines, read with suspicion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..types import Result
from .schema import problem
from .wording import clip

SCHEMA_VERSION = 1
MAX_BYTES = 2**20
NUMBERS = re.compile(r"\[\n[-+.,\deE\s]+\]")  # lists of numbers go on one line; no string of JSON has a line break


def to_json(result: Result | Mapping[str, Any]) -> str:
    """Return a record as JSON, its keys in the order of `Result`.

    Raises:
        DataError: A number is not finite, or a value has no form in JSON.
    """
    record = asdict(result) if isinstance(result, Result) else result
    ordered = {field.name: record[field.name] for field in fields(Result) if field.name in record}
    try:
        text = json.dumps(ordered, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"a record holds finite numbers, strings, lists and mappings only: {error}") from error
    return NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a ``result.json`` that anyone may have written. What is returned can be rendered.

    Raises:
        DataError: The file cannot be read, is too large, is no JSON, comes from a newer version or breaks the schema.
    """
    name = clip(str(path), 200)
    record = _parse(_read(Path(path), name), name)
    version = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            f"schema_version must be at most {SCHEMA_VERSION}, got {version}: a newer secateur wrote {name}; upgrade to read it"
        )
    if broken := problem(record):
        raise DataError(f"{broken} ({name}); give a result.json that secateur wrote")
    return record


def _read(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"a record is a file, and there is none at {name}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {name}: {clip(str(error), 200)}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"a record must not exceed {MAX_BYTES} bytes, and {name} does")
    return content


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not valid JSON: {clip(str(error), 200)}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"numbers must be finite, got {text}")
    return value
