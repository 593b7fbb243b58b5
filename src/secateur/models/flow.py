"""A network as a list of steps with names that last: where feature maps can be quantised, and what an export writes down.

`trace` follows a network symbolically (torch.fx). Values that an integer runtime keeps in 8 bit are its *sites*: what
convolutions, linear layers, additions, concatenations and average pooling read, and what they hand on, behind the norm and the
activation that a runtime fuses into them. Poolings that choose, shapes, slices and padding by zero move values of a site about
and need no site of their own. Everything else is computed in floating point. The logits are no site.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..errors import ModelError
from ..state import evaluating
from .files import one_line

LAYERS = (nn.Conv2d, nn.Linear)
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
CONCATENATIONS: frozenset[Any] = frozenset({torch.cat, torch.concat})
MEANS: frozenset[Any] = frozenset({F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"})
MEAN_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
FUSED_MODULES = (nn.ReLU, nn.ReLU6)
FUSED: frozenset[Any] = frozenset({F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_"})
MOVING_MODULES = (nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
MOVING: frozenset[Any] = frozenset({
    F.max_pool2d, F.dropout, torch.flatten, torch.reshape, operator.getitem,
    "flatten", "view", "reshape", "contiguous", "clone",
})  # fmt: skip


def after(value: Any, path: str) -> Any:
    """Stand, in a flow, for the place where a module that holds others has returned."""
    return value


class _Tracer(fx.Tracer):
    """Notes which module each step belongs to, and where modules that hold others return."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = [""]
        self.owners: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self._inside.append(path)
        try:
            found = m.forward(*args, **kwargs)  # its hooks are for the run, not for the trace
        finally:
            self._inside.pop()
        return self.create_proxy("call_function", after, (found, path), {}) if isinstance(found, fx.Proxy) else found

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owners[node] = self._inside[-1]
        return node


@dataclass(frozen=True, eq=False)
class Flow:
    """The steps of one architecture, in order; it holds no weights, so that copies of a network share it.

    Attributes:
        steps: Each with the values that nobody needs after it.
        end: The last step, whose argument is the answer.
        layers: Names of the convolutions and linear layers, in order.
        sites: Name -> the step whose value it is, in order. A name is that of the module that made the value, or
            ``MODULE/FUNCTION`` where a function in a module's own forward did, with ``#2`` at the second of that name.
    """

    steps: tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]
    end: fx.Node
    layers: tuple[str, ...]
    sites: Mapping[str, fx.Node]
    _names: Mapping[fx.Node, str] = field(repr=False, default_factory=dict)

    def __deepcopy__(self, memo: object) -> Flow:
        return self

    def run(
        self,
        net: nn.Module,
        x: Any,
        *,
        edit: Callable[[str, Any], Any] | None = None,
        layer: Callable[[nn.Module, Any], Any] | None = None,
        seen: dict[fx.Node, Any] | None = None,
    ) -> Any:
        """Answer as ``net`` does.

        Args:
            net: A network of this architecture.
            x: What it is called with.
            edit: Takes the name and the value of a site and returns what goes on in its place.
            layer: Takes a convolution or linear layer and what it reads, and computes it.
            seen: Gets the value of every step.
        """
        values: dict[fx.Node, Any] = {}
        for node, done in self.steps:
            value = _call(net, node, values, x, layer)
            if edit is not None and node in self._names:
                value = edit(self._names[node], value)
            values[node] = value
            if seen is not None:
                seen[node] = value
            for old in done:
                values.pop(old, None)
        return values[self.end]


def trace(net: nn.Module, input_shape: tuple[int, int, int]) -> Flow:
    """Follow a network that takes one batch of images.

    Args:
        net: The network inside a classifier, float; not changed.
        input_shape: Shape of one image, ``(c, h, w)``.

    Raises:
        ModelError: torch.fx cannot follow it (its way depends on the images), or it does not take such images.
    """
    tracer = _Tracer()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    try:
        with evaluating(net), torch.no_grad():
            nodes = list(tracer.trace(net).nodes)
            last: dict[fx.Node, fx.Node] = {source: node for node in nodes for source in node.all_input_nodes}
            done = {node: tuple(s for s, user in last.items() if user is node) for node in nodes}
            flow = Flow(tuple((node, done[node]) for node in nodes), nodes[-1], (), {})
            seen: dict[fx.Node, Any] = {}
            flow.run(net, torch.zeros(2, *input_shape, device=device), seen=seen)
    except Exception as error:
        raise ModelError(
            f"{type(net).__name__} cannot be quantised: its steps cannot be followed: {one_line(error)}"
        ) from error
    names = _named(nodes, tracer.owners)
    picked = _sites(nodes, dict(net.named_modules()), {node for node, value in seen.items() if _is_map(value)})
    sites = {names[node]: node for node in nodes if node in picked}
    layers = dict.fromkeys(str(n.target) for n in nodes if is_layer(n, dict(net.named_modules())))
    return Flow(flow.steps, flow.end, tuple(layers), sites, {node: name for name, node in sites.items()})


def is_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a step is a convolution or linear layer that is quantised."""
    return node.op == "call_module" and type(modules[str(node.target)]) in LAYERS


def is_step(node: fx.Node, modules: Mapping[str, nn.Module], kinds: tuple[type, ...], functions: frozenset[Any]) -> bool:
    """Return whether a step calls a module of one of these kinds or one of these functions."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], kinds)
    return node.op in ("call_function", "call_method") and node.target in functions


def moves(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether every value that a step returns is one that it was given, or 0."""
    if node.target in (F.pad, torch.nn.functional.pad):
        return (node.args[2:] or (node.kwargs.get("mode", "constant"),))[0] == "constant" and not _fill(node)
    return node.target is after or is_step(node, modules, MOVING_MODULES, MOVING)


def origin(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the step that made a value, before it was moved about."""
    while moves(node, modules) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def next_alone(node: fx.Node) -> fx.Node | None:
    """Return the only step that reads a value, behind the places where modules return; None if there are several."""
    while len(node.users) == 1:
        [node] = node.users
        if node.target is not after:
            return node
    return None


def folded(node: fx.Node, modules: Mapping[str, nn.Module], sites: Container[fx.Node]) -> fx.Node | None:
    """Return the batch-norm that alone reads a convolution and can be folded into it, in eval mode."""
    follower = next_alone(node)
    if follower is None or follower.op != "call_module" or node in sites:
        return None
    layer, norm = modules[str(node.target)], modules[str(follower.target)]
    same = type(layer) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None
    return follower if same and not norm.training else None


def affine(norm: Any, layer: Any) -> tuple[Tensor, Tensor]:
    """Return by what a layer's rows are multiplied and what is added then, float64 ``(channels,)``: its norm and its bias."""
    rows = layer.weight.shape[0]
    bias = torch.zeros(rows, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double().cpu()
    if norm is None:
        return torch.ones(rows, dtype=torch.float64), bias
    factor = (norm.running_var.double().cpu() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.detach().double().cpu()
    shift = (bias - norm.running_mean.double().cpu()) * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double().cpu()


def _fill(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("value") or 0


def _sites(nodes: list[fx.Node], modules: Mapping[str, nn.Module], maps: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    end = nodes[-1].all_input_nodes
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source in maps]
        several = is_step(node, modules, (), ADDITIONS | CONCATENATIONS) and len(sources) > 1
        if node not in maps or not (several or is_layer(node, modules) or is_step(node, modules, MEAN_MODULES, MEANS)):
            continue
        found.update(origin(source, modules) for source in sources)
        found.add(_tail(node, modules))
    answers = {origin(node, modules) for node in end}
    read = {
        origin(s, modules) for node in nodes for s in node.all_input_nodes if not moves(node, modules) and node.op != "output"
    }
    return {node for node in found if node.op != "get_attr" and not (node in answers and node not in read)}


def _tail(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the last step that a runtime fuses into a layer or an addition: a norm behind a layer, an activation."""
    follower = next_alone(node)
    if follower and is_layer(node, modules) and is_step(follower, modules, (nn.BatchNorm2d,), frozenset()):
        node, follower = follower, next_alone(follower)
    return follower if follower and is_step(follower, modules, FUSED_MODULES, FUSED) else node


def _named(nodes: list[fx.Node], owners: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    names: dict[fx.Node, str] = {}
    count: dict[str, int] = {}
    for node in nodes:
        if node.op == "placeholder":
            name = "input"
        elif node.op == "call_module":
            name = str(node.target)
        else:
            word = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "value")
            name = f"{owners[node]}/{word}"
        count[name] = count.get(name, 0) + 1
        names[node] = name if count[name] == 1 else f"{name}#{count[name]}"
    return names


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _call(net: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any], x: Any, layer: Any) -> Any:
    if node.op == "placeholder":
        return x
    args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(net)
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        if layer is not None and type(module) in LAYERS:
            return layer(module, *args)
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.target is after:
        return _returned(net.get_submodule(str(args[1])), args[0])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _returned(module: nn.Module, value: Any) -> Any:
    """Run the hooks of a module that holds others on what it returns; they are not shown what it was given."""
    for key, hook in list(module._forward_hooks.items()):
        given = ((), {}) if key in module._forward_hooks_with_kwargs else ((),)
        edited = hook(module, *given, value)
        value = value if edited is None else edited
    return value
