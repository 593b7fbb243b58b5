"""A network as a graph whose nodes can be computed one by one: what `forward` evaluates variants with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg

from ..errors import ModelError
from ..state import evaluating

OUT_OF_PLACE: Mapping[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv,
}  # fmt: skip


class _Tracer(fx.Tracer):
    """Follows buffers like parameters, so that what is computed from one is computed again when it changes."""

    proxy_buffer_attributes = True


Step = Callable[[fx.Node, Mapping[fx.Node, Any], dict[str, Tensor]], Any]


@dataclass(frozen=True, eq=False)
class _Owner:
    """A parameter as a node has it: the name within the node's module, empty for the node's own attribute."""

    node: fx.Node
    local: str


class Graph:
    """A traced network whose nodes can be computed one by one.

    Attributes:
        order: All nodes, in the order of computation.
        start: The images.
        end: The logits.
        shapes: Shapes of the values of the last guarded run.
    """

    def __init__(self, model: nn.Module) -> None:
        with evaluating(model):
            traced = fx.GraphModule(model, _Tracer().trace(model))
        self._modules: dict[str, nn.Module] = dict(traced.named_modules())
        self._rewritten = _without_side_effects(traced.graph, self._modules)
        self.order: list[fx.Node] = list(traced.graph.nodes)
        starts = [node for node in self.order if node.op == "placeholder"]
        if len(starts) != 1:
            raise ModelError(f"a network must take images alone, got {len(starts)} inputs")
        self.start, self.end = starts[0], self.order[-1]
        self._attributes: dict[str, Any] = {
            str(node.target): operator.attrgetter(str(node.target))(traced) for node in self.order if node.op == "get_attr"
        }
        self._owners = self._find_owners(model)
        strange = {node.target for node in self.order if node.op == "get_attr"} - self._owners.keys()
        if strange:
            raise ModelError(f"the trace holds a tensor that is no parameter or buffer, '{min(map(str, strange))}'")
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._reach: dict[frozenset[str], tuple[list[fx.Node], list[fx.Node]]] = {}

    def _find_owners(self, model: nn.Module) -> dict[str, list[_Owner]]:
        """Return for each parameter and buffer the nodes that read it, also under another name that it may have."""
        by_tensor: dict[int, list[_Owner]] = {}
        for node in self.order:
            if node.op == "get_attr":
                by_tensor.setdefault(id(self._attributes[str(node.target)]), []).append(_Owner(node, ""))
            elif node.op == "call_module":
                module = self._modules[str(node.target)]
                for local, tensor in (*module.named_parameters(), *module.named_buffers()):
                    by_tensor.setdefault(id(tensor), []).append(_Owner(node, local))
        own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {name: by_tensor.get(id(tensor), []) for name, tensor in own}

    def reach(self, changed: Mapping[str, Tensor]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes that depend on what changes, the end among them, and the others whose values they need."""
        key = frozenset(changed)
        if key not in self._reach:
            reached = {owner.node for name in changed for owner in self._owners[name]} | {self.end}
            for node in self.order:
                if not reached.isdisjoint(node.all_input_nodes):
                    reached.add(node)
            needed = {source for node in reached for source in node.all_input_nodes} - reached
            self._reach[key] = tuple([n for n in self.order if n in part] for part in (reached, needed))  # type: ignore[assignment]
        return self._reach[key]

    def needed(self, wanted: Iterable[fx.Node], known: Any) -> list[fx.Node]:
        """Return what has to be computed for ``wanted``, down to the nodes that are ``known``."""
        needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in needed and not known(node):
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return [node for node in self.order if node in needed]

    def run(
        self,
        nodes: Sequence[fx.Node],
        values: Mapping[fx.Node, Any],
        changed: Mapping[str, Tensor],
        wanted: Iterable[fx.Node] = (),
        *,
        step: Step | None = None,
    ) -> dict[fx.Node, Any]:
        """Compute ``nodes`` in this order from the ``values`` of others; return the end, the ``wanted`` and what is left.

        Args:
            nodes: What to compute.
            values: Of the nodes that these need.
            changed: Parameters and buffers by full name.
            wanted: Nodes whose values are to be kept.
            step: Computes a node from the values so far and its own changed parameters; `step` by default.
        """
        environment = dict(values)
        last: dict[fx.Node, fx.Node] = {source: node for node in nodes for source in node.all_input_nodes}
        stay = {self.end, *wanted}
        new, step = self.owned(changed), step or self.step
        for node in nodes:
            if node not in environment:
                environment[node] = step(node, environment, new.get(node, {}))
            for source in node.all_input_nodes:
                if last[source] is node and source not in stay:
                    environment.pop(source, None)
        return environment

    def owned(self, changed: Mapping[str, Tensor]) -> dict[fx.Node, dict[str, Tensor]]:
        """Return what changes by the node that reads it, and by the name that it has there."""
        new: dict[fx.Node, dict[str, Tensor]] = {}
        for name, value in changed.items():
            for owner in self._owners[name]:
                new.setdefault(owner.node, {})[owner.local] = value
        return new

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, if it does."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def guarded_step(self, node: fx.Node, environment: Mapping[fx.Node, Any], new: dict[str, Tensor]) -> Any:
        """Compute a node; refuse one that writes into a value, and one that did so to a view of a value still needed.

        Raises:
            ModelError: It does.
        """
        tensors = {source: value for source, value in environment.items() if isinstance(value, Tensor)}
        versions = {source: value._version for source, value in tensors.items()}
        result = self.step(node, environment, new)
        if isinstance(result, Tensor):
            self.shapes[node] = tuple(result.shape)
        if any(value._version != versions[source] for source, value in tensors.items()):
            raise ModelError(f"'{node.name}' writes into its input")
        first = node.args[0] if node in self._rewritten else None
        if isinstance(first, fx.Node) and first in tensors:
            place = tensors[first].untyped_storage().data_ptr()
            if any(value.untyped_storage().data_ptr() == place for source, value in tensors.items() if source is not first):
                raise ModelError(f"'{node.name}' writes into a view")
        return result

    def step(self, node: fx.Node, environment: Mapping[fx.Node, Any], new: dict[str, Tensor]) -> Any:
        """Compute a node from the values of others, with ``new`` in place of parameters and buffers of its module."""
        args = map_arg(node.args, environment.__getitem__)
        kwargs = map_arg(node.kwargs, environment.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            return new.get("", self._attributes[str(node.target)])
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return functional_call(module, new, args, kwargs) if new else module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _without_side_effects(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Turn what writes into its input into what returns a new tensor, which whoever reads the input later gets to read.

    Returns:
        The nodes that were turned.
    """
    inplace = [name for name, module in modules.items() if getattr(module, "inplace", False)]
    for name in inplace:
        modules[name] = copy(modules[name])
        vars(modules[name])["inplace"] = False
    seen: set[fx.Node] = set()
    turned: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        target = node.target
        if node.op == "call_module" and target in inplace:
            pass
        elif node.op == "call_function" and target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[target]
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_method" and str(target).endswith("_") and not str(target).endswith("__"):
            node.target = str(target)[:-1]
        else:
            continue
        before = frozenset(seen)
        node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, before=before: user not in before)
        turned.add(node)
    return turned
