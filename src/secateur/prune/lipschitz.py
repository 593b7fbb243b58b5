"""Lipschitz bounds of channels: how far a channel's output can move when its input does.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv:2208.03111).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..models import core
from ..models.channels import trace_channels
from ..types import Granularity, ImageSet, Scores

LEAST = 1e-12


@torch.no_grad()
def lipschitz(model: nn.Module, clean: ImageSet, *, granularity: Granularity = "channel", generator: torch.Generator) -> Scores:
    """Score channels by their Lipschitz bound, ``sigma_max(W_k) * |gamma_k| / (var_k + eps)^(1/2)``: backdoors stand out.

    ``W_k`` is channel ``k``'s filter as a matrix ``(c_in, kh*kw)``; ``gamma`` and ``var`` are those of the batch-norm that the
    data reaches next, found by following them; without one the bound is ``sigma_max(W_k)``.

    Args:
        model: Left as it was.
        clean: Only the shape of its images is used.
        granularity: ``channel``; single weights have no bound.
        generator: Not used.

    Raises:
        MethodError: The granularity is ``weight``.
        ModelError: The network cannot be traced.
    """
    if granularity != "channel":
        raise MethodError("Lipschitz bounds are of channels; weights have none")
    return Scores(
        {site: bound.detach() for site, bound in channel_bounds(model, bounded_layers(model, clean.shape)).items()}, "channel"
    )


def bounded_layers(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the convolutions whose channels have a bound, site -> convolution.

    A site is the convolution's batch-norm or, without one, the convolution itself; the classes of the answer have none.

    Raises:
        ModelError: The network cannot be traced.
    """
    modules = dict(core(model).named_modules())
    graph = trace_channels(model, input_shape)
    return {
        site.name: site.writer
        for site in graph.sites
        if site.writer is not None
        and not graph.is_output(site.name)
        and isinstance(modules[site.writer], nn.Conv2d)
        and isinstance(modules[site.name], nn.BatchNorm2d | nn.Conv2d)
    }


def channel_bounds(model: nn.Module, layers: dict[str, str]) -> dict[str, Tensor]:
    """Return the Lipschitz bound of each channel, site -> ``(channels,)``, with its gradient; see `bounded_layers`."""
    modules = dict(core(model).named_modules())
    bounds = {}
    for site, writer in layers.items():
        filters, norm = modules[writer].weight, modules[site]
        assert isinstance(filters, Tensor)
        bounds[site] = _largest_singular_value(filters.flatten(2))
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            spread = (norm.running_var + norm.eps).sqrt()
            bounds[site] = bounds[site] * (norm.weight / spread).abs()
    return bounds


def _largest_singular_value(matrices: Tensor) -> Tensor:
    """Return the largest singular value of each ``(n, rows, columns)``, by the eigenvalues of the smaller Gram matrix."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    return torch.linalg.eigvalsh(wide @ wide.mT)[:, -1].clamp_min(LEAST).sqrt()
