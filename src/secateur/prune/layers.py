"""Which layers a pruning sentence speaks of: by place in the network, or by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import MethodError, unknown
from ..models import core
from ..models.channels import ChannelGraph

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
PLACES = ("all", "early", "middle", "late", "last-conv", "last-layer")


def prunable_layers(model: nn.Module) -> list[str]:
    """Return the names of all convolutions and linear layers, in the order in which the network defines them."""
    return [name for name, module in core(model).named_modules() if isinstance(module, PRUNABLE)]


def choose_layers(model: nn.Module, layers: str | Sequence[str]) -> frozenset[str]:
    """Return the layers meant by a place or by names.

    Args:
        model: The network.
        layers: ``all``; ``early``, ``middle`` or ``late`` (thirds of all layers before the classifier, in order);
            ``last-conv``; ``last-layer`` (the classifier); or names, as a list or separated by commas.

    Raises:
        MethodError: There is no such layer.
    """
    names = prunable_layers(model)
    if not names:
        raise MethodError("this network has no convolution or linear layer to prune")
    if isinstance(layers, int):  # a layer of a Sequential may be called 3, which the command line reads as a number
        layers = str(layers)
    if not isinstance(layers, str) or layers not in PLACES:
        chosen = [n.strip() for n in layers.split(",")] if isinstance(layers, str) else list(layers)
        for name in chosen:
            if name not in names:
                raise MethodError(unknown("layer", name, [*names, *PLACES]))
        return frozenset(chosen)
    return frozenset(_place(model, names, layers))


def _place(model: nn.Module, names: list[str], place: str) -> list[str]:
    modules = dict(core(model).named_modules())
    convolutions = [n for n in names if not isinstance(modules[n], nn.Linear)]
    if place == "all":
        return names
    if place == "last-layer":
        return names[-1:]
    if place == "last-conv":
        if not convolutions:
            raise MethodError("layers='last-conv' needs a convolution; this network has none")
        return convolutions[-1:]
    body = names[:-1] if len(names) > 1 else names
    third = len(body) / 3
    start, stop = {"early": (0, third), "middle": (third, 2 * third), "late": (2 * third, len(body))}[place]
    return body[round(start) : round(stop)]


def layer_of_site(graph: ChannelGraph) -> dict[str, str]:
    """Map each site that a layer writes to that layer; sites of the network's output and reading norms are left out."""
    return {site.name: site.writer for site in graph.sites if site.writer is not None and not graph.is_output(site.name)}


def filters(model: nn.Module, graph: ChannelGraph) -> dict[str, torch.Tensor]:
    """Return the weights of each site's filters, ``(channels, fan_in)``, by site: the rows that create its channels."""
    modules = dict(core(model).named_modules())
    rows = {}
    for site, layer in layer_of_site(graph).items():
        weight = modules[layer].weight
        assert isinstance(weight, torch.Tensor)
        rows[site] = weight.detach().flatten(1)
    return rows
