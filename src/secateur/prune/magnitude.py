"""Scores that need no data: norms of weights and filters, and chance.

Han, Pool, Tran, Dally, arXiv:1506.02626 (weights); Li, Kadav, Durdanovic, Samet, Graf, arXiv:1608.08710 (filters).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import check_choice
from ..models import core
from ..models.channels import trace_channels
from ..types import Granularity, ImageSet, Scores
from .layers import filters, prunable_layers


def l1(model: nn.Module, clean: ImageSet, *, granularity: Granularity = "weight", generator: torch.Generator) -> Scores:
    """Score by l1 norm: ``|w|`` of each weight, or ``sum |W_k|`` of the filter that writes channel ``k``.

    Args:
        model: Left as it was.
        clean: Only the shape of its images is used.
        granularity: ``weight``: the weights of convolutions and linear layers, no biases or norms. ``channel``: one score per
            filter, keyed by its site; norms that only read a stream have no filter and get no score.
        generator: Not used.

    Raises:
        ModelError: For channels, when the network cannot be traced.
    """
    return _score(model, clean, granularity, lambda rows: rows.abs().sum(dim=1))


def l2(model: nn.Module, clean: ImageSet, *, granularity: Granularity = "weight", generator: torch.Generator) -> Scores:
    """Score by l2 norm: ``|w|`` of each weight (the same ranking as `l1`), or ``(sum W_k^2)^(1/2)`` of each filter.

    Arguments and errors as in `l1`.
    """
    return _score(model, clean, granularity, lambda rows: rows.square().sum(dim=1).sqrt())


def random(model: nn.Module, clean: ImageSet, *, granularity: Granularity = "weight", generator: torch.Generator) -> Scores:
    """Score by chance, uniform in [0, 1): the control that every other score must beat.

    Arguments and errors as in `l1`; ``generator`` draws the scores.
    """
    return _score(model, clean, granularity, lambda rows: torch.rand(len(rows), generator=generator))


def _score(model: nn.Module, clean: ImageSet, granularity: Granularity, norm: Callable[[Tensor], Tensor]) -> Scores:
    check_choice("granularity", granularity, ("weight", "channel"))
    if granularity == "channel":
        rows = filters(model, trace_channels(model, clean.shape))
        return Scores({site: norm(weight) for site, weight in rows.items()}, "channel")
    parameters = dict(core(model).named_parameters())
    weights = {f"{layer}.weight": parameters[f"{layer}.weight"].detach() for layer in prunable_layers(model)}
    return Scores({name: norm(w.reshape(-1, 1)).reshape(w.shape) for name, w in weights.items()}, "weight")
