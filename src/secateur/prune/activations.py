"""Edits of feature maps between stages: rounded to n decimals, or clamped to bounds, given or taken from clean images.

After Kahsolt/adversarial-prune (github, 2022), whose ``test_step.py`` rounds after each stage of a ResNet-18 that was attacked
without rounding, and whose README describes the clamp. Both are put on as `models.wrap` puts them and can be saved in a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InconclusiveError, MethodError, check_range
from ..measure.layer_study import count, watching, widened
from ..models import stages, wrap
from ..types import ImageSet, to_float
from .edits import Edited, adaptive

BINS = 10_000  # parts of a stage's range between which a quantile is told


def edit_activations(model: nn.Module, wrappers: Iterable[Mapping[str, Any]]) -> Edited:
    """Return an edited copy; no weight changes. See `models.wrap`."""
    edited = wrap(model, wrappers)
    return Edited(edited, 0.0, adaptive(edited))


def round_activations(model: nn.Module, *, decimals: int, after: Sequence[str] | None = None) -> Edited:
    """Round what stages hand on to ``decimals`` decimals.

    Args:
        model: Left as it was.
        decimals: In [0, 8].
        after: Modules whose outputs are rounded, relative to ``core(model)``; by default the ends of all stages but the last,
            which is the answer.

    Raises:
        ModelError: ``decimals`` is out of range, or there is no such module.
    """
    return edit_activations(model, [{"after": name, "kind": "round", "decimals": decimals} for name in _between(model, after)])


def clamp_activations(model: nn.Module, *, low: float, high: float, after: Sequence[str] | None = None) -> Edited:
    """Clamp what stages hand on to ``[low, high]``.

    Args:
        model: Left as it was.
        low: Lower bound.
        high: Upper bound, >= ``low``.
        after: Modules whose outputs are clamped; by default the ends of all stages but the last.

    Raises:
        ModelError: The bounds are no range, or there is no such module.
    """
    found = [{"after": name, "kind": "clamp", "low": low, "high": high} for name in _between(model, after)]
    return edit_activations(model, found)


def clean_bounds(
    model: nn.Module,
    clean: ImageSet,
    *,
    deviations: float | None = None,
    quantile: float | None = None,
    after: Sequence[str] | None = None,
    batch_size: int = 128,
) -> list[dict[str, Any]]:
    """Return clamps, for `edit_activations`, to what clean images need: ``mean +- k*std`` of each stage, or its quantiles.

    Args:
        model: Left as it was.
        clean: Clean images; labels are not used.
        deviations: k, >= 0; the bounds do not go beyond the least and the largest value seen.
        quantile: Share q of the values, in [0.5, 1], below the upper bound and, likewise, above the lower one; told to
            within 1/10 000 of the stage's range.
        after: Modules whose outputs are to be clamped; by default the ends of all stages but the last.
        batch_size: Images at once.

    Raises:
        InconclusiveError: There are no images.
        MethodError: Not exactly one of ``deviations`` and ``quantile`` is given, or it is out of range.
        ModelError: There is no such module.
    """
    if (deviations is None) == (quantile is None):
        raise MethodError(f"give either deviations or quantile, got {deviations} and {quantile}")
    check_range("deviations", deviations or 0, 0, 1e6)
    check_range("quantile", 1 if quantile is None else quantile, 0.5, 1)
    if not len(clean):
        raise InconclusiveError("bounds need at least one clean image, got 0")
    with watching(model, _between(model, after)) as watch:
        moments: dict[str, Tensor] = {}
        for x in clean.x.split(batch_size):
            for name, values in watch(to_float(x)).items():
                moments[name] = _merged(moments.get(name), values)
        if quantile is None:
            bounds = {name: _deviating(moment, deviations or 0) for name, moment in moments.items()}
        else:
            ranges = {name: widened(*moment[:2].tolist()) for name, moment in moments.items()}
            counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in moments}
            for x in clean.x.split(batch_size):
                for name, values in watch(to_float(x)).items():
                    counts[name] += count(values, *ranges[name], BINS)
            bounds = {name: between(counts[name], *ranges[name], quantile) for name in moments}
    return [{"after": name, "kind": "clamp", "low": low, "high": high} for name, (low, high) in bounds.items()]


def _between(model: nn.Module, after: Sequence[str] | None) -> tuple[str, ...]:
    return stages(model)[:-1] if after is None else tuple(after)


def _merged(old: Tensor | None, values: Tensor) -> Tensor:
    """Return least and largest value, sum, sum of squares and number, float64, of old and new values together."""
    wide = values.double()
    number = torch.tensor(float(wide.numel())).to(wide)
    new = torch.stack([wide.amin(), wide.amax(), wide.sum(), wide.square().sum(), number]).cpu()
    if old is None:
        return new
    return torch.cat([old[:1].minimum(new[:1]), old[1:2].maximum(new[1:2]), old[2:] + new[2:]])


def _deviating(moment: Tensor, deviations: float) -> tuple[float, float]:
    low, high, total, squares, n = moment.tolist()
    mean = total / n
    spread = deviations * max(0.0, squares / n - mean**2) ** 0.5
    return max(low, mean - spread), min(high, mean + spread)


def between(counts: Tensor, low: float, high: float, share: float) -> tuple[float, float]:
    """Return the outer edges of the bins of ``[low, high]`` in which the ``1 - share`` and the ``share`` quantile lie."""
    beyond = (1 - share) * int(counts.sum())
    first = int((counts.cumsum(0) > beyond).nonzero()[0])
    last = len(counts) - 1 - int((counts.flip(0).cumsum(0) > beyond).nonzero()[0])
    width = (high - low) / len(counts)
    return low + first * width, low + (last + 1) * width
