"""From scores to a mask: order, scope and amount.

Selection goes by rank, so that exactly the number asked for is cut, also among ties: these break by layer order, then by index.
Only `Below` and `Outliers`, whose rules are thresholds, cut by value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction as Rational
from typing import Literal

import torch
from torch import Tensor

from ..errors import MethodError, check_choice, check_range
from ..types import ChannelMask, HardMask, Scores, WeightMask

Order = Literal["smallest", "largest"]
Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Count:
    """Cut this many: per layer, or in all when the scope is global."""

    count: int


@dataclass(frozen=True)
class Fraction:
    """Cut this share, in [0, 1], rounded down: of each layer, or of all when the scope is global."""

    fraction: float


@dataclass(frozen=True)
class Compression:
    """Cut weights until the whole model has ``total / compression`` parameters left that are not pruned, as GAP computes it.

    Every parameter counts in ``total``; what has no score (biases, norms, layers left out) cannot be cut. With the scope
    ``layer`` each layer gives nearly the same share, and the sum is exact.

    Attributes:
        compression: What to reach, >= 1.
        total: All parameters.
        before: Name -> how many entries were cut before. They count; those that are ranked have an infinite score, so that
            they go first.
    """

    compression: float
    total: int
    before: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Below:
    """Cut every score below this threshold (above it, when the largest go first)."""

    threshold: float


@dataclass(frozen=True)
class Outliers:
    """Cut scores more than ``k`` standard deviations below (above) the mean, per layer or over all."""

    k: float


@dataclass(frozen=True)
class Until:
    """Cut until clean accuracy has fallen by ``drop``: the last step of the scan before the first crossing.

    The scan goes up in ``step`` shares. The crossing is judged on the clean images, paired image by image.
    """

    drop: float
    step: float = 0.05


FixedAmount = Count | Fraction | Compression | Below | Outliers
Amount = FixedAmount | Until


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores put in the order in which they are cut; made once and cut many times.

    Attributes:
        scores: The scores that were ranked.
        order: Which end goes first.
        scope: Whether each layer has its own ranking.
        pools: Flat indices in cutting order, one tensor per pool (a layer, or everything).
    """

    scores: Scores
    order: Order
    scope: Scope
    pools: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """How many entries are ranked."""
        return sum(len(pool) for pool in self.pools)

    def cut(self, amount: FixedAmount) -> HardMask:
        """Return the mask that cuts ``amount``.

        Raises:
            MethodError: The amount is out of range.
        """
        flat = torch.ones(self.size, dtype=torch.bool)
        if isinstance(amount, Below | Outliers):
            values = torch.cat([v.flatten() for v in self.scores.values.values()]).double().cpu()
            for pool in self.pools:
                flat[pool] = ~self._beyond(values[pool], amount)
            return self._mask(flat)
        for pool, count in zip(self.pools, self._counts(amount), strict=True):
            flat[pool[:count]] = False
        return self._mask(flat)

    def _beyond(self, values: Tensor, amount: Below | Outliers) -> Tensor:
        sign = 1 if self.order == "smallest" else -1
        if isinstance(amount, Below):
            return sign * values < sign * amount.threshold
        if len(values) < 2:
            return torch.zeros(len(values), dtype=torch.bool)
        return sign * values < sign * values.mean() - amount.k * values.std()

    def _counts(self, amount: Count | Fraction | Compression) -> list[int]:
        """Return how many entries go from each pool."""
        sizes = [len(pool) for pool in self.pools]
        if isinstance(amount, Count):
            for size in sizes:
                check_range("count", amount.count, 0, size)
            return [amount.count] * len(sizes)
        if isinstance(amount, Fraction):
            check_range("fraction", amount.fraction, 0, 1)
            return [int(amount.fraction * size + 1e-9) for size in sizes]
        return shared(self._compress(amount), sizes, least=self._gone())

    def _compress(self, amount: Compression) -> int:
        """Return how many entries go in all."""
        if self.scores.granularity != "weight":
            raise MethodError("a target compression needs weight scores; use a count or a fraction for channels")
        check_range("total", amount.total, self.size, 2**62)
        elsewhere = sum(count for name, count in amount.before.items() if name not in self.scores.values)
        most = amount.total / max(amount.total - elsewhere - self.size, 1)
        if not 1 <= amount.compression <= most:
            raise MethodError(
                f"target compression must lie in [1, {math.floor(most * 100) / 100:g}], got {amount.compression:g}"
            )
        return min(self.size, max(0, amount.total - elsewhere - round(amount.total / amount.compression)))

    def _gone(self) -> list[int]:
        """Return how many entries of each pool go before any other: those of an infinite score."""
        first = -math.inf if self.order == "smallest" else math.inf
        values = torch.cat([v.flatten().cpu() for v in self.scores.values.values()])
        return [int((values[pool] == first).sum()) for pool in self.pools]

    def _mask(self, flat: Tensor) -> HardMask:
        keep, start = {}, 0
        for name, values in self.scores.values.items():
            keep[name] = flat[start : start + values.numel()].reshape(values.shape)
            start += values.numel()
        return WeightMask(keep) if self.scores.granularity == "weight" else ChannelMask(keep)


def shared(cut: int, sizes: Sequence[int], *, least: Sequence[int] | None = None) -> list[int]:
    """Share a cut among pools, each nearly in proportion to its size, so that the parts add up to it.

    By Webster's method: of ``(j - 1/2) / size`` over all pools and ``j = 1..size`` the smallest ``cut`` are taken, ties in
    order. So a larger cut never takes less from any pool, which rounding by largest remainders does not promise.

    Args:
        cut: How many go, at most the sum of ``sizes``.
        sizes: Entries of each pool.
        least: How many go from each pool in any case; without meaning where these alone are more than ``cut``.
    """
    if least is None or sum(least) > cut:
        least = [0] * len(sizes)
    settled: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in settled]
        counts = list(least)
        parts = _webster(cut - sum(least[i] for i in settled), [sizes[i] for i in rest])
        for i, part in zip(rest, parts, strict=True):
            counts[i] = part
        short = {i for i in rest if counts[i] < least[i]}
        if not short:
            return counts
        settled |= short


def _webster(cut: int, sizes: Sequence[int]) -> list[int]:
    total = sum(sizes)
    counts = [(2 * cut * size + total) // (2 * total) if total else 0 for size in sizes]
    while (off := cut - sum(counts)) != 0:
        if off > 0:
            nearest = min(
                (i for i, size in enumerate(sizes) if counts[i] < size), key=lambda i: _turn(counts[i] + 1, sizes[i], i)
            )
            counts[nearest] += 1
        else:
            last = max((i for i, count in enumerate(counts) if count), key=lambda i: _turn(counts[i], sizes[i], i))
            counts[last] -= 1
    return counts


def _turn(number: int, size: int, pool: int) -> tuple[Rational, int]:
    return Rational(2 * number - 1, 2 * size), pool


def rank(scores: Scores, *, order: Order = "smallest", scope: Scope = "layer") -> Ranking:
    """Rank scores for cutting.

    Args:
        scores: Larger = more important.
        order: ``smallest`` scores are cut first, or ``largest``.
        scope: One ranking per ``layer``, or one ``global``.

    Raises:
        MethodError: There is nothing to rank, or a score is not a number.
    """
    check_choice("order", order, ("smallest", "largest"))
    check_choice("scope", scope, ("layer", "global"))
    if not scores.values:
        raise MethodError("there is nothing to prune: no layer in the scope has scores")
    for name, values in scores.values.items():
        if bool(values.isnan().any()):
            raise MethodError(f"scores must be numbers, got NaN in '{name}'")
    layers = [values.flatten().cpu() for values in scores.values.values()]
    pools = layers if scope == "layer" else [torch.cat(layers)]
    ranked, start = [], 0
    for pool in pools:
        ranked.append(start + torch.sort(pool, descending=order == "largest", stable=True).indices)
        start += len(pool)
    return Ranking(scores, order, scope, tuple(ranked))


def select(scores: Scores, amount: FixedAmount, *, order: Order = "smallest", scope: Scope = "layer") -> HardMask:
    """Return the mask that cuts ``amount`` from ``scores``: `rank` and `Ranking.cut` in one call."""
    return rank(scores, order=order, scope=scope).cut(amount)


def restrict(scores: Scores, layers: Mapping[str, str], chosen: frozenset[str]) -> Scores:
    """Return the scores of the chosen layers; ``layers`` maps each score's name to its layer."""
    return Scores({name: v for name, v in scores.values.items() if layers[name] in chosen}, scores.granularity)
