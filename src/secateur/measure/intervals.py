"""Rates with their uncertainty, and the paired test that compares two networks on the same images."""

from __future__ import annotations

from ..binomial import tail, wilson_interval
from ..errors import InconclusiveError
from ..types import Rate


def wilson(hits: int, n: int) -> Rate:
    """Return ``hits / n`` with its Wilson 95 % interval.

    Raises:
        InconclusiveError: ``n`` is 0.

    Source: Wilson, JASA 22 (1927).
    """
    if n == 0:
        raise InconclusiveError("a rate needs at least one image, got 0")
    return Rate(hits / n, *wilson_interval(hits, n), n)


def paired_p(lost: int, gained: int) -> float:
    """Return the one-sided p-value that more was lost than gained by chance (exact McNemar test).

    Args:
        lost: Images right before and wrong after.
        gained: Images wrong before and right after.

    Source: McNemar, Psychometrika 12 (1947).
    """
    return tail(lost, lost + gained)
