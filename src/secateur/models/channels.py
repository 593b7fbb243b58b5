"""Who writes, passes on and reads each channel of a network, found by following the data.

`trace_channels` runs a network symbolically (torch.fx) and follows every channel from the layer that creates it through
norms, activations, additions and concatenations to the layers that read it. From that follow

* the *sites*: the last affine module on a channel, whose zeroed weight and bias silence it (principle 4);
* the *groups*: channels that several layers write together (a residual stream) and that can only leave together;
* the plan by which `shrink` takes channels out of a network for good.

"Masked = removed" holds because a channel counts as removable under a mask only when every value of it that some layer reads
is zero under that mask.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import ModelError
from ..state import evaluating
from .wrapper import core

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WRITERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
STATISTICS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
# f(0) = 0 and one channel at a time: a silent channel stays silent.
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
POINTWISE_FUNCTIONS: frozenset[Any] = frozenset({
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.tanh, F.hardswish, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.relu, torch.tanh,
    "relu", "relu_", "tanh", "contiguous", "clone",
})  # fmt: skip
ADDITIONS_IN_PLACE: frozenset[Any] = frozenset({operator.iadd, "add_"})
ADDITIONS: frozenset[Any] = frozenset({operator.add, torch.add, "add"}) | ADDITIONS_IN_PLACE
Root = int
Conditions = frozenset[str]


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a mask can silence channels.

    Attributes:
        name: The module whose weight and bias get zeroed.
        channels: How many channels it has.
        writer: The convolution or linear layer whose filters create the channels; None for a norm that only reads a stream.
    """

    name: str
    channels: int
    writer: str | None


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channels of one network.

    Attributes:
        sites: Every site, in the order in which the data passes.
        groups: Site -> ``(channels,)`` int64: equal numbers, here or at another site, are one channel.
        kept: Channel number -> why it cannot be taken out of the network.
        answers: The channels that are the network's output.
        inputs: Layer -> the channel number at each position that it reads.
        outputs: Layer or norm -> the channel number at each position that it writes or passes on.
        conditions: Channel number -> for each value of it that is read, the sites that silence it together.
    """

    sites: tuple[Site, ...]
    groups: Mapping[str, Tensor]
    kept: Mapping[Root, str]
    answers: frozenset[Root]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    conditions: Mapping[Root, tuple[Conditions, ...]]

    def site(self, name: str) -> Site:
        """Return the site called ``name``; raise `ModelError` when there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise ModelError(f"'{name}' is not a site where channels can be masked; sites: {', '.join(s.name for s in self.sites)}")

    def is_output(self, name: str) -> bool:
        """Return whether the site's channels are the network's answer: classes, not features."""
        return not self.answers.isdisjoint(self.groups[name].tolist())

    def why_kept(self, name: str) -> str:
        """Say why masked channels of a site may have to stay in the network."""
        reasons = [self.kept[root] for root in self.groups[name].tolist() if root in self.kept]
        return reasons[0] if reasons else "other layers write or read the same channels and are not masked there"

    def removable(self, keep: Mapping[str, Tensor]) -> set[Root]:
        """Return the channels that are silent for every reader under ``keep`` and may leave the network."""
        masked: dict[Root, set[str]] = {}
        for name, kept in keep.items():
            roots, kept = self.groups[name], kept.cpu()
            for root in set(roots[~kept].tolist()).difference(roots[kept].tolist()):
                masked.setdefault(root, set()).add(name)
        return {
            root
            for root, names in masked.items()
            if root not in self.kept and all(needed <= names for needed in self.conditions.get(root, ()))
        }

    def plan(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what physical removal under ``keep`` would leave: site -> original indices kept, for the sites that shrink.

        Every layer keeps at least one channel.
        """
        gone = self.removable(keep)
        for roots in [*self.outputs.values(), *self.inputs.values()]:
            if gone.issuperset(roots.tolist()):
                gone.discard(int(roots[0]))
        return {
            site.name: torch.tensor([i for i, root in enumerate(roots) if root not in gone])
            for site in self.sites
            if gone.intersection(roots := self.groups[site.name].tolist())
        }


@dataclass
class _Value:
    """What flows along one edge: a channel number and the sites that silence it, per position along ``dim``."""

    roots: list[Root]
    conditions: list[Conditions]
    dim: int
    shape: tuple[int, ...]
    last: str | None = None  # the module that alone wrote this value: its norm, if one follows, becomes the site


@dataclass
class _Follower:
    """One pass over the traced graph."""

    modules: Mapping[str, nn.Module]
    parent: list[Root] = field(default_factory=list)
    kept: dict[Root, str] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    site_roots: dict[str, list[Root]] = field(default_factory=dict)
    inputs: dict[str, list[Root]] = field(default_factory=dict)
    outputs: dict[str, list[Root]] = field(default_factory=dict)
    reads: list[tuple[Root, Conditions]] = field(default_factory=list)
    writer: dict[str, str | None] = field(default_factory=dict)
    answers: set[Root] = field(default_factory=set)

    def new(self, count: int) -> list[Root]:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return list(range(first, first + count))

    def find(self, root: Root) -> Root:
        while self.parent[root] != root:
            self.parent[root] = root = self.parent[self.parent[root]]
        return root

    def tie(self, a: Iterable[Root], b: Iterable[Root]) -> None:
        for left, right in zip(a, b, strict=True):
            self.parent[self.find(right)] = self.find(left)

    def keep(self, values: Iterable[_Value], why: str) -> None:
        for value in values:
            for root in value.roots:
                self.kept.setdefault(root, why)

    def read(self, name: str, value: _Value) -> None:
        if name in self.inputs:
            self.tie(self.inputs[name], value.roots)
        self.inputs[name] = value.roots
        self.reads.extend(zip(value.roots, value.conditions, strict=True))

    def mark(self, name: str, roots: list[Root], writer: str | None) -> list[Conditions]:
        """Make ``name`` a site for ``roots`` and return the conditions on its output."""
        self.sites[name] = Site(name, len(roots), writer)
        self.site_roots[name] = roots
        return [frozenset((name,))] * len(roots)

    def affine(self, name: str, value: _Value, statistics: bool) -> _Value:
        """Pass channels through a norm or a depthwise convolution."""
        if name in self.outputs:
            self.tie(self.outputs[name], value.roots)
            self.keep([value], f"'{name}' is used more than once")
        self.outputs[name] = value.roots
        writer = self.writer.get(value.last) if value.last else None
        if writer is not None and value.last in self.sites:
            del self.sites[value.last], self.site_roots[value.last]
        if statistics:
            self.keep([value], f"'{name}' shares statistics across channels")
        self.writer[name] = writer
        conditions = self.mark(name, value.roots, writer)
        return _Value(value.roots, conditions, value.dim, value.shape, last=name)

    def write(self, name: str, module: nn.Module, value: _Value, shape: tuple[int, ...]) -> _Value:
        channels = int(module.weight.shape[0])  # type: ignore[union-attr]
        dim = _channel_dim(module, shape)
        self.read(name, value)
        if name in self.outputs:
            roots = self.outputs[name]
            self.keep([_Value(roots, [], dim, shape)], f"'{name}' is used more than once")
        else:
            roots = self.outputs[name] = self.new(channels)
        if getattr(module, "groups", 1) != 1:
            self.keep([value, _Value(roots, [], dim, shape)], f"'{name}' is a grouped convolution")
        self.writer[name] = name
        return _Value(roots, self.mark(name, roots, name), dim, shape, last=name)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _channel_dim(module: nn.Module, shape: tuple[int, ...]) -> int:
    return len(shape) - 1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1


def _is_per_channel(module: nn.Module, value: _Value) -> bool:
    weight = getattr(module, "weight", None)
    fits = weight is not None and weight.shape == (len(value.roots),)
    return fits and value.dim == _channel_dim(module, value.shape)


def _module_step(follow: _Follower, name: str, value: _Value, shape: tuple[int, ...]) -> _Value | None:
    module = follow.modules[name]
    if isinstance(module, NORMS) and module.affine and len(value.roots) == module.num_features:
        return follow.affine(name, value, statistics=False)
    if isinstance(module, STATISTICS):
        return follow.affine(name, value, statistics=True) if _is_per_channel(module, value) else None
    if _is_depthwise(module):
        return follow.affine(name, value, statistics=False)
    if isinstance(module, WRITERS) and value.dim == _channel_dim(module, shape):
        return follow.write(name, module, value, shape)
    if isinstance(module, nn.Flatten):
        return _flatten(value, shape, module.start_dim)
    if isinstance(module, nn.Hardtanh) and not module.min_val <= 0 <= module.max_val:
        return None
    if isinstance(module, POINTWISE_MODULES):
        return _Value(value.roots, value.conditions, value.dim, shape, value.last)
    return None


def _flatten(value: _Value, shape: tuple[int, ...], start: int) -> _Value | None:
    if value.dim != 1 or start != 1 or len(shape) != 2 or shape[0] != value.shape[0]:
        return None
    times = shape[1] // len(value.roots)
    return _Value(
        [root for root in value.roots for _ in range(times)],
        [needed for needed in value.conditions for _ in range(times)],
        1,
        shape,
    )


def _add(follow: _Follower, a: _Value, b: _Value, shape: tuple[int, ...]) -> _Value | None:
    if len(a.roots) != len(b.roots) or a.dim != b.dim:
        return None
    follow.tie(a.roots, b.roots)
    return _Value(a.roots, [x | y for x, y in zip(a.conditions, b.conditions, strict=True)], a.dim, shape)


def _concatenate(values: list[_Value], dim: int, shape: tuple[int, ...]) -> _Value | None:
    if any(value.dim != dim % len(shape) for value in values):
        return None
    roots = [root for value in values for root in value.roots]
    return _Value(roots, [needed for value in values for needed in value.conditions], values[0].dim, shape)


def _function_step(follow: _Follower, node: fx.Node, values: list[_Value], shape: tuple[int, ...]) -> _Value | None:
    target, first = node.target, values[0]
    if target in POINTWISE_FUNCTIONS and len(values) == 1:
        return _Value(first.roots, first.conditions, first.dim, shape, first.last)
    if target in ADDITIONS and len(values) == 2:
        return _add(follow, values[0], values[1], shape)
    if target is torch.cat:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return _concatenate(values, int(dim), shape)  # type: ignore[arg-type]
    if target in (torch.flatten, "flatten") or (target in ("view", "reshape") and _infers_length(node)):
        return _flatten(first, shape, 1)
    if target in ("mean", torch.mean) and first.dim == 1 and shape[:2] == first.shape[:2]:
        return _Value(first.roots, first.conditions, 1, shape)
    return None


def _infers_length(node: fx.Node) -> bool:
    """Return whether a view is ``(n, -1)``: a length written into the code would not fit the smaller network."""
    sizes = node.args[1] if len(node.args) == 2 else node.args[1:]
    return isinstance(sizes, tuple | list) and len(sizes) == 2 and bool(sizes[1] == -1)


def _shape_of(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _trace(net: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    try:
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        dtype = next((p.dtype for p in net.parameters()), torch.float32)
        with evaluating(net), torch.no_grad():
            traced = fx.symbolic_trace(net)
            ShapeProp(traced).propagate(torch.zeros(2, *input_shape, device=device, dtype=dtype))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot follow the channels of {type(net).__name__}: {reason}") from error
    return traced


def trace_channels(model: nn.Module, input_shape: tuple[int, int, int]) -> ChannelGraph:
    """Follow every channel of ``model``; names are relative to ``core(model)``.

    Args:
        model: A network, which is not changed.
        input_shape: Shape of one image, ``(c, h, w)``.

    Raises:
        ModelError: torch.fx cannot trace the network, or it rejects images of this shape.
    """
    net = core(model)
    traced = _trace(net, input_shape)
    follow = _Follower(dict(net.named_modules()))
    values: dict[fx.Node, _Value] = {}
    for node in traced.graph.nodes:
        incoming = [values[n] for n in node.all_input_nodes if n in values]
        shape = _shape_of(node)
        if node.op == "output":
            follow.keep(incoming, "the network's output")
            follow.answers.update(root for value in incoming for root in value.roots)
            follow.reads.extend(pair for value in incoming for pair in zip(value.roots, value.conditions, strict=True))
            continue
        if node.meta.get("type") in (int, torch.Size):
            continue
        if shape is None or len(shape) < 2:
            follow.keep(incoming, f"read by '{node.name}', which is not followed")
            continue
        value = _step(follow, node, incoming, shape)
        if value is None or len(value.roots) != shape[value.dim]:
            follow.keep(incoming, f"read by '{node.name}', which is not followed")
            value = _opaque(follow, node, shape)
        elif len(node.users) > 1:
            value.last = None  # more than one reader: a norm among them reads a stream, it does not finish this layer
        values[node] = value
        if node.target in ADDITIONS_IN_PLACE and isinstance(node.args[0], fx.Node):
            values[node.args[0]] = value
    return _finish(follow)


def _step(follow: _Follower, node: fx.Node, incoming: list[_Value], shape: tuple[int, ...]) -> _Value | None:
    if node.op == "call_module" and len(incoming) == 1:
        value = _module_step(follow, str(node.target), incoming[0], shape)
        if value is not None and follow.modules[str(node.target)]._forward_hooks:
            follow.keep([value], f"what '{node.target}' returns is edited")
        return value
    if node.op in ("call_function", "call_method") and incoming:
        return _function_step(follow, node, incoming, shape)
    return None


def _opaque(follow: _Follower, node: fx.Node, shape: tuple[int, ...]) -> _Value:
    dim = 1 if len(shape) in (2, 4) else len(shape) - 1
    value = _Value(follow.new(shape[dim]), [frozenset()] * shape[dim], dim, shape)
    follow.keep(
        [value],
        "the network's input" if node.op == "placeholder" else f"comes from '{node.name}', which is not followed",
    )
    return value


def _finish(follow: _Follower) -> ChannelGraph:
    def settle(roots: list[Root]) -> Tensor:
        return torch.tensor([follow.find(root) for root in roots])

    conditions: dict[Root, set[Conditions]] = {}
    for root, needed in follow.reads:
        conditions.setdefault(follow.find(root), set()).add(needed)
    kept: dict[Root, str] = {}
    for root, why in follow.kept.items():
        kept.setdefault(follow.find(root), why)
    return ChannelGraph(
        sites=tuple(follow.sites.values()),
        groups={name: settle(roots) for name, roots in follow.site_roots.items()},
        kept=kept,
        answers=frozenset(follow.find(root) for root in follow.answers),
        inputs={name: settle(roots) for name, roots in follow.inputs.items()},
        outputs={name: settle(roots) for name, roots in follow.outputs.items()},
        conditions={root: tuple(needed) for root, needed in conditions.items()},
    )
