"""What sections of a report are made of: cells, tables, drawings to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import wording
from .wording import Rate, number, plain, rate

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, the exact value where the text rounds it, and what to sort by."""

    text: str
    exact: str = ""
    key: float | None = None


@dataclass(frozen=True)
class Bar:
    """The share of a layer that was removed, to be drawn."""

    share: float


@dataclass(frozen=True)
class Span:
    """A rate before and after, to be drawn with its intervals."""

    before: Rate | None
    after: Rate | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head.

    Attributes:
        head: One title per column.
        rows: The first cell of each names the row.
        caption: What the table shows, where a section has several.
        figures: One drawing per row, for renderings that draw; or none.
        figure: Title of that column.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    figures: tuple[Bar | Span | None, ...] = ()
    figure: str = ""

    def numeric(self, column: int) -> bool:
        """Return whether a column holds numbers."""
        return any(row[column].key is not None for row in self.rows)


@dataclass(frozen=True)
class Section:
    """A titled part of a report.

    Attributes:
        id: Stable name.
        title: Its heading.
        lines: Sentences.
        tables: Below the sentences.
        code: What to type, verbatim.
    """

    id: str
    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    code: str = ""


def text_cell(text: str) -> Cell:
    """Return a cell of words."""
    return Cell(plain(text))


def number_cell(value: float | None) -> Cell:
    """Return a cell of one number."""
    return Cell(wording.NOT_MEASURED) if value is None else Cell(number(value), key=value)


def rate_cell(value: Rate | None) -> Cell:
    """Return a cell of a rate with its interval."""
    return Cell(rate(value), "" if value is None else f"n = {value['n']:,}", None if value is None else value["value"])
