"""CLP, channel Lipschitzness-based pruning: cut the channels that can amplify a small change most. Needs no images.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv:2208.03111).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..errors import MethodError, check_range
from ..models.channels import trace_channels
from ..prune import Outliers, Sentence, prune
from ..prune.lipschitz import bounded_layers, lipschitz
from ..types import ImageSet, Repaired


def clp(model: nn.Module, clean: ImageSet, *, u: float = 3.0, generator: torch.Generator) -> Repaired:
    """Cut each channel whose Lipschitz bound is more than ``u`` standard deviations above the mean of its layer.

    Channel ``k`` of a convolution ``W`` with the batch-norm ``gamma, var`` behind it has the bound
    ``sigma_max(W_k) * |gamma_k| / (var_k + eps)^(1/2)``, where ``W_k`` is the matrix ``(c_in, kh*kw)``. The norm's weight and
    bias of a cut channel go to 0.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Read for the record only; the method needs no images.
        u: How far above the mean, >= 0; smaller cuts more.
        generator: Not used.

    Raises:
        MethodError: ``u`` is out of range, or the network has no convolution.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that convolutions and norms are paired by following the data and not by their order in
    the file, which is wrong for pre-activation networks; a norm that only reads a residual stream belongs to no filter, stays
    and is named in the notes. A convolution without a norm is bounded by its filters alone.
    """
    check_range("u", u, 0, 1e6)
    if not bounded_layers(model, clean.shape):
        raise MethodError("clp needs a network with convolutions, got one without; use another method")
    sentence = Sentence(lipschitz, Outliers(u), "channel", order="largest")
    repaired = prune(model, clean, sentence, generator=generator)
    readers = [site.name for site in trace_channels(model, clean.shape).sites if site.writer is None]
    if not readers:
        return repaired
    note = f"not judged, because no filter belongs to them: {', '.join(readers)} (norms that only read a residual stream)"
    return replace(repaired, notes=(*repaired.notes, note))
