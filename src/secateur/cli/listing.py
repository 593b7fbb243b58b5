"""``secateur list``: what there is, without importing torch."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import MethodError, unknown
from ..methods import KINDS, Kind, Method, get, parameters, summary, table
from .console import out
from .options import Flag

PLURALS: dict[str, Kind] = {f"{kind}s": kind for kind in KINDS}


def list_methods(
    kind: Annotated[str, Parameter(help="backdoors, scores, repairs ...")] = "repairs",
    name: str | None = None,
    /,
    *,
    json: Flag = False,
) -> int:
    """List the methods of one kind, or all settings of one method.

    Args:
        name: A method; all of the kind by default.
        json: Print JSON.
    """
    if kind not in PLURALS:
        raise MethodError(unknown("kind", kind, PLURALS))
    singular = PLURALS[kind]
    rows = [get(singular, name)] if name else list(table(singular))
    if json:
        out(json_format.dumps([describe(row) for row in rows], indent=2))
    elif name:
        out(details(rows[0]))
    else:
        out("\n".join(details(row) for row in rows) or f"no {singular} methods yet")
    return 0


def describe(row: Method) -> dict[str, Any]:
    """Return one method as plain data."""
    found = parameters(row)
    attack = {"access": row.access, "visibility": row.visibility} if row.kind == "backdoor" else {}
    return {
        "kind": row.kind,
        "name": row.name,
        "version": row.version,
        "summary": summary(row),
        "paper": row.paper,
        **attack,
        "needs": sorted(row.needs),
        "settings": [{"name": p.name, "type": p.annotation, "default": p.default, "help": p.help} for p in found],
    }


def details(row: Method) -> str:
    """Return one method as text: what it does, and each setting with its default."""
    lines = [f"{row.name} (v{row.version}; {row.paper})", f"    {summary(row)}"]
    if row.kind == "backdoor":
        lines.append(f"    access: {row.access or 'not stated'}; visibility: {row.visibility or 'not stated'}")
    if row.needs:
        lines.append(f"    needs: {', '.join(f'--{need}' for need in sorted(row.needs))}")
    for parameter in parameters(row):
        default = "required" if parameter.default is None else parameter.default
        lines.append(f"    --set {parameter.name}={default}  {parameter.help}")
    return "\n".join(lines) + "\n"
