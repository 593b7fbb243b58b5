"""The score from activations: what a channel's readers see of it, and weights by the size of what they are multiplied with.

Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017
(arXiv:1611.06440), for channels; Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models"
(Wanda), ICLR 2024 (arXiv:2306.11695), for weights.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..errors import DataError, check_choice
from ..models import core
from ..models.channels import ChannelGraph, trace_channels
from ..types import Granularity, ImageSet, Scores
from .layers import layer_of_site, prunable_layers
from .readers import show


def activation(model: nn.Module, clean: ImageSet, *, granularity: Granularity = "weight", generator: torch.Generator) -> Scores:
    """Score channels by mean absolute activation, weights by ``|W_ij| * rms(X_j)`` with ``X_j`` the layer's ``j``-th input.

    A channel's activation is the mean of its absolute value over images and places as the layers that read it see it, after
    nonlinearity and pooling; all writers of a residual stream share those of the stream. ``rms`` is the root of the mean square
    over images and places: the norm that Wanda takes, less a constant factor per layer.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Clean images; labels are not used.
        granularity: ``weight``: the weights of convolutions and linear layers. ``channel``: one score per filter, keyed by its
            site.
        generator: Not used.

    Raises:
        DataError: There are no images.
        ModelError: For channels, when the network cannot be traced.

    Differs from Wanda in that weights compete within the scope that is asked for, not within each row, and that convolutions
    are scored too, with one ``X_j`` per input channel.
    """
    check_choice("granularity", granularity, ("weight", "channel"))
    if not len(clean):
        raise DataError("activations need at least one image, got 0")
    if granularity == "channel":
        return _channels(model, clean, trace_channels(model, clean.shape))
    layers = prunable_layers(model)
    sizes = {layer: value.sqrt() for layer, value in _seen(model, clean, layers, power=2).items()}
    own = dict(core(model).named_parameters())
    weights = {layer: own[f"{layer}.weight"].detach().abs().cpu() for layer in layers}
    groups = {layer: getattr(core(model).get_submodule(layer), "groups", 1) for layer in layers}
    return Scores({f"{n}.weight": w * _by_input(w, sizes.get(n), groups[n]) for n, w in weights.items()}, "weight")


def _by_input(weight: Tensor, sizes: Tensor | None, groups: int) -> Tensor:
    """Return the size of what each weight ``(out, in / groups, ...)`` is multiplied with, ``(out, in / groups, 1, ...)``."""
    if sizes is None:  # the network does not use this layer
        return torch.zeros(())
    rows = sizes.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)).to(weight)


def _channels(model: nn.Module, clean: ImageSet, graph: ChannelGraph) -> Scores:
    seen = _seen(model, clean, list(graph.inputs), power=1)
    roots = 1 + max(int(group.max()) for group in [*graph.groups.values(), *graph.inputs.values()])
    total, positions = torch.zeros(roots, dtype=torch.float64), torch.zeros(roots, dtype=torch.float64)
    for reader, values in seen.items():
        total.index_add_(0, graph.inputs[reader], values)
        positions.index_add_(0, graph.inputs[reader], torch.ones_like(values))
    means = (total / positions.clamp_min(1)).float()
    return Scores({site: means[graph.groups[site]] for site in layer_of_site(graph)}, "channel")


def _seen(model: nn.Module, clean: ImageSet, layers: list[str], *, power: int) -> dict[str, Tensor]:
    """Return the mean of ``|x|^power`` of each input of each layer, float64 ``(inputs,)``, over images and places."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(layer: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].detach().double().abs().pow(power)
        rows = values.reshape(-1, values.shape[-1]) if isinstance(module, nn.Linear) else values.transpose(0, 1).flatten(1).T
        sums[layer] = rows.sum(dim=0).cpu() + sums.get(layer, 0)
        counts[layer] = counts.get(layer, 0) + len(rows)

    inner = core(model)
    show(model, clean, *(inner.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in layers))
    return {layer: total / counts[layer] for layer, total in sums.items()}
