"""The settings of a function, read from its source without importing it.

So ``--help``, ``list`` and a plan's keys cost no torch import.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import MethodError, unknown

SIMPLE: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str, int, float),  # a layer may be called 3
    "None": (type(None),),
}
SEQUENCES = ("Sequence", "tuple", "list")


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
        module = target.partition(":")[0]
        annotation = ast.unparse(_Spelled(module).visit(deepcopy(argument.annotation))) if argument.annotation else ""
        text = None if default is None else ast.unparse(default)
        found.append(Parameter(argument.arg, annotation, text, described.get(argument.arg, "")))
    return tuple(found)


def first_sentence(target: str) -> str:
    """Return the first line of the docstring of ``module:function``."""
    return (ast.get_docstring(_definition(target)) or "").partition("\n")[0]


def check_type(name: str, value: Any, annotation: str) -> None:
    """Raise `MethodError` when numbers, or words of a closed list, are asked for and something else was given."""
    accepted: list[type] = []
    words: list[Any] = []
    for part in _parts(ast.parse(annotation, mode="eval").body if annotation else None):
        text = ast.unparse(part)
        if text in SIMPLE:
            accepted += SIMPLE[text]
        elif isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
            words += _elements(ast.literal_eval(part.slice))
        elif isinstance(part, ast.Subscript) and ast.unparse(part.value) in SEQUENCES:
            accepted += [list, tuple]
        else:
            return
    if type(value) in accepted or any(type(value) is type(word) and value == word for word in words):
        return
    if words and not accepted and isinstance(value, str):
        raise MethodError(unknown(name, value, map(str, words)))
    raise MethodError(f"{name} must be of type {annotation}, got {value!r}")


def _parts(annotation: ast.expr | None) -> list[ast.expr]:
    """Return the members of a union."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _parts(annotation.left) + _parts(annotation.right)
    return [annotation] if annotation else [ast.Name("Any")]


def _elements(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


class _Spelled(ast.NodeTransformer):
    """Writes out the names that a module gives to types: ``Scope`` becomes ``Literal['layer', 'global']``."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return what a name stands for, or the name itself."""
        return _alias(self.module, node.id) or node


@cache
def _alias(module: str, name: str) -> ast.expr | None:
    """Return the type that ``name`` stands for in a module of this package; None when it is no alias."""
    for node in _source(module).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return _Spelled(module).visit(deepcopy(node.value)) if _is_type(node.value) else None
        if isinstance(node, ast.ImportFrom) and node.level:
            for imported in node.names:
                if (imported.asname or imported.name) == name:
                    here = module.split(".") + (["__init__"] if _file(module).name == "__init__.py" else [])
                    home = [*here[: -node.level], *(node.module or "").split(".")]
                    return _alias(".".join(part for part in home if part), imported.name)
    return None


def _is_type(value: ast.expr) -> bool:
    return all(
        (isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal") or ast.unparse(part) in SIMPLE
        for part in _parts(value)
    )


@cache
def _source(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text("utf-8"))


def _file(module: str) -> Path:
    top, _, rest = module.partition(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise MethodError(f"cannot find the source of '{module}'")
    home = Path(spec.origin).parent.joinpath(*rest.split(".")) if rest else Path(spec.origin).with_suffix("")
    return home.with_suffix(".py") if home.with_suffix(".py").is_file() else home / "__init__.py"


@cache
def _definition(target: str) -> ast.FunctionDef:
    module, _, name = target.partition(":")
    for node in _source(module).body:
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
