"""Printing: results on stdout, everything meant for a person watching on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0


@cache
def human() -> Console:
    """Return the console for people: stderr, with colour where the terminal has it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line for the person watching."""
    human().print(text, markup=False)


def complain(text: str) -> None:
    """Print one error line."""
    print(f"secateur: error: {text}", file=sys.stderr)


def out(text: str) -> None:
    """Print the result itself."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


@contextmanager
def progress(title: str, *, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield an ``on_step(step, steps)``: a bar on a terminal, elsewhere a plain line every few seconds."""
    if not show:
        yield lambda step, steps: None
    elif human().is_terminal:
        yield from _bar(title)
    else:
        yield _lines(title)


def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=human(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda step, steps: bar.update(task, completed=step, total=steps)


def _lines(title: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{title}: {100 * step // steps} %")

    return on_step
