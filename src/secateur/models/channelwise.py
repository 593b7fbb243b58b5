"""Variants of a traced network that differ in a few channels: what is left alone is added to what is known.

Between the channels that change and the next layer that mixes them, everything is computed on these channels alone. A
convolution over them is linear: its output is that of the unchanged network plus the convolution of the difference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from . import graph as graphs

CONV: Mapping[type, Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
EACH_MODULE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Mish, nn.Identity, _DropoutNd, _AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd,
)  # fmt: skip
EACH_FUNCTION = frozenset({
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh,
    F.softplus, F.mish, F.dropout, F.dropout2d, torch.sigmoid, torch.tanh, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
})  # fmt: skip
EACH_METHOD = frozenset({"relu", "sigmoid", "tanh", "contiguous", "clone", "float"})
FEW = 0.5  # share of the inputs of a convolution beyond which it is computed anew


class Few(NamedTuple):
    """A value of which some channels differ from those of the unchanged network.

    Attributes:
        channels: Which (along dimension 1), int64 ``(c,)``, ascending.
        old: These channels in the unchanged network, ``(b, c, ...)``.
        new: These channels.
    """

    channels: Tensor
    old: Tensor
    new: Tensor


Step = Callable[[Mapping[fx.Node, Any], Mapping[fx.Node, Tensor]], Any]
Plan = tuple[Step, Tensor | None, set[fx.Node]]


class Channelwise:
    """How one variant is computed.

    Attributes:
        olds: Nodes among those reached whose values in the unchanged network are needed too.
        saves: Whether a convolution is spared: if not, this is no way to go.
    """

    def __init__(self, graph: graphs.Graph, reached: Sequence[fx.Node], changed: Mapping[str, Tensor]) -> None:
        """Plan.

        Args:
            graph: The network; must have run once with ``guard``, so that shapes are known.
            reached: The nodes that depend on ``changed`` (see `Graph.reach`).
            changed: Parameters and buffers by full name.
        """
        self.saves = False
        self._graph, self._new = graph, graph.owned(changed)
        self._few: dict[fx.Node, Tensor] = {}  # nodes of which a few channels change, and which
        self._reached, self._steps = set(reached), dict[fx.Node, Step]()
        needed: set[fx.Node] = set()
        for node in reached:
            planned = self._planned(node)
            if planned is None:
                needed |= self._few.keys() & set(node.all_input_nodes)
                continue
            self._steps[node], channels, olds = planned
            needed |= olds
            if channels is not None:
                self._few[node] = channels
        self.olds = [node for node in reached if node in needed]

    def step(self, olds: Mapping[fx.Node, Tensor]) -> graphs.Step:
        """Return the function that computes a node, given the unchanged values of `olds` for one batch."""

        def compute(node: fx.Node, environment: Mapping[fx.Node, Any], new: dict[str, Tensor]) -> Any:
            planned = self._steps.get(node)
            if planned is not None:
                return planned(environment, olds)
            whole = {source: _whole(environment[source], olds, source) for source in node.all_input_nodes}
            return self._graph.step(node, whole, new)

        return compute

    def _planned(self, node: fx.Node) -> Plan | None:
        """Return how to compute a node, its changed channels (None: all) and whose old values it takes; None: anew."""
        sources, new = node.all_input_nodes, self._new.get(node, {})
        few = [source for source in sources if source in self._few]
        module = self._graph.module(node)
        if any(source in self._reached and source not in self._few for source in sources) or node is self._graph.end:
            return None
        if module is not None and module._forward_hooks:  # which would not run on a part of the channels
            return None
        if len(sources) == 1 and isinstance(module, _BatchNorm):
            return self._norm(node, module, new)
        if len(sources) == 1 and isinstance(module, _ConvNd) and type(module) in CONV:
            return self._new_filters(node, module, new) if new else self._same_filters(node, module)
        if new or not few:
            return None
        if len(sources) == 1 and self._is_each(node, module):
            return partial(self._each, node), self._few[few[0]], set()
        if len(sources) == 2 and len(few) == 1 and node.target in (operator.add, torch.add) and not node.kwargs:
            shapes = {self._graph.shapes.get(each) for each in (*sources, node)}
            if len(shapes) == 1 and None not in shapes:
                return partial(self._plus, node, few[0]), self._few[few[0]], set()
        return None

    def _is_each(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Return whether each channel of the output depends on this channel of the input alone."""
        before, after = (self._graph.shapes.get(each, ()) for each in (node.all_input_nodes[0], node))
        if len(before) != len(after) or before[:2] != after[:2]:
            return False
        if node.op == "call_module":
            return isinstance(module, EACH_MODULE) and not getattr(module, "return_indices", False)
        return node.target in (EACH_METHOD if node.op == "call_method" else EACH_FUNCTION)

    def _each(self, node: fx.Node, environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Few:
        source = node.all_input_nodes[0]
        few: Few = environment[source]
        old, new = (self._graph.step(node, {source: value}, {}) for value in (few.old, few.new))
        return Few(few.channels, old, new)

    def _plus(self, node: fx.Node, source: fx.Node, environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Few:
        few: Few = environment[source]
        other = next(each for each in node.all_input_nodes if each is not source)
        beside = environment[other].index_select(1, few.channels)
        return Few(few.channels, few.old + beside, few.new + beside)

    def _norm(self, node: fx.Node, norm: _BatchNorm, new: dict[str, Tensor]) -> Plan | None:
        source = node.all_input_nodes[0]
        if norm.running_mean is None or norm.training:
            return None
        rows = _rows(norm, new)
        if rows is None:
            return None
        channels = self._few.get(source, rows)
        if not torch.isin(rows.to(channels), channels).all() or len(channels) > FEW * norm.num_features:
            return None

        def step(environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Few:
            x = _chosen(environment[source], channels)
            return Few(channels, _normed(norm, {}, x.old, channels), _normed(norm, new, x.new, channels))

        return step, channels, set()

    def _new_filters(self, node: fx.Node, conv: _ConvNd, new: dict[str, Tensor]) -> Plan | None:
        """Plan a convolution some of whose filters change, on an unchanged input."""
        source = node.all_input_nodes[0]
        rows = None if conv.padding_mode != "zeros" or conv.groups > 1 else _rows(conv, new)
        if source in self._few or rows is None or len(rows) > FEW * conv.out_channels:
            return None
        self.saves = True

        def step(environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Few:
            x = environment[source]
            old, changed = (
                _convolved(conv, x, parts["weight"][rows], parts["bias"][rows] if "bias" in parts else None)
                for parts in (own, own | new)
            )
            return Few(rows, old, changed)

        own = dict(conv.named_parameters())
        return step, rows, set()

    def _same_filters(self, node: fx.Node, conv: _ConvNd) -> Plan | None:
        """Plan a convolution over an input of which a few channels change."""
        source = node.all_input_nodes[0]
        channels = self._few.get(source)
        if channels is None or conv.padding_mode != "zeros" or len(channels) > FEW * conv.in_channels:
            return None
        if conv.groups > 1 and not conv.groups == conv.in_channels == conv.out_channels:
            return None
        self.saves = True

        def alone(environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Few:
            weight, bias = conv.weight[channels], None if conv.bias is None else conv.bias[channels]
            few: Few = environment[source]
            return Few(channels, *(_convolved(conv, x, weight, bias, len(channels)) for x in (few.old, few.new)))

        def mixed(environment: Mapping[fx.Node, Any], olds: Mapping[fx.Node, Tensor]) -> Tensor:
            few: Few = environment[source]
            return olds[node] + _convolved(conv, few.new - few.old, conv.weight[:, channels], None)

        return (alone, channels, set()) if conv.groups > 1 else (mixed, None, {node})


def _rows(module: nn.Module, new: Mapping[str, Tensor]) -> Tensor | None:
    """Return the entries along dimension 0 in which some of the new tensors differ; None if one has no such dimension."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    differ = [(value != own[name]).flatten(1).any(1) if value.dim() > 1 else value != own[name] for name, value in new.items()]
    if any(each.dim() != 1 for each in differ):
        return None
    return torch.stack(differ).any(0).nonzero().flatten() if differ else torch.empty(0, dtype=torch.int64)


def _chosen(value: Tensor | Few, channels: Tensor) -> Few:
    if isinstance(value, Few):
        return value
    part = value.index_select(1, channels)
    return Few(channels, part, part)


def _normed(norm: _BatchNorm, new: Mapping[str, Tensor], x: Tensor, channels: Tensor) -> Tensor:
    parts = {**dict(norm.named_parameters()), **dict(norm.named_buffers()), **new}
    rows = {name: parts[name][channels] for name in ("running_mean", "running_var", "weight", "bias") if name in parts}
    return F.batch_norm(
        x, rows["running_mean"], rows["running_var"], rows.get("weight"), rows.get("bias"), False, 0.0, norm.eps
    )


def _convolved(conv: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    padding: Any = conv.padding
    return CONV[type(conv)](x, weight, bias, conv.stride, padding, conv.dilation, groups)


def _whole(value: Any, olds: Mapping[fx.Node, Tensor], node: fx.Node) -> Any:
    return olds[node].index_copy(1, value.channels, value.new) if isinstance(value, Few) else value
