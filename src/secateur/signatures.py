"""The settings of a function, read from its source without importing it.

So ``--help``, ``list`` and a plan's keys cost no torch import.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import MethodError

NUMBERS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "None": (type(None),)}


@dataclass(frozen=True)
class Parameter:
    """One keyword-only parameter as the source states it."""

    name: str
    annotation: str
    default: str | None
    help: str


def signature(target: str) -> tuple[Parameter, ...]:
    """Return the keyword-only parameters of ``module:function``.

    Raises:
        MethodError: The source cannot be found.
    """
    function = _definition(target)
    described = _argument_docs(ast.get_docstring(function) or "")
    found = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        text = None if default is None else ast.unparse(default)
        found.append(Parameter(argument.arg, annotation, text, described.get(argument.arg, "")))
    return tuple(found)


def first_sentence(target: str) -> str:
    """Return the first line of the docstring of ``module:function``."""
    return (ast.get_docstring(_definition(target)) or "").partition("\n")[0]


def check_type(name: str, value: Any, annotation: str) -> None:
    """Raise `MethodError` when a number is asked for and something else was given."""
    accepted = {word: NUMBERS[word] for word in annotation.split(" | ") if word in NUMBERS}
    if len(accepted) != len(annotation.split(" | ")):
        return
    if not any(type(value) in kinds for kinds in accepted.values()):
        raise MethodError(f"{name} must be of type {annotation}, got {value!r}")


@cache
def _definition(target: str) -> ast.FunctionDef:
    module, _, name = target.partition(":")
    top, _, rest = module.partition(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise MethodError(f"cannot find the source of '{target}'")
    path = Path(spec.origin).parent.joinpath(*rest.split(".")).with_suffix(".py") if rest else Path(spec.origin)
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise MethodError(f"cannot find the source of '{target}'")


def _argument_docs(docstring: str) -> dict[str, str]:
    """Return what the Args section of a Google docstring says of each argument."""
    section = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif name:
            found[name] += " " + line.strip()
    return found
