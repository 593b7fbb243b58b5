"""Edits of whole tensors that are not masks: clamp large weights, add noise.

Every other edit of the grammar is a mask: ``zero`` is `mask.apply_mask`, ``scale`` is a `SoftMask`, ``remove`` is in
``compress``.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn

from ..errors import check_range
from ..models import core


def clamp(model: nn.Module, *, deviations: float, names: Iterable[str] | None = None) -> nn.Module:
    """Return a copy with each parameter tensor clamped to ``mean +- S*std`` of itself.

    Args:
        model: Left as it was.
        deviations: S, >= 0.
        names: Parameters to edit; all by default.
    """
    check_range("deviations", deviations, 0, 1e6)
    copy = deepcopy(model)
    chosen = None if names is None else set(names)
    with torch.no_grad():
        for name, parameter in core(copy).named_parameters():
            if (chosen is None or name in chosen) and parameter.numel() > 1:
                spread = deviations * parameter.std()
                parameter.clamp_(parameter.mean() - spread, parameter.mean() + spread)
    return copy


def noise(model: nn.Module, *, radius: float, names: Iterable[str] | None = None, generator: torch.Generator) -> nn.Module:
    """Return a copy with uniform noise from ``[-R, R]`` added to each parameter.

    Args:
        model: Left as it was.
        radius: R, >= 0.
        names: Parameters to edit; all by default.
        generator: Draws the noise.
    """
    check_range("radius", radius, 0, 1e6)
    copy = deepcopy(model)
    chosen = None if names is None else set(names)
    with torch.no_grad():
        for name, parameter in core(copy).named_parameters():
            if chosen is None or name in chosen:
                drawn = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
                parameter.add_(radius * drawn.to(parameter))
    return copy
