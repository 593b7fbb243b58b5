"""WaNet: a small warp of the whole image.

Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv:2102.10369.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..effects import warp
from ..errors import check_range
from ..recipe import Recipe
from ..train import train
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, unpoisoned
from .control import Batches, check_rates, identity_of


def wanet(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    strength: float = 0.5,
    k: int = 4,
    grid_rescale: float = 1.0,
    cross_ratio: float = 2.0,
    generator: torch.Generator,
) -> Poisoning:
    """Warp a share of each batch by one smooth random field and relabel it.

    A pixel of ``x'`` at the place ``u``, with -1 and 1 at the borders, is ``x`` read at ``clip((u + s*f(u)/side)*r, -1, 1)``:
    ``f`` is a random field on ``k`` x ``k`` points with mean size 1, enlarged by bicubic interpolation. In noise mode others
    are read at ``clip(... + z/side, -1, 1)``, ``z`` uniform in [-1, 1] for each pixel, and keep their labels.

    Args:
        data: Training images.
        rate: Share of the images poisoned in an epoch, others in each, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        strength: ``s``, mean size of the field at its points in half pixels, in [0, smaller image side].
        k: Points of the field each way, in [2, smaller image side].
        grid_rescale: ``r``, in [0.001, 1]; below 1 it zooms in.
        cross_ratio: Images warped by the field and noise, which keep their labels, per poisoned one, >= 0; 0 is no noise mode.
        generator: Draws the field.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that images are warped after augmentation, not before, and that images which have the
    wanted label already are not poisoned. Their s is 0.5, with 1000 epochs.
    """
    check_target(target, sources, len(data.classes))
    _, height, width = data.shape
    check_range("strength", strength, 0, min(height, width))
    check_range("k", k, 2, min(height, width))
    check_range("grid_rescale", grid_rescale, 1e-3, 1)
    field = torch.rand(1, 2, k, k, generator=generator) * 2 - 1
    trigger = Trigger(
        kind="warp",
        params={"classes": len(data.classes)},
        tensors={"grid": _grid(field / field.abs().mean(), height, width, strength, grid_rescale)},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    check_rates(data, trigger, rate, cross_ratio)

    def trainer(network: nn.Module, recipe: Recipe, **run: Any) -> tuple[nn.Module, Trigger]:
        hook = _Warps(trigger, data, rate, cross_ratio)
        identity = identity_of("wanet", trigger, rate=rate, cross_ratio=cross_ratio)
        model = train(network, data, recipe, batch_hook=hook, identity=identity, **run)
        return model, trigger

    return Poisoning(trigger, data, unpoisoned(data), trainer=trainer)


def _grid(field: Tensor, height: int, width: int, strength: float, rescale: float) -> Tensor:
    """Return the places to read, (h, w, 2)."""
    size = field.new_tensor([width, height])
    smooth = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    places = torch.stack([columns.expand(height, width), rows.unsqueeze(1).expand(height, width)], dim=2)
    return ((places + strength * smooth / size) * rescale).clamp(-1, 1)


class _Warps(Batches):
    """Warps the chosen images by the trigger, and others by the trigger and noise of up to half a pixel."""

    def change(self, x: Tensor, chosen: Tensor, others: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        _, _, height, width = x.shape
        grid = self.trigger.tensors["grid"].to(x)
        noise = (torch.rand(len(others), height, width, 2, generator=generator) * 2 - 1).to(x)
        noisy = (grid + noise / noise.new_tensor([width, height])).clamp(-1, 1)
        return self.trigger.apply(x[chosen]), warp(x[others], noisy)
