"""A plan's cells and tables as files: CSV, which can be read again, and Parquet have a line per cell; JSON has all."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..errors import DataError, MethodError, check_choice
from ..report.wording import plain
from .nodes import COLUMNS, Cell, Graph
from .plan import Plan
from .tables import (
    VISIBILITY,
    Config,
    Defence,
    Difference,
    Group,
    OverAttacks,
    Row,
    State,
    aggregate,
    differences,
    over_attacks,
    rankings,
)

FORMATS = ("text", "csv", "json", "md")
FLOAT = "{:.10g}"
OWN: Mapping[str, type] = {  # columns that a row has of its own
    "removed_share": float,
    "flagged": int,
    "parameters": int,
    "nonzero": int,
    "macs": int,
    "note": str,
    "error": str,
}
COST: Mapping[str, type] = {"seconds": float, "host": str}


def render(rows: Sequence[Row], plan: Plan, format: str, *, with_cost: bool = False) -> str:
    """Return a plan's table in one of `FORMATS`: CSV has a line per cell, the others what they add up to as well.

    Args:
        rows: All cells.
        plan: Their plan.
        format: One of `FORMATS`.
        with_cost: Also seconds and hosts, which differ from run to run.

    Raises:
        MethodError: There is no such format.
    """
    check_choice("format", format, FORMATS)
    if format == "csv":
        return _csv(rows, plan, with_cost)
    if format == "json":
        return _json(rows, plan, with_cost)
    from . import layout

    return layout.render(rows, plan, markdown=format == "md", with_cost=with_cost)


def to_parquet(path: str | Path, rows: Iterable[Row], plan: Plan, *, with_cost: bool = False) -> None:
    """Write the cells as Parquet, with the columns and the order of the CSV.

    Raises:
        MethodError: pyarrow is missing.
        DataError: The file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise MethodError("writing Parquet needs pyarrow; run: pip install secateur[parquet]") from None
    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}
    columns = _columns(plan, with_cost)
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    records = [_record(row, columns) for row in sorted(rows, key=_order)]
    try:
        pq.write_table(pyarrow.Table.from_pylist(records, schema=schema), str(path))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; name another file") from None


def read_csv(path: str | Path, plan: Plan, graph: Graph) -> list[Row]:
    """Return every cell of a plan, in the plan's order, as a CSV of `render` has it; cells that it lacks are still to do.

    Raises:
        DataError: The file cannot be read, or is not a table of this plan.
    """
    kinds = _columns(plan, with_cost=True)
    cells = {tuple(_plain(kinds[name], getattr(cell, name)) for name in COLUMNS): cell for cell in graph.cells}
    found: dict[tuple[str, ...], Row] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            needed = [name for name in kinds if name not in (*OWN, *COST, *VISIBILITY)]
            lacking = [name for name in needed if name not in (lines.fieldnames or ())]
            if lacking:
                raise ValueError(f"it has no column {', '.join(lacking)}")
            for line in lines:
                where = tuple(line[name] or "" for name in COLUMNS)
                shown = " / ".join(filter(None, where))
                if where not in cells:
                    raise ValueError(f"the plan has no cell {shown or 'without a name'}")
                if where in found:
                    raise ValueError(f"cell {shown} stands there twice")
                given = {name: _number(name, kind, line[name]) for name, kind in kinds.items() if line.get(name)}
                found[where] = _row(cells[where], given, plan)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; give a CSV that secateur bench report wrote") from None
    except (LookupError, ValueError, csv.Error) as error:  # text that is no UTF-8 is a ValueError too
        raise DataError(
            f"{path} is no table of plan '{plan.name}': {plain(str(error))}; give a CSV that secateur bench report wrote for it"
        ) from None
    return [found.get(where) or Row(cell, "todo") for where, cell in cells.items()]


def _number(name: str, kind: type, text: str | None) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text}") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {text}")
    return value


def _row(cell: Cell, given: Mapping[str, Any], plan: Plan) -> Row:
    if given.get("state") not in get_args(State):
        raise ValueError(f"state must be one of {', '.join(get_args(State))}, got {given.get('state', 'nothing')}")
    rates = {metric: _rate(metric, given) for metric in plan.metrics if metric in given}
    own = {name: given[name] for name in (*OWN, *COST) if name in given}
    visibility = {name: given[name] for name in VISIBILITY if name in given}
    return Row(cell, given["state"], rates=rates, visibility=visibility, **own)


def _rate(metric: str, given: Mapping[str, Any]) -> dict[str, Any]:
    parts = {part: given[f"{metric}_{part}"] for part in ("low", "high", "n") if f"{metric}_{part}" in given}
    value, n = given[metric], parts.get("n", 0)
    if len(parts) < 3 or not 0 <= value <= 1 or n < 1:
        raise ValueError(f"{metric} must be a share in [0, 1] with low, high and n, got {value:g}")
    return {"value": round(value * n) / n, **parts}  # of n images: exact again where the file has few digits


def _columns(plan: Plan, with_cost: bool) -> dict[str, type]:
    """Return the columns of the CSV and what they hold."""
    columns: dict[str, type] = dict.fromkeys(COLUMNS, str)
    columns |= {"clean": float, "victim_seed": int, "repair_seed": int, "state": str}
    for metric in plan.metrics:
        columns |= {metric: float, f"{metric}_low": float, f"{metric}_high": float, f"{metric}_n": int}
    if plan.studies_attacks:
        columns |= dict.fromkeys(VISIBILITY, float)
    return {**columns, **OWN, **(COST if with_cost else {})}


def _record(row: Row, columns: Iterable[str]) -> dict[str, Any]:
    values = {**vars(row.cell), **vars(row), **row.visibility}
    for metric, rate in row.rates.items():
        values |= {metric: rate["value"], **{f"{metric}_{part}": rate[part] for part in ("low", "high", "n")}}
    return {name: values.get(name) for name in columns}


def _order(row: Row) -> list[tuple[bool, Any]]:
    values = [getattr(row.cell, name) for name in COLUMNS]
    return [(value is not None, value) for value in values]  # False < True, so None comes first and is never compared


def _csv(rows: Iterable[Row], plan: Plan, with_cost: bool) -> str:
    columns = _columns(plan, with_cost)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in sorted(rows, key=_order):
        writer.writerow([_plain(columns[name], value) for name, value in _record(row, columns).items()])
    return text.getvalue()


def _plain(kind: type, value: Any) -> str:
    if value is None:
        return ""
    if kind is float:
        return FLOAT.format(value)
    return plain(str(value))


def _json(rows: Sequence[Row], plan: Plan, with_cost: bool) -> str:
    groups = aggregate(rows, plan)
    document = {
        "schema_version": 1,
        "kind": "bench",
        "plan": plan.name,
        "cells": [_cell_json(row, plan, with_cost) for row in rows],
        "groups": [_flat(group, group.config) for group in groups],
        "attacks": [_flat(row, row.defence) for row in over_attacks(rows, plan)],
        "ranks": [asdict(ranking) for ranking in rankings(rows, plan)],
        "paired": [_flat(row, row.config) for row in differences(rows, plan)],
    }
    return json.dumps(document, allow_nan=False) + "\n"


def _cell_json(row: Row, plan: Plan, with_cost: bool) -> dict[str, Any]:
    values = {**vars(row.cell), **vars(row)}
    kept = {name: values[name] for name in (*COLUMNS, "state", *OWN, *(COST if with_cost else ()))}
    return {**kept, "rates": {metric: row.rates.get(metric) for metric in plan.metrics}}


def _flat(item: Group | OverAttacks | Difference, columns: Config | Defence) -> dict[str, Any]:
    return {**columns._asdict(), **{name: value for name, value in asdict(item).items() if name not in ("config", "defence")}}
