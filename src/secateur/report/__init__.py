"""Renders results and computes nothing: text, JSON, SARIF, Markdown and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MethodError, unknown
from .markdown import to_markdown
from .record import read_result, to_json
from .sarif import record_to_sarif
from .text import to_text

FORMATS = ("html", "md", "json", "sarif", "text")
__all__ = ["FORMATS", "read_result", "render", "to_html", "to_json", "to_markdown", "to_text"]


def to_html(result: Mapping[str, Any]) -> str:
    """Return a record as one self-contained page; loads the template engine on first use."""
    from .html import to_html as page

    return page(result)


def render(result: Mapping[str, Any], format: str) -> str:
    """Return a record in one of `FORMATS`.

    Raises:
        MethodError: There is no such format.
    """
    renderers = {"html": to_html, "md": to_markdown, "json": to_json, "sarif": record_to_sarif, "text": to_text}
    if format not in renderers:
        raise MethodError(unknown("format", format, renderers))
    return renderers[format](result)
