"""Statistics over the cells of a table: means with intervals, paired differences, ranks. The one place for them.

A cell belongs to a block ``(victim seed, repair seed)``. Repairs of one victim share its network and are no independent
repeats: their values are averaged within the victim first, and every interval is over victims (n = victims).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import InconclusiveError

Block = tuple[int, int | None]
DIGITS = 12  # to which values count as tied: beyond it, differences of rates are rounding errors


@dataclass(frozen=True)
class Summary:
    """A mean over victims.

    Attributes:
        mean: Arithmetic mean, in the unit of the values.
        sd: Sample standard deviation; None for one value.
        low: Lower end of the 95 % t-interval of the mean, not clipped to the values' range; None for one value.
        high: Upper end.
        n: Number of values.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """The difference of two methods on the same blocks.

    Attributes:
        mean: Mean difference, averaged within each victim first.
        low: Lower end of its 95 % t-interval over victims; None for one victim.
        high: Upper end.
        p: Two-sided p-value over victims (`signed_rank_p`); None for one victim.
        n: Number of victims.
        blocks: Number of blocks that both methods have.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    blocks: int


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of methods.

    Attributes:
        mean: Method -> mean rank; 1 is best.
        blocks: Number of blocks averaged over.
    """

    mean: Mapping[str, float]
    blocks: int


def summary(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and 95 % interval of the mean of independent ``values``.

    Raises:
        InconclusiveError: There is no value.

    Source: Student, Biometrika 6 (1908).
    """
    n = len(values)
    if n == 0:
        raise InconclusiveError("a mean needs at least one value, got 0")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(mean, None, None, None, 1)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _t(n - 1) * sd / math.sqrt(n)
    return Summary(mean, sd, mean - half, mean + half, n)


def by_victim(values: Mapping[Block, float]) -> list[float]:
    """Return one value per victim: the mean over its repair seeds."""
    victims: dict[int, list[float]] = {}
    for (victim, _), value in values.items():
        victims.setdefault(victim, []).append(value)
    return [math.fsum(found) / len(found) for found in victims.values()]


def paired(a: Mapping[Block, float], b: Mapping[Block, float]) -> Paired:
    """Return the difference ``a - b`` over the blocks that both have.

    Raises:
        InconclusiveError: They have no block in common.

    Sources: Student, Biometrika 6 (1908), for the interval; Demšar, JMLR 7 (2006), section 3.1, for the test.
    """
    common = {block: value - b[block] for block, value in a.items() if block in b}
    if not common:
        raise InconclusiveError("a paired difference needs at least one block that both methods have, got 0")
    differences = by_victim(common)
    total = summary(differences)
    p = signed_rank_p(differences) if total.n > 1 else None
    return Paired(total.mean, total.low, total.high, p, total.n, len(common))


def signed_rank_p(differences: Iterable[float]) -> float:
    """Return the two-sided p-value that ``differences`` are symmetric about 0 (Wilcoxon signed-rank test).

    Exact with ties as well: the distribution is that over all signs of the ranks at hand. Zeros are left out. For 5 differences
    the smallest possible value is 0.0625.

    Source: Wilcoxon, Biometrics Bulletin 1 (1945).
    """
    import numpy as np

    kept = [value for value in differences if round(value, DIGITS)]
    ranks = [round(2 * rank) for rank in _ranks([abs(value) for value in kept])]  # doubled, so that mid-ranks are whole
    total = sum(ranks)
    chance = np.zeros(total + 1)  # [s]: of the positive ranks having the sum s
    chance[0] = 1
    for rank in ranks:
        with_rank = np.zeros(total + 1)
        with_rank[rank:] = chance[: total + 1 - rank]
        chance = (chance + with_rank) / 2
    positive = sum(rank for rank, value in zip(ranks, kept, strict=True) if value > 0)
    far = np.abs(2 * np.arange(total + 1) - total) >= abs(2 * positive - total)
    return min(1.0, float(chance[far].sum()))


def mean_ranks(blocks: Iterable[Mapping[str, float | None]], *, lower: bool) -> Ranks:
    """Return the mean rank of each method over blocks; tied methods share the mean of their ranks.

    A method that failed in a block (None, or absent) ranks behind all that did not: it gets the worst rank there, and several
    such methods share the last ranks.

    Args:
        blocks: Method -> value, one mapping per block.
        lower: Whether lower values are better.

    Source: Demšar, JMLR 7 (2006), section 3.2.
    """
    found = list(blocks)
    methods = list(dict.fromkeys(method for block in found for method in block))
    sums = dict.fromkeys(methods, 0.0)
    for block in found:
        values = [block.get(method) for method in methods]
        keyed = [math.inf if value is None else value if lower else -value for value in values]
        for method, rank in zip(methods, _ranks(keyed), strict=True):
            sums[method] += rank
    return Ranks({method: total / len(found) for method, total in sums.items()}, len(found))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ascending ranks from 1; ties share the mean of theirs."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(round(value, DIGITS) for value in values), start=1):
        places.setdefault(value, []).append(place)
    shared = {value: (found[0] + found[-1]) / 2 for value, found in places.items()}
    return [shared[round(value, DIGITS)] for value in values]


@cache
def _t(df: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.975))
