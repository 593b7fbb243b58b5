"""Counts out of n, without what takes long to import (torch, and SciPy until it is needed)."""

from __future__ import annotations

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of ``hits / n``, ``n >= 1``.

    Source: Wilson, JASA 22 (1927).
    """
    share, weight = hits / n, Z * Z / n
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    return (middle - half if hits else 0.0), (middle + half if hits < n else 1.0)


def tail(hits: int, n: int, p: float = 0.5) -> float:
    """Return how probable so many hits or more out of ``n`` are, each having the probability ``p``."""
    from scipy.special import bdtrc

    return float(bdtrc(hits - 1, n, p)) if hits > 0 else 1.0
