"""CLP-aware: a backdoor in channels that do not stand out by their Lipschitz bounds.

The defence: Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv:2208.03111),
which cuts each channel whose bound is more than ``u`` standard deviations above the mean of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MethodError, check_range
from ..prune.lipschitz import LEAST, bounded_layers, channel_bounds
from ..recipe import Recipe
from ..train import train
from ..types import ImageSet, Poisoning, Trigger
from .bases import Base, poison_with
from .common import Target
from .control import identity_of


def clp_aware(
    data: ImageSet,
    *,
    attack: Base = "badnets",
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    deviations: float = 2.0,
    weight: float = 0.03,
    generator: torch.Generator,
) -> Poisoning:
    """Train on poisoned images with a penalty on channels whose Lipschitz bound stands out in its layer.

    The loss gets ``weight * sum_k max(0, (L_k - mean L) / std L - deviations)`` of each layer, where channel ``k`` with filter
    ``W_k`` and batch-norm ``gamma, var`` has ``L_k = sigma_max(W_k) * |gamma_k| / (var_k + eps)^(1/2)``, and ``sigma_max`` is
    the largest singular value of the filter as a matrix of inputs by places.

    Args:
        data: Training images.
        attack: The backdoor: ``badnets``, ``blended`` or ``sig`` (with changed labels).
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        deviations: Standard deviations above the mean of its layer that a channel may lie, >= 0; the defence cuts from 3.
        weight: Of the penalty, >= 0.
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range; when training, the network has no convolution.
        ModelError: When training, the network cannot be traced.

    The attack is this project's own: the paper of the defence tries none that knows it.
    """
    check_range("deviations", deviations, 0, 1e6)
    check_range("weight", weight, 0, 1e6)
    poisoning = poison_with(attack, data, rate=rate, target=target, sources=sources, generator=generator)

    def trainer(network: nn.Module, recipe: Recipe, **run: Any) -> tuple[nn.Module, Trigger]:
        layers = bounded_layers(network, data.shape)
        if not layers:
            raise MethodError("clp-aware needs a network with convolutions, got one without")

        def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                excess = [standing_out(bounds, deviations) for bounds in channel_bounds(model, layers).values()]
                return weight * torch.stack(excess).sum()

        assert poisoning.trigger is not None
        identity = identity_of("clp-aware", poisoning.trigger, deviations=deviations, weight=weight)
        model = train(network, poisoning.data, recipe, penalty=penalty, identity=identity, **run)
        return model, poisoning.trigger

    return replace(poisoning, trainer=trainer)


def standing_out(bounds: Tensor, deviations: float) -> Tensor:
    """Return by how many standard deviations channels lie above ``mean + deviations*std`` of their layer, summed."""
    if len(bounds) < 2:
        return bounds.sum() * 0
    return F.relu((bounds - bounds.mean()) / bounds.std().clamp_min(LEAST) - deviations).sum()
