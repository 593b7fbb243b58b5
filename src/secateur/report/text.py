"""A record as plain text for the terminal: no colours, at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from .parts import Section, Table
from .sections import headline, method_line, sections, shorten

WIDTH = 100
GAP = "  "
WORD = 12
LEFT_OUT = frozenset({"path", "trigger", "reproduce", "passed", "maps", "weights"})
ROWS = 40


def to_text(result: Mapping[str, Any]) -> str:
    """Return the summary of a record: what changed, what was found and what was not tested."""
    lines = [*_wrap(headline(result)), *_wrap(method_line(result))]
    for section in sections(result):
        if section.id not in LEFT_OUT:
            lines += _section(shorten(section, rows=ROWS, length=1000))
    return "\n".join(lines) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield from ("", section.title.upper())
    for line in section.lines:
        yield from _wrap(line, first="- ")
    for table in section.tables:
        yield from _table(table)


def _wrap(text: str, first: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def _table(table: Table) -> Iterator[str]:
    numeric = [table.numeric(i) for i in range(len(table.head))]
    if table.caption:
        yield from ("", *_wrap(f"{table.caption}:"))
    rows = [table.head, *([cell.text for cell in row] for row in table.rows)]
    widths = _fit([max(map(len, column)) for column in zip(*rows, strict=True)], numeric)
    for row in rows:
        yield from _row(row, widths, numeric)


def _fit(widths: Sequence[int], numeric: Sequence[bool]) -> list[int]:
    """Return column widths that fit: the widest made narrower until they do, words before numbers."""
    fitted = [min(width, WIDTH) for width in widths]
    while sum(fitted) + len(GAP) * (len(fitted) - 1) > WIDTH:
        words = [i for i, width in enumerate(fitted) if width > WORD and not numeric[i]]
        fitted[max(words or range(len(fitted)), key=fitted.__getitem__)] -= 1
    return fitted


def _row(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> Iterator[str]:
    wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*wrapped, fillvalue=""):
        columns = zip(parts, widths, numeric, strict=True)
        yield GAP.join(part.rjust(width) if right else part.ljust(width) for part, width, right in columns).rstrip()
