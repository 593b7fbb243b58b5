"""What an edit does to weights, and what an attack does to images, as numbers and pictures for a report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import DataError, ModelError, check_range, unknown
from ..models import core, stages
from ..types import to_float
from .layer_study import Histogram, count, histogram, widened

GAP = 2  # white pixels between images


@dataclass(frozen=True)
class WeightShift:
    """What an edit does to one parameter.

    Attributes:
        name: The parameter, relative to ``core(model)``.
        before: Its entries.
        after: Its entries once edited, between the same edges.
        changed: Share of the entries that are others than before.
        mean: Of the entries before.
        std: Of the entries before, as of a whole population.
    """

    name: str
    before: Histogram
    after: Histogram
    changed: float
    mean: float
    std: float


@dataclass(frozen=True)
class StageWeights:
    """The weights of one stage: those of convolutions and linear layers, not of norms, nor biases.

    Attributes:
        stage: The module at which it ends, relative to ``core(model)``.
        values: The weights.
        mean: Of them.
        std: Of them, as of a whole population.
        zeros: Share of them that is 0.
    """

    stage: str
    values: Histogram
    mean: float
    std: float
    zeros: float


@dataclass(frozen=True)
class Grid:
    """A picture of images above the same images under attack above the difference.

    Attributes:
        png: The picture as a PNG file.
        scale: The difference is drawn as ``0.5 + scale * (x' - x)``, so that mid-grey is no change and the largest just fits.
    """

    png: bytes
    scale: float


def weight_study(
    before: nn.Module, after: nn.Module, *, names: Sequence[str] | None = None, bins: int = 60
) -> tuple[WeightShift, ...]:
    """Compare the parameters of a network with those of the edited one.

    Args:
        before: The network.
        after: The edited one, with the same parameters.
        names: Which parameters; all by default.
        bins: Of each histogram, >= 1.

    Raises:
        MethodError: ``bins`` is out of range.
        ModelError: The two do not have the same parameters, of the same shapes, or none is called so.
    """
    check_range("bins", bins, 1, 10_000)
    old, new = (dict(core(model).named_parameters()) for model in (before, after))
    found = []
    for name in old if names is None else names:
        if name not in old or name not in new or old[name].shape != new[name].shape:
            raise ModelError(f"both networks must have the parameter '{name}' in one shape; compare it with its own edit")
        a, b = old[name].detach().double(), new[name].detach().double()
        if not bool(a.isfinite().all() & b.isfinite().all()):
            raise ModelError(f"the parameter '{name}' must be finite, got NaN or infinity; repair the network first")
        low, high = widened(float(min(a.min(), b.min())), float(max(a.max(), b.max())))
        first, second = (histogram(count(value, low, high, bins), low, high) for value in (a, b))
        changed = int((a != b).sum()) / a.numel()
        found.append(WeightShift(name, first, second, changed, float(a.mean()), float(a.std(correction=0))))
    return tuple(found)


def stage_weights(model: nn.Module, *, after: Sequence[str] | None = None, bins: int = 60) -> tuple[StageWeights, ...]:
    """Look at the weights of a network, stage by stage.

    A stage has the weights that are defined behind the stage before it, up to the end of its own module. Weights are the
    parameters called ``weight`` (or ``..._weight``) of two dimensions or more. Stages without any are left out.

    Args:
        model: Left as it was.
        after: The modules at which stages end; by default all `models.stages`.
        bins: Of each histogram, >= 1.

    Raises:
        MethodError: ``bins`` is out of range.
        ModelError: There is no such module, or a weight is NaN or infinite.
    """
    check_range("bins", bins, 1, 10_000)
    net = core(model)
    order = {name: i for i, (name, _) in enumerate(net.named_modules())}
    parts: dict[str, list[Tensor]] = {}
    ends = {stage: _end(stage, order) for stage in (stages(model) if after is None else after)}
    for name, parameter in net.named_parameters():
        at = order[name.rpartition(".")[0]]
        behind = [stage for stage, end in ends.items() if at <= end]
        if behind and parameter.ndim > 1 and name.endswith("weight"):
            parts.setdefault(min(behind, key=ends.__getitem__), []).append(parameter.detach().flatten())
    return tuple(_weights_of(stage, torch.cat(parts[stage]).double(), bins) for stage in ends if stage in parts)


def _end(stage: str, order: Mapping[str, int]) -> int:
    """Return the place of the last module within the one that a stage ends with."""
    if stage not in order:
        raise ModelError(unknown("layer", stage, filter(None, order)))
    return max(i for name, i in order.items() if f"{name}.".startswith(f"{stage}."))


def _weights_of(stage: str, values: Tensor, bins: int) -> StageWeights:
    if not bool(values.isfinite().all()):
        raise ModelError(f"weights must be finite, but those of '{stage}' hold NaN or infinity")
    low, high = widened(float(values.min()), float(values.max()))
    zeros = int((values == 0).sum()) / len(values)
    found = histogram(count(values, low, high, bins), low, high)
    return StageWeights(stage, found, float(values.mean()), float(values.std(correction=0)), zeros)


def image_grid(clean: Tensor, adversarial: Tensor, *, zoom: int = 2) -> Grid:
    """Draw images, the same under attack and the difference, one column for each.

    Args:
        clean: Images, float32 in [0, 1] or uint8, ``(n, c, h, w)``, of 1 or 3 channels.
        adversarial: The same images under attack.
        zoom: Screen pixels for each pixel, each way, >= 1.

    Raises:
        DataError: The images do not go together or cannot be drawn.
        MethodError: ``zoom`` is out of range.
    """
    check_range("zoom", zoom, 1, 64)
    x, y = (to_float(part) if part.dtype == torch.uint8 else part.detach().cpu() for part in (clean, adversarial))
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise DataError(f"images to draw must go together and have 1 or 3 channels, got {tuple(x.shape)} and {tuple(y.shape)}")
    change = y - x
    largest = float(change.abs().max())
    scale = 0.5 / largest if largest > 0 else 1.0
    n, c, h, w = x.shape
    sheet = torch.ones(c, 3 * (h + GAP) + GAP, n * (w + GAP) + GAP)
    for row, images in enumerate((x, y, 0.5 + scale * change)):
        for column, image in enumerate(images):
            top, left = GAP + row * (h + GAP), GAP + column * (w + GAP)
            sheet[:, top : top + h, left : left + w] = image
    pixels = (255 * sheet.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(pixels.squeeze(2).numpy() if c == 1 else pixels.contiguous().numpy())
    picture = picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return Grid(file.getvalue(), scale)
