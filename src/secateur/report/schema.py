"""The few words of JSON Schema that ``result.schema.json`` uses, so that reading a record needs no validator installed.

A test checks that the schema uses no other word, and that a full validator accepts whatever is accepted here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from .wording import clip

Schema = Mapping[str, Any]
TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


@cache
def result_schema() -> Schema:
    """Return the JSON Schema of ``result.json``."""
    return json.loads(files("secateur.report").joinpath("result.schema.json").read_text("utf-8"))


def problem(value: Any) -> str | None:
    """Return the first rule of the schema that a record breaks, as one line, or None."""
    return next(_problems(value, result_schema(), "the record"), None)


def _problems(value: Any, schema: Schema, where: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _problems(value, result_schema()["$defs"][schema["$ref"].rpartition("/")[2]], where)
    if "anyOf" in schema:
        branches = [next(_problems(value, branch, where), None) for branch in schema["anyOf"]]
        if None not in branches:
            yield str(branches[-1])
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(TYPES[name](value) for name in names):
        yield f"{where} must be {' or '.join(names)}, got {_show(value)}"
        return
    if "enum" in schema and not any(value == allowed and type(value) is type(allowed) for allowed in schema["enum"]):
        yield f"{where} must be one of {_show(schema['enum'])}, got {_show(value)}"
    if isinstance(value, str):
        yield from _string(value, schema, where)
    elif isinstance(value, int | float):
        yield from _number(value, schema, where)
    elif isinstance(value, list):
        yield from _array(value, schema, where)
    elif isinstance(value, dict):
        yield from _object(value, schema, where)


def _string(value: str, schema: Schema, where: str) -> Iterator[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where} must match {schema['pattern']}, got {_show(value)}"


def _number(value: float, schema: Schema, where: str) -> Iterator[str]:
    if value < schema.get("minimum", value):
        yield f"{where} must be at least {schema['minimum']}, got {_show(value)}"
    if value > schema.get("maximum", value):
        yield f"{where} must be at most {schema['maximum']}, got {_show(value)}"


def _array(value: list[Any], schema: Schema, where: str) -> Iterator[str]:
    if len(value) < schema.get("minItems", 0):
        yield f"{where} must have at least {schema['minItems']} items, got {len(value)}"
    if len(value) > schema.get("maxItems", len(value)):
        yield f"{where} must have at most {schema['maxItems']} items, got {len(value)}"
    for i, item in enumerate(value):
        yield from _problems(item, schema.get("items", {}), f"{where}[{i}]")


def _object(value: dict[str, Any], schema: Schema, where: str) -> Iterator[str]:
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{where} must have at most {schema['maxProperties']} entries, got {len(value)}"
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where} must have '{name}'"
    known = schema.get("properties", {})
    for name, item in value.items():
        inner = known.get(name, schema.get("additionalProperties", {}))
        if inner is False:
            yield f"{where} must not have '{clip(name, 40)}'"
        else:
            yield from _problems(item, inner, f"{where}, '{clip(name, 40)}'")


def _show(value: Any) -> str:
    return clip(json.dumps(value), 60)
