"""A record as Markdown, for pull requests, model cards and notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .parts import Section, Table
from .sections import headline, method_line, sections
from .wording import plain


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return a record as GitHub-flavoured Markdown in which no string of the record acts as HTML, link or table."""
    lines = [f"# {escape(headline(result))}", "", f"Method: {escape(method_line(result))}", ""]
    for section in sections(result):
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Return ``text`` so that Markdown shows it letter by letter, not as HTML, link or table border."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|!~]|:(?=//))", r"\\\1", text)


def _section(section: Section) -> Iterator[str]:
    yield from (f"## {escape(section.title)}", "")
    if section.lines:
        yield from (*(f"- {escape(line)}" for line in section.lines), "")
    if section.code:
        yield from (f"    {section.code}", "")
    for table in section.tables:
        yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield from (f"### {escape(table.caption)}", "")
    yield _row(map(escape, table.head))
    yield _row("---" for _ in table.head)
    for row in table.rows:
        yield _row(escape(cell.text) for cell in row)
    yield ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
