"""Taking channels out of a network for good, along the groups that `trace_channels` finds."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .channels import ChannelGraph, Root, trace_channels
from .quantised import quantisation_of
from .wrapper import core


def shrink(model: nn.Module, kept: Mapping[str, Tensor], input_shape: tuple[int, int, int]) -> nn.Module:
    """Return a copy of ``model`` without the channels that ``kept`` leaves out.

    Args:
        model: A network, which is not changed.
        kept: Site -> original indices that stay, as `ChannelGraph.plan` gives them; absent sites stay whole.
        input_shape: Shape of one image, ``(c, h, w)``.

    Raises:
        ModelError: A site is unknown, an index is out of range, a tied layer would keep other channels, or the network is
            quantised.
    """
    if quantisation_of(model) is not None:
        raise ModelError("channels must leave before a network is quantised: remove them, then quantise what is left")
    graph = trace_channels(model, input_shape)
    gone = _gone(graph, kept)
    small = deepcopy(model)
    modules = dict(core(small).named_modules())
    for name in {**graph.inputs, **graph.outputs}:
        inputs = _remaining(graph.inputs.get(name), gone)
        outputs = _remaining(graph.outputs.get(name), gone)
        if inputs is not None or outputs is not None:
            _slice(modules[name], outputs, inputs)
    return small


def _gone(graph: ChannelGraph, kept: Mapping[str, Tensor]) -> set[Root]:
    gone: set[Root] = set()
    for name, index in kept.items():
        roots = graph.groups[graph.site(name).name]
        if index.numel() == 0 or not 0 <= int(index.min()) <= int(index.max()) < len(roots):
            raise ModelError(
                f"channels kept at '{name}' must be 1 to {len(roots)} indices in [0, {len(roots) - 1}], got {index.tolist()}"
            )
        stays = torch.zeros(len(roots), dtype=torch.bool)
        stays[index] = True
        gone.update(roots[~stays].tolist())
    for root in gone & graph.kept.keys():
        raise ModelError(f"a channel named for removal must stay: {graph.kept[root]}")
    for site in graph.sites:
        left = [i for i, root in enumerate(graph.groups[site.name].tolist()) if root not in gone]
        if left != (sorted(set(kept[site.name].tolist())) if site.name in kept else list(range(site.channels))):
            raise ModelError(f"'{site.name}' shares channels with other layers: all must keep the same ones")
    return gone


def _remaining(roots: Tensor | None, gone: set[Root]) -> Tensor | None:
    """Return the positions of ``roots`` that stay, or None when all do."""
    if roots is None or not gone.intersection(roots.tolist()):
        return None
    stay = [i for i, root in enumerate(roots.tolist()) if root not in gone]
    if not stay:
        raise ModelError("a layer would lose all its channels")
    return torch.tensor(stay)


def _slice(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Cut one module in place to the positions given; None leaves that side whole."""

    def cut(name: str, index: Tensor, dim: int) -> None:
        tensor = getattr(module, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(
                module,
                name,
                nn.Parameter(tensor.detach().index_select(dim, index.to(tensor.device)), tensor.requires_grad),
            )
        elif isinstance(tensor, Tensor):
            setattr(module, name, tensor.index_select(dim, index.to(tensor.device)))

    if outputs is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            cut(name, outputs, 0)
    if inputs is not None:
        cut("weight", inputs, 1)
    _resize(module, outputs, inputs)


def _resize(module: Any, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Set the sizes that a module reports to those of its cut parameters."""
    if outputs is not None:
        for name in ("out_channels", "out_features", "num_features"):
            if hasattr(module, name):
                setattr(module, name, len(outputs))
        if _was_depthwise(module):
            module.in_channels = module.groups = len(outputs)
    if inputs is not None:
        for name in ("in_channels", "in_features"):
            if hasattr(module, name):
                setattr(module, name, len(inputs))


def _was_depthwise(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
