"""Trigger inversion: for each class, the smallest change to an image that sends nearly every image there.

A backdoor is a short cut: its target is reached by a far smaller change than any other class. The idea and the outlier rule are
those of Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE S&P 2019; additive patterns of few pixels are those of Tao, Shen, Liu, An, Xu, Ma, Li, Zhang, "Better Trigger
Inversion Optimization in Backdoor Scanning", CVPR 2022; additive patterns of small norm are universal perturbations, as in
Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal Adversarial Perturbations", CVPR 2017 (arXiv:1610.08401).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import state
from ..data import holdout, sample
from ..errors import DataError, MethodError, check_choice, check_range
from ..forward import check_logits
from ..measure import wilson
from ..state import evaluating, frozen
from ..types import ImageSet, Rate, Trigger

Kind = Literal["patch", "sparse", "dense", "smooth"]
Precision = Literal["float32", "bfloat16"]

HELD_OUT = 0.2
AT_ONCE = 640  # triggered images in one batch
WARM_UP = 3  # steps at the largest size
MEMORY = 0.8  # of the running mean of the success rate
SHRINK, GROW = 0.95, 1.03
FIRST: Mapping[str, float] = {"patch": 0.15, "sparse": 0.15, "dense": 0.07, "smooth": 0.07}  # sizes to begin with, per pixel
MOST = 4  # times the first size
RATE: Mapping[str, float] = {"patch": 0.1, "sparse": 0.05, "dense": 0.2, "smooth": 0.2}
WIDE = ("dense", "smooth")  # their size is a root mean square
BANDS = 0.4  # share of the frequencies, each way, that a smooth pattern has


@dataclass(frozen=True, eq=False)
class Inverted:
    """The smallest trigger found for one class.

    Attributes:
        target: The class.
        kind: What was looked for.
        trigger: It, ready to be put on images: ``blend`` for a patch, otherwise ``add``.
        size: Its size in the measure of its kind (see `invert`).
        success: Share of held-out images of other classes that it sends to the target.
        weakest: The lowest such share of any one class.
    """

    target: int
    kind: Kind
    trigger: Trigger
    size: float
    success: Rate
    weakest: float


@dataclass(frozen=True, eq=False)
class Suspicion:
    """What the sizes of inverted triggers say about each class.

    Attributes:
        flagged: Classes held to be targets of a backdoor, the most suspect first.
        ranking: All classes examined, the most suspect first.
        shortcut: Class -> the leap above it, for the kind where it is largest; for a class above the leap at most 1.
        anomaly: Class -> the anomaly index of the same kind.
        kind: Class -> that kind.
    """

    flagged: tuple[int, ...]
    ranking: tuple[int, ...]
    shortcut: Mapping[int, float]
    anomaly: Mapping[int, float]
    kind: Mapping[int, Kind]


def invert(
    model: nn.Module,
    clean: ImageSet,
    targets: Sequence[int] | None = None,
    *,
    kind: Kind = "sparse",
    steps: int = 80,
    batch_size: int = 32,
    goal: float = 0.9,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> tuple[Inverted, ...]:
    """Find for each class the smallest trigger that sends a share ``goal`` of the images of other classes there.

    | kind | what is put on an image | size |
    |---|---|---|
    | ``patch`` | ``(1 - m) * x + m * p``, ``m`` one value per pixel | ``sum(m)`` in pixels |
    | ``sparse`` | ``clip(x + d)`` | sum over pixels of the length of ``d`` across channels |
    | ``dense`` | ``clip(x + d)`` | root mean square of ``d`` |
    | ``smooth`` | ``clip(x + d)``, ``d`` of the lowest 40 % of the frequencies each way (cosine transform) | the same |

    Each step follows the gradient of the cross-entropy to the target (Adam) and projects the trigger onto those of at most
    the present size. That size shrinks by 5 % while the running success rate is at least ``goal`` and grows by 3 % otherwise.
    All classes are inverted together, on the same images. The result is the smallest trigger whose running rate reached
    ``goal``; where none did, the last one.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images; a fifth is held out to measure success.
        targets: Classes to invert; all by default.
        kind: What to look for.
        steps: Batches, >= 1.
        batch_size: Images per batch and class, >= 1.
        goal: Success rate to keep, in [0, 1].
        precision: ``bfloat16`` is faster on processors that have it.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean``, or the fifth held out of it, is empty or of one class only.
        MethodError: An argument is out of range.
        ModelError: The network's answers are no logits of these classes.

    Differs from the authors' code of Neural Cleanse and of its successor in that a size that follows the success rate takes the
    place of a weight on the size in the loss, in that the classes are inverted together, and in that success is measured on
    images that were not used.
    """
    wanted = _check(clean, targets, kind, steps, batch_size, goal, precision)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    together = max(1, AT_ONCE // batch_size)
    found: list[Inverted] = []
    with evaluating(model), frozen(model):
        for start in range(0, len(wanted), together):
            some = wanted[start : start + together]
            search = _Search(model, clean, some, kind, _start(kind, len(some), clean.shape, generator), precision)
            for x, y in sample(fitted, batch_size, steps, device=search.device, generator=generator):
                search.step(x, y, goal)
            found += search.results(judged)
    return tuple(found)


def strengthen(
    model: nn.Module,
    clean: ImageSet,
    found: Inverted,
    factor: float,
    *,
    steps: int = 12,
    batch_size: int = 32,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> Inverted:
    """Go on from an inverted trigger at a fixed size, ``factor`` times its own, so that it works more surely.

    An attacker's trigger is larger than it need be: what was trained to resist the smallest one alone still gives way to it.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images; a fifth, not that of `invert`, is held out to measure success.
        found: From `invert`.
        factor: In [0.01, 100].
        steps: Batches, >= 1.
        batch_size: Images per batch, >= 1.
        precision: ``bfloat16`` is faster on processors that have it.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean``, or the fifth held out of it, is empty or of one class only.
        MethodError: An argument is out of range.
        ModelError: The network's answers are no logits of these classes.
    """
    _check(clean, [found.target], found.kind, steps, batch_size, 1, precision)
    check_range("factor", factor, 0.01, 100)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    with evaluating(model), frozen(model):
        tensors = found.trigger.tensors
        values = [tensors[name][None].clone() for name in ("mask", "pattern") if name in tensors]
        search = _Search(model, clean, [found.target], found.kind, values, precision)
        search.size.fill_(found.size * factor)
        for x, y in sample(fitted, batch_size, steps, device=search.device, generator=generator):
            search.step(x, y)
        [result] = search.results(judged)
    return result


def suspected(found: Sequence[Inverted], *, shortcut: float = 1.4, anomaly: float = 1.5) -> Suspicion:
    """Say which classes look like targets: those whose triggers are small, by a leap, among the triggers of their kind.

    Within each kind the sizes are sorted and the largest ratio of neighbours, the leap, is sought in the smallest fifth. A
    class below it is flagged when the leap is at least ``shortcut``, the class's anomaly index is at least ``anomaly`` and its
    trigger moves at least half of the held-out images. The anomaly index is the distance below the
    median, in units of 1.4826 times the median absolute deviation, of the logarithms of the sizes.

    A trigger that is larger than the changes to which any network gives way, such as a strong sinusoid, does not stand out.

    Args:
        found: Inverted triggers of three classes or more, of one kind or several.
        shortcut: Smallest leap, >= 1.
        anomaly: Smallest anomaly index of a flagged class, >= 0.

    Raises:
        MethodError: A threshold is out of range, or fewer than three classes of a kind were inverted.

    Differs from Neural Cleanse, which has the anomaly index of the sizes alone, in the logarithms and in ``shortcut``: with ten
    classes the median absolute deviation is so noisy that benign networks often have an index above 2.
    """
    check_range("shortcut", shortcut, 1, 1e6)
    check_range("anomaly", anomaly, 0, 1e6)
    best: dict[int, _Sign] = {}
    for kind in dict.fromkeys(each.kind for each in found):
        for sign in _signs([each for each in found if each.kind == kind], shortcut, anomaly):
            best[sign.target] = max(sign, best.get(sign.target, sign), key=_Sign.order)
    signs = sorted(best.values(), key=_Sign.order, reverse=True)
    return Suspicion(
        flagged=tuple(sign.target for sign in signs if sign.flagged),
        ranking=tuple(sign.target for sign in signs),
        shortcut={sign.target: sign.shortcut for sign in signs},
        anomaly={sign.target: sign.anomaly for sign in signs},
        kind={sign.target: sign.kind for sign in signs},
    )


@dataclass(frozen=True)
class _Sign:
    """What one kind of trigger says about one class."""

    target: int
    kind: Kind
    shortcut: float
    anomaly: float
    flagged: bool

    def order(self) -> tuple[bool, float, float]:
        """Return what makes one sign stronger than another."""
        return self.flagged, self.shortcut, self.anomaly


def _signs(group: Sequence[Inverted], shortcut: float, anomaly: float) -> Iterator[_Sign]:
    if len(group) < 3:
        raise MethodError(f"an outlier needs triggers of at least 3 classes, got {len(group)} of kind '{group[0].kind}'")
    logs = torch.tensor([each.size for each in group], dtype=torch.float64).log()
    ordered = logs.sort().values
    leaps = ordered.diff()[: max(1, len(group) // 5)]
    above, leap = float(ordered[int(leaps.argmax()) + 1]), float(leaps.max())
    below = float(ordered.quantile(0.5)) - logs
    spread = 1.4826 * float(below.abs().quantile(0.5))
    for each, log, far in zip(group, logs.tolist(), below.tolist(), strict=True):
        small, index = log < above, far / max(spread, 1e-3)
        times = math.exp(leap if small else above - log)
        outlier = small and times >= shortcut and index >= anomaly
        yield _Sign(each.target, each.kind, times, index, outlier and each.success.value >= 0.5)


class _Search:
    """The triggers of some classes while they are looked for, one row per class."""

    def __init__(
        self,
        model: nn.Module,
        clean: ImageSet,
        targets: Sequence[int],
        kind: Kind,
        values: Sequence[Tensor],
        precision: Precision,
    ) -> None:
        self.model, self.classes = model, len(clean.classes)
        self.kind: Kind = kind
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.half = precision == "bfloat16"
        self.targets = torch.tensor(targets, device=self.device)
        self.values = [value.to(self.device) for value in values]
        first = FIRST[kind] * (1 if kind in WIDE else clean.shape[1] * clean.shape[2])
        self.size = torch.full((len(targets),), first, device=self.device)
        self.largest = MOST * first
        self.slope = [torch.zeros_like(value) for value in self.values]
        self.power = [_power(kind, value) for value in self.slope]
        self.kept = [value.clone() for value in self.values]
        self.kept_size = torch.full_like(self.size, math.inf)
        self.success = torch.zeros_like(self.size)
        self.steps = 0

    def step(self, x: Tensor, y: Tensor, goal: float | None = None) -> None:
        """Take one step with a batch of clean images; the size follows the success rate where a goal is given."""
        for value in self.values:
            value.requires_grad_()
        logits = self._logits(x, self.values)
        wanted = self.targets[:, None].expand(-1, len(x))
        counted = (wanted != y).float()
        counted /= counted.sum(1, keepdim=True).clamp(min=1)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(counted)
        slopes = torch.autograd.grad((loss * counted).sum(), self.values)
        rate = ((logits.argmax(2) == wanted) * counted).sum(1)
        self.steps += 1
        weight = 1.0 if self.steps == 1 else 1 - MEMORY
        with torch.no_grad():
            self.success += weight * (rate - self.success)
            if goal is not None:
                self._keep(goal)
            self._descend(slopes)
            if goal is not None and self.steps > WARM_UP:
                self.size *= torch.where(self.success >= goal, SHRINK, GROW)
                self.size.clamp_(max=self.largest)
            _project(self.kind, self.values, self.size)

    def _logits(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Return the answers ``(targets, b, classes)`` to all images with the trigger of each target."""
        shown = _stamp(self.kind, values, x).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            logits = self.model(shown)
        return check_logits(logits, len(shown), self.classes).float().unflatten(0, (-1, len(x)))

    def _keep(self, goal: float) -> None:
        """Remember the triggers that are the smallest so far to reach the goal."""
        better = (self.success >= goal) & (self.size < self.kept_size) & (self.steps > WARM_UP)
        self.kept_size[better] = self.size[better]
        for kept, value in zip(self.kept, self.values, strict=True):
            kept[better] = value[better]

    def _descend(self, slopes: Sequence[Tensor]) -> None:
        """Take a step of Adam; the steps of dense and smooth patterns scale with their size."""
        rate = RATE[self.kind] * (self.size.view(-1, 1, 1, 1) if self.kind in WIDE else 1)
        for value, raw, slope, power in zip(self.values, slopes, self.slope, self.power, strict=True):
            given = _smooth(raw) if self.kind == "smooth" else raw
            slope.lerp_(given, 0.1)
            power.lerp_(_power(self.kind, given), 0.01)
            root = (power / (1 - 0.99**self.steps)).sqrt_().add_(1e-10)
            value.sub_(rate * slope / (1 - 0.9**self.steps) / root)

    def results(self, judged: ImageSet) -> Iterator[Inverted]:
        """Measure the triggers on held-out images."""
        never = self.kept_size.isinf()
        self.kept_size[never] = self.size[never]
        for kept, value in zip(self.kept, self.values, strict=True):
            kept[never] = value.detach()[never]
        hits, shown = self._count(judged)
        for row, target in enumerate(self.targets.tolist()):
            others = (torch.arange(self.classes) != target) & (shown > 0)
            if not others.any():
                raise DataError(
                    f"the images held out of inversion are all of class {target}; give more images of other classes"
                )
            yield Inverted(
                target,
                self.kind,
                _trigger(self.kind, [kept[row].cpu() for kept in self.kept], target),
                float(self.kept_size[row]),
                wilson(int(hits[row, others].sum()), int(shown[others].sum())),
                float((hits[row, others] / shown[others]).min()),
            )

    def _count(self, judged: ImageSet) -> tuple[Tensor, Tensor]:
        """Return the images of each class sent to each target ``(targets, classes)``, and how many there are of each."""
        hits = torch.zeros(len(self.targets), self.classes)
        with torch.inference_mode():
            for x, y in judged.batches(max(1, state.batch_size(AT_ONCE) // len(self.targets))):
                sent = self._logits(x.to(self.device), self.kept).argmax(2) == self.targets[:, None]
                hits.index_add_(1, y, sent.float().cpu())
        return hits, judged.y.bincount(minlength=self.classes)


def _start(kind: Kind, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
    """Return a half-transparent random patch over the whole image, or no change at all."""
    c, h, w = shape
    if kind == "patch":
        return [torch.full((count, 1, h, w), 0.5), torch.rand(count, c, h, w, generator=generator)]
    return [torch.zeros(count, c, h, w)]


def _stamp(kind: Kind, values: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return each image with each trigger, ``(triggers, b, c, h, w)``."""
    if kind == "patch":
        mask, pattern = (value[:, None] for value in values)
        return x + mask * (pattern - x)
    return (x + values[0][:, None]).clamp(0, 1)


def _power(kind: Kind, slope: Tensor) -> Tensor:
    """Return the squared slope; a wide pattern has one for all its pixels, so that their steps keep their proportions."""
    return slope.square().mean((1, 2, 3), keepdim=True) if kind in WIDE else slope.square()


def _project(kind: Kind, values: Sequence[Tensor], size: Tensor) -> None:
    """Move each trigger to the nearest one of at most its size, in place."""
    if kind == "patch":
        mask, pattern = values
        pattern.clamp_(0, 1)
        mask.copy_(to_budget(mask.flatten(1), size, 1.0).view_as(mask))
        return
    [change] = values
    if kind in WIDE:
        now = change.square().mean((1, 2, 3)).sqrt()
        change.mul_((size / now.clamp(min=1e-12)).clamp(max=1).view(-1, 1, 1, 1))
        return
    change.clamp_(-1, 1)
    length = change.norm(dim=1, keepdim=True)
    change.mul_(to_budget(length.flatten(1), size).view_as(length) / length.clamp(min=1e-12))


def _smooth(values: Tensor) -> Tensor:
    """Take the high frequencies out, ``(..., h, w)``."""
    rows, columns = (_low_pass(side).to(values) for side in values.shape[-2:])
    return rows @ values @ columns


def _low_pass(side: int) -> Tensor:
    """Return the projection ``(side, side)`` onto the lowest frequencies of the cosine transform (DCT-II)."""
    bands = torch.arange(max(1, round(BANDS * side)))[:, None]
    waves = torch.cos(math.pi / side * bands * (torch.arange(side) + 0.5))
    waves /= waves.norm(dim=1, keepdim=True)
    return waves.T @ waves


def to_budget(values: Tensor, budget: Tensor, top: float = math.inf) -> Tensor:
    """Project each row onto the points in [0, ``top``] whose sum is at most its budget (``clip(row - t)``, t by bisection)."""
    low = torch.zeros_like(budget)
    high = values.amax(1).clamp(min=0)
    fits = values.clamp(0, top).sum(1) <= budget
    for _ in range(30):
        middle = (low + high) / 2
        over = (values - middle[:, None]).clamp(0, top).sum(1) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (values - torch.where(fits, 0, high)[:, None]).clamp(0, top)


def _trigger(kind: Kind, values: Sequence[Tensor], target: int) -> Trigger:
    if kind == "patch":
        return Trigger("blend", {"alpha": 1.0}, {"mask": values[0], "pattern": values[1]}, target)
    return Trigger("add", {}, {"pattern": values[0].clamp(-1, 1)}, target)


def _check(
    clean: ImageSet, targets: Sequence[int] | None, kind: str, steps: int, batch_size: int, goal: float, precision: str
) -> list[int]:
    """Return the classes to invert."""
    check_choice("kind", kind, get_args(Kind))
    check_choice("precision", precision, get_args(Precision))
    check_range("steps", steps, 1, 2**31)
    check_range("batch_size", batch_size, 1, 2**31)
    check_range("goal", goal, 0, 1)
    wanted = list(range(len(clean.classes)) if targets is None else targets)
    for target in wanted:
        check_range("target", target, 0, len(clean.classes) - 1)
    if len(clean.y.unique()) < 2:
        raise DataError(f"inversion needs clean images of at least 2 classes, got {len(clean.y.unique())}")
    return wanted
