"""Where runs are written, and what of the inputs is recorded."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..types import Result

RUNS = Path("secateur-runs")


def run_folder(verb: str, arguments: list[str]) -> Path:
    """Return a new folder ``secateur-runs/<stamp>-<verb>-<hash>`` and point ``latest`` at it."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    digest = hashlib.sha256(repr((stamp, arguments)).encode()).hexdigest()[:6]
    folder = RUNS / f"{stamp}-{verb}-{digest}"
    folder.mkdir(parents=True)
    latest = RUNS / "latest"
    if latest.is_symlink():
        latest.unlink()
    if not latest.exists():
        latest.symlink_to(folder.name, target_is_directory=True)
    return folder


def write_result(result: Result, folder: Path) -> None:
    """Write ``result.json`` and ``report.html``."""
    from ..report import render, to_json

    text = to_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(text, "utf-8")
    (folder / "report.html").write_text(render(json.loads(text), "html"), "utf-8")
