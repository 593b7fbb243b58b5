"""What an attack does inside a network: feature maps of clean and of adversarial images, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import state
from ..errors import DataError, InconclusiveError, ModelError, check_range, unknown
from ..models import core, stages
from ..state import evaluating
from ..types import to_float

Watch = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Histogram:
    """How many values lie between one edge and the next.

    Attributes:
        edges: Ascending, one more than counts; two histograms of one thing share them.
        counts: Values in ``[edge, next edge)``; the last edge belongs to the last bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Mean:
    """A mean over images with its 95 % interval (Student's t)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class StageShift:
    """What an attack does to the feature maps ``f`` at the end of one stage, ``d = f(x') - f(x)``.

    Attributes:
        stage: The module whose output it is, relative to ``core(model)``.
        low: Least value of ``f(x)`` over all images.
        high: Largest.
        clean: Values of ``f(x)``.
        adversarial: Values of ``f(x')``, between the same edges.
        l2: ``|d|_2 / |f(x)|_2`` of each image, as a mean over the images whose ``f(x)`` is not 0;
            None if there are fewer than two.
        largest: ``max |d| / (high - low)`` over all images; None where ``f(x)`` is one constant.
        channels: Of each channel ``sqrt(sum d^2 / sum f(x)^2)``, summed over images and places; None where ``f(x)`` is 0
            throughout.
    """

    stage: str
    low: float
    high: float
    clean: Histogram
    adversarial: Histogram
    l2: Mean | None
    largest: float | None
    channels: tuple[float | None, ...]


def layer_study(
    model: nn.Module,
    clean: Tensor,
    adversarial: Tensor,
    *,
    after: Sequence[str] | None = None,
    bins: int = 60,
    batch_size: int = 128,
) -> tuple[StageShift, ...]:
    """Compare the feature maps of images with those of the same images under attack.

    Two passes, of which only sums, counts and ranges stay: the first finds the ranges, the second fills the histograms.

    Args:
        model: Takes images in [0, 1]; left as it was, run in eval mode.
        clean: Images, float32 in [0, 1] or uint8, ``(n, c, h, w)``, at least two.
        adversarial: The same images under attack.
        after: At the outputs of which modules to look; by default the ends of all `models.stages`.
        bins: Of each histogram, >= 1.
        batch_size: Images at once.

    Returns:
        One entry per stage, in the order given.

    Raises:
        DataError: The two sets of images do not go together.
        InconclusiveError: There are fewer than two images.
        MethodError: ``bins`` is out of range or there is no such module.
        ModelError: A module does not return one tensor each time that the network answers, or one with NaN.
    """
    check_range("bins", bins, 1, 10_000)
    if clean.shape != adversarial.shape:
        raise DataError(f"clean and adversarial images must match, got {tuple(clean.shape)} and {tuple(adversarial.shape)}")
    if len(clean) < 2:
        raise InconclusiveError(f"a study of layers needs at least two images, got {len(clean)}")
    with watching(model, after) as watch:
        sums: dict[str, _Sums] = {}
        for f, g in _pairs(watch, clean, adversarial, batch_size):
            for stage, values in f.items():
                sums.setdefault(stage, _Sums()).add(values, g[stage])
        counts = {stage: torch.zeros(2, bins, dtype=torch.int64) for stage in sums}
        for f, g in _pairs(watch, clean, adversarial, batch_size):
            for stage, seen in sums.items():
                for row, values in enumerate((f[stage], g[stage])):
                    counts[stage][row] += count(values, *seen.range, bins)
    return tuple(seen.shift(stage, counts[stage]) for stage, seen in sums.items())


@contextmanager
def watching(model: nn.Module, after: Sequence[str] | None = None) -> Iterator[Watch]:
    """Give a function from images, float in [0, 1], to the outputs of modules, detached, by name; then take the hooks off.

    Args:
        model: Left as it was, run in eval mode.
        after: Names relative to ``core(model)``; by default the ends of all `models.stages`.

    Raises:
        ModelError: There is no such module; from the function: a module ran more or less than once, or did not return a tensor.
    """
    modules = dict(core(model).named_modules())
    names = stages(model) if after is None else tuple(after)
    for name in names:
        if name not in modules:
            raise ModelError(unknown("layer", name, filter(None, modules)))
    if not names:
        raise ModelError("the network has no stages to look at; name layers")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen: dict[str, list[object]] = {}

    def watch(x: Tensor) -> dict[str, Tensor]:
        seen.update({name: [] for name in names})
        model(x.to(device))
        return {name: _checked(name, outputs, len(x)) for name, outputs in seen.items()}

    handles = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: seen[name].append(output)) for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _checked(name: str, outputs: list[object], n: int) -> Tensor:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        kind = f"ran {len(outputs)} times" if len(outputs) != 1 else f"returned a {type(outputs[0]).__name__}"
        raise ModelError(f"a layer to look at must return one tensor each time, but '{name}' {kind}; name other layers")
    values = outputs[0].detach().float()
    if values.ndim < 2 or len(values) != n or not values.numel():
        shape = tuple(values.shape)
        raise ModelError(f"a layer to look at must return ({n}, channels, ...) of {n} images, but '{name}' returned {shape}")
    if not bool(values.isfinite().all()):
        raise ModelError(f"feature maps must be finite, but '{name}' returned NaN or infinity")
    return values


def count(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Return how many values lie in each of ``bins`` equal parts of ``[low, high]``, int64; none may lie beyond."""
    places = ((values.flatten().double() - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    return places.bincount(minlength=bins).cpu()


def histogram(counts: Tensor, low: float, high: float) -> Histogram:
    """Return counts, int64 ``(bins,)``, with the edges that `count` had."""
    bins = len(counts)
    return Histogram(tuple(low + (high - low) * i / bins for i in range(bins + 1)), tuple(counts.tolist()))


def widened(low: float, high: float) -> tuple[float, float]:
    """Return a range of some width: around a single value, half to either side."""
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def mean_of(values: Tensor) -> Mean | None:
    """Return the mean of one number per image with its interval; None from fewer than two."""
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit

    value = float(values.double().mean())
    half = float(stdtrit(n - 1, 0.975)) * float(values.double().std()) / math.sqrt(n)
    return Mean(value, value - half, value + half, n)


def _pairs(
    watch: Watch, clean: Tensor, adversarial: Tensor, batch_size: int
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    size = state.batch_size(batch_size)
    for x, y in zip(clean.split(size), adversarial.split(size), strict=True):
        f, g = (watch(to_float(part) if part.dtype == torch.uint8 else part) for part in (x, y))
        yield f, g


class _Sums:
    """What is kept of a stage in the first pass."""

    def __init__(self) -> None:
        self._low = self._high = torch.zeros(())
        self._all_low = self._all_high = self._largest = torch.zeros(())
        self._relative: list[Tensor] = []
        self._squares: Tensor | None = None

    def add(self, f: Tensor, g: Tensor) -> None:
        d = g - f
        first = self._squares is None
        low, high = f.amin().cpu(), f.amax().cpu()
        self._low, self._high = (low, high) if first else (self._low.minimum(low), self._high.maximum(high))
        low, high = low.minimum(g.amin().cpu()), high.maximum(g.amax().cpu())
        self._all_low = low if first else self._all_low.minimum(low)
        self._all_high = high if first else self._all_high.maximum(high)
        self._largest = self._largest.maximum(d.abs().amax().cpu())
        norms, shifts = (value.flatten(1).double().norm(dim=1).cpu() for value in (f, d))
        self._relative.append((shifts / norms)[norms > 0])
        squares = torch.stack([_per_channel(d), _per_channel(f)])
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def range(self) -> tuple[float, float]:
        """The range of clean and adversarial values together."""
        return widened(float(self._all_low), float(self._all_high))

    def shift(self, stage: str, counts: Tensor) -> StageShift:
        assert self._squares is not None
        low, high = float(self._low), float(self._high)
        return StageShift(
            stage,
            low,
            high,
            histogram(counts[0], *self.range),
            histogram(counts[1], *self.range),
            mean_of(torch.cat(self._relative)),
            float(self._largest) / (high - low) if high > low else None,
            tuple(math.sqrt(d / f) if f > 0 else None for d, f in zip(*self._squares.tolist(), strict=True)),
        )


def _per_channel(values: Tensor) -> Tensor:
    """Return sums of squares per channel, float64 ``(channels,)``: dimension 1 of maps and vectors, the last of tokens."""
    squares = values.double().square()
    channels = 1 if values.ndim in (2, 4) else values.ndim - 1
    return squares.sum(dim=[dim for dim in range(values.ndim) if dim != channels]).cpu()
