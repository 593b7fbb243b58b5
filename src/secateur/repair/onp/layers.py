"""A network as graphs of neurons, one for each layer: what ONP's policy sees, but for the features.

A node is a neuron: a channel at its site (see ``models/channels.py``), or, in a residual stream, the channel at all the sites
that write it, which can only go together. Two nodes are neighbours when they are fed alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import MethodError, check_choice, check_range
from ...models import core
from ...models.channels import ChannelGraph, Site, trace_channels
from ...prune.mask import Edit, edited
from ...types import ChannelMask, HardMask

Residual = Literal["tied", "apart"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Neurons that are decided on together.

    Attributes:
        sites: Where they sit; several for a residual stream.
        size: How many there are.
        edges: Pairs of neighbours, both ways, int64 ``(2, e)``, without loops.
        depth: Where the layer lies on the way of the data, in [0, 1].
    """

    sites: tuple[str, ...]
    size: int
    edges: Tensor
    depth: float


def layers(
    model: nn.Module, input_shape: tuple[int, int, int], *, degree: int = 8, residual: Residual = "tied"
) -> tuple[Layer, ...]:
    """Return a network's layers, in the order of the data; its answers are none.

    Neuron ``k`` is fed by the vector ``v_k[c] = ||W[k, c]||_1`` over the channels ``c`` that its filter reads (of a residual
    stream those of all writers, one after the other; of a norm that only reads a stream, what its channel feeds). Each node is
    tied to the ``degree`` nodes with the largest cosine between these vectors, and to those that chose it.

    Args:
        model: Not changed.
        input_shape: Shape of one image, ``(c, h, w)``.
        degree: Neighbours that each node chooses, >= 0. The paper's rule is a threshold on the cosine; a number of neighbours
            needs no tuning from layer to layer.
        residual: Whether the channels of a residual stream go ``tied``, at all its sites, or ``apart``, site by site.

    Raises:
        MethodError: An argument is out of range, or the network has no neurons besides its answers.
        ModelError: The network cannot be traced.
    """
    check_range("degree", degree, 0, 2**31)
    check_choice("residual", residual, get_args(Residual))
    graph = trace_channels(model, input_shape)
    feeding = Feeding(model, graph)
    found = list(_streams(graph, residual))
    if not found:
        raise MethodError("this network has no neurons besides its answers; there is nothing to decide on")
    last = max(1, len(found) - 1)
    return tuple(
        Layer(
            tuple(site.name for site in sites),
            sites[0].channels,
            nearest(torch.cat([feeding.vectors(site) for site in sites], dim=1), degree),
            number / last,
        )
        for number, sites in enumerate(found)
    )


def nearest(vectors: Tensor, degree: int) -> Tensor:
    """Return the edges between each row and the ``degree`` others with the largest cosine, both ways, ``(2, e)``."""
    size = len(vectors)
    chosen = min(degree, size - 1)
    if chosen <= 0:
        return torch.empty(2, 0, dtype=torch.int64)
    unit = F.normalize(vectors.double(), dim=1)
    alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
    picks = alike.topk(chosen, dim=1).indices
    linked = torch.zeros(size, size, dtype=torch.bool)
    linked[torch.arange(size)[:, None], picks] = True
    return (linked | linked.T).nonzero().T.contiguous()


def _streams(graph: ChannelGraph, residual: Residual) -> Iterator[list[Site]]:
    """Yield the sites that go together, in the order of the data."""
    together: dict[object, list[Site]] = {}
    for site in graph.sites:
        if not graph.is_output(site.name):
            roots = tuple(graph.groups[site.name].tolist())
            together.setdefault(roots if residual == "tied" else site.name, []).append(site)
    yield from together.values()


def mask_of(model: nn.Module, layers: Sequence[Layer], keeps: Sequence[Tensor], edit: Edit) -> HardMask:
    """Return the mask that keeps of each layer what ``keeps`` says, bool ``(size,)``, at all its sites."""
    by_site = {site: keep for layer, keep in zip(layers, keeps, strict=True) for site in layer.sites if not bool(keep.all())}
    return edited(model, ChannelMask(by_site), edit)


class Feeding:
    """What feeds each channel of a network, and what it feeds."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self._graph = graph
        self._weights: dict[str, Tensor] = {
            name: module.weight.detach().cpu().flatten(2).abs().sum(2)
            if module.weight.dim() > 2
            else module.weight.detach().cpu().abs()
            for name, module in core(model).named_modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
        }

    def vectors(self, site: Site) -> Tensor:
        """Return for each channel of a site the vector that feeds it, ``(channels, inputs)``, or else what it feeds."""
        if site.writer is not None:
            return self._weights[site.writer]
        return torch.cat([torch.zeros(site.channels, 1), *self._fed(site)], dim=1)

    def strengths(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the l1 norms of what feeds each channel and of what it feeds, ``(channels,)`` each."""
        zero = torch.zeros(site.channels)
        fed = sum((part.sum(1) for part in self._fed(site)), zero)
        return zero if site.writer is None else self._weights[site.writer].sum(1), fed

    def _fed(self, site: Site) -> Sequence[Tensor]:
        """Return for each layer that reads the site the weights on its channels, ``(channels, outputs)``."""
        roots = self._graph.groups[site.name]
        parts = []
        for name, read in self._graph.inputs.items():
            weights = self._weights.get(name)
            if weights is None or weights.shape[1] != len(read):  # a grouped convolution reads but a part
                continue
            matches = (roots[:, None] == read[None]).float()
            if matches.any():
                parts.append(matches @ weights.T)
        return parts
