"""``secateur report``: show a result again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..report import read_result, render
from .console import out
from .options import Output


def report(path: Path, /, *, format: Literal["text", "html", "md", "json", "sarif"] = "text", output: Output = None) -> int:
    """Show a result as text, HTML, Markdown, JSON or SARIF.

    Args:
        path: A result.json, or a folder that holds one.
        format: How to show it.
        output: File to write to instead of stdout.
    """
    result = read_result(path / "result.json" if path.is_dir() else path)
    text = render(result, format)
    if output is None:
        out(text)
    else:
        output.write_text(text, "utf-8")
    return 0
