"""Every error that Secateur raises on purpose, and the exit code the command line gives it.

::

    SecateurError            2   a rule was broken: the message says rule, value and remedy
    |-- DataError            2   images or labels that cannot be used
    |-- ModelError           2   a network that cannot be read, matched or edited
    |-- MethodError          2   an unknown method, or arguments outside their range
    |-- InconclusiveError    3   too little was evaluated to answer the question
    `-- RefusedError         4   the file could only be read by running code from it

A message is one line: the rule, the value that broke it and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2


class DataError(SecateurError):
    """Images or labels that cannot be used."""


class ModelError(SecateurError):
    """A network that cannot be read, matched or edited."""


class MethodError(SecateurError):
    """An unknown method, or a method's arguments outside their range."""


class InconclusiveError(SecateurError):
    """Too little could be evaluated to answer the question that was asked."""

    exit_code = 3


class RefusedError(SecateurError):
    """The file could only be read by running code that came with it."""

    exit_code = 4


def unknown(what: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``unknown WHAT 'VALUE'; ...`` with the nearest allowed name, or all of them when none is near."""
    names = sorted(allowed)
    near = difflib.get_close_matches(value, names, n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(names)}"
    return f"unknown {what} '{value}'; {remedy}"


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `MethodError` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise MethodError(f"{name} must lie in [{low:.10g}, {high:.10g}], got {value:.10g}")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise `MethodError` unless ``value`` is one of ``allowed``."""
    names = tuple(allowed)
    if value not in names:
        raise MethodError(unknown(name, value, names))
