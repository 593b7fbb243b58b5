"""Incremental evaluation: many variants of one network on the same images, each computing only what its changes reach.

A pruning search asks for thousands of networks that differ in a few parameters. `Incremental` traces the network once
(torch.fx). What lies before the first changed layer, and beside all of them, is the same in every variant: it is computed once
and kept, within a budget of memory. Where a few channels change, predictions are found from these channels and from what is
kept of the unchanged network (see `secateur.models.channelwise`).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from . import state
from .errors import MethodError, ModelError, check_range
from .models import core
from .models.channelwise import Channelwise
from .models.graph import Graph
from .types import ImageSet, to_float

CHECKED = 32  # images on which a trace must answer as the network does
NEAR = 1e-4  # two logits nearer than this share of the largest may swap places by the order in which numbers are added


class Incremental:
    """Answers of a network on fixed images, with some of its parameters replaced.

    A variant is a mapping from names of parameters or buffers, relative to ``core(model)``, to their new values. Its answers
    are those of a full forward. No variant is computed twice.

    Attributes:
        note: Why nothing is saved (the network cannot be traced, or its trace answers differently); empty otherwise.
        forwards: How many batches went through at least a part of the network, for records of what a search has cost.
    """

    def __init__(self, model: nn.Module, data: ImageSet, *, memory: int = 2**30, batch_size: int = 512) -> None:
        """Take a copy of ``model``.

        Args:
            model: Takes images in [0, 1] and returns logits; not changed.
            data: The images; order and batches stay the same.
            memory: Bytes that values inside the network may take, and answers as many again, >= 0; what does not fit is
                computed again each time.
            batch_size: Images at once.

        Raises:
            MethodError: A number is out of range.
            ModelError: The network does not accept these images.
        """
        check_range("memory", memory, 0, 2**50)
        check_range("batch_size", batch_size, 1, 2**31)
        self.data, self.note, self.forwards = data, "", 0
        self._model = deepcopy(model).eval().requires_grad_(False)
        self._prefix = "" if core(model) is model else "net."
        self._device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        self._batches = data.x.split(state.batch_size(batch_size)) if len(data) else ()
        own = self._model.named_parameters(remove_duplicate=False), self._model.named_buffers(remove_duplicate=False)
        self._own: dict[str, Tensor] = {**dict(own[0]), **dict(own[1])}
        self._memory = memory
        self._memo: OrderedDict[str, Tensor] = OrderedDict()
        self._graph = self._traced()
        self._kept = _Kept(memory)

    def _traced(self) -> Graph | None:
        try:
            graph = Graph(self._model)
        except Exception as error:  # noqa: BLE001 - whatever somebody's forward raises when it is traced
            self.note = f"every variant is computed in full: {_first_line(error)}"
            return None
        if not self._batches:
            return graph
        x = self._input(0)[:CHECKED]
        with torch.inference_mode():
            expected = self._whole({}, x)
        with torch.no_grad():  # which counts writes, as inference mode does not
            try:
                same = torch.equal(graph.run(graph.order, {graph.start: x}, {}, step=graph.guarded_step)[graph.end], expected)
            except Exception as error:  # noqa: BLE001 - a trace can hold what only the tracer's own input allowed
                self.note = f"every variant is computed in full: {_first_line(error)}"
                return None
        if not same:
            self.note = "every variant is computed in full: traced, the network answers differently"
        return graph if same else None

    def _whole(self, changed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        try:
            return check_logits(functional_call(self._model, dict(changed), (x,)), len(x), len(self.data.classes))
        except RuntimeError as error:
            raise ModelError(f"the network cannot take images of shape {self.data.shape}: {_first_line(error)}") from error

    def _input(self, batch: int) -> Tensor:
        return to_float(self._batches[batch]).to(self._device).contiguous(memory_format=torch.channels_last)

    def stream(self, changes: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the logits of one batch after the other, each ``(b, classes)``.

        Raises:
            ModelError: A name or shape in ``changes`` does not belong to this network.
        """
        yield from self._stream(self._changed(changes))

    def _stream(self, changed: Mapping[str, Tensor], way: Channelwise | None = None) -> Iterator[Tensor]:
        for batch in range(len(self._batches)):
            with torch.inference_mode():
                logits = None if way is None else self._nearly(changed, batch, way)
                logits = self._logits(changed, batch) if logits is None else logits
            self.forwards += 1
            yield logits

    def _nearly(self, changed: Mapping[str, Tensor], batch: int, way: Channelwise) -> Tensor | None:
        """Return logits up to rounding, whose order is sure; None where it is not."""
        assert self._graph is not None
        reached, border = self._graph.reach(changed)
        values = self._border(self._graph, [*border, *way.olds], batch)
        olds = {node: values.pop(node) for node in way.olds}
        logits = self._graph.run(reached, values, changed, step=way.step(olds))[self._graph.end]
        return None if _close(logits).any() else logits

    def _way(self, changed: Mapping[str, Tensor]) -> Channelwise | None:
        """Return how to spare work within layers; None if there is nothing to spare, or too much to remember for it."""
        if self._graph is None or not self._graph.shapes:
            return None
        reached, border = self._graph.reach(changed)
        way = Channelwise(self._graph, reached, changed)
        shapes = [self._graph.shapes.get(node, ()) for node in (*border, *way.olds)]
        size = 4 * len(self.data) * sum(math.prod(shape[1:]) for shape in shapes)  # bytes, in float32
        return way if way.saves and size <= self._memory else None

    def _logits(self, changed: Mapping[str, Tensor], batch: int) -> Tensor:
        if self._graph is None:
            return self._whole(changed, self._input(batch))
        reached, border = self._graph.reach(changed)
        return self._graph.run(reached, self._border(self._graph, border, batch), changed)[self._graph.end]

    def _border(self, graph: Graph, border: Sequence[fx.Node], batch: int) -> dict[fx.Node, Tensor]:
        """Return the values on the border in the unchanged network, from memory or computed from what is there."""
        values: dict[fx.Node, Any] = {node: self._kept.get(node, batch) for node in border}
        missing = [node for node, value in values.items() if value is None]
        if missing:
            found: dict[fx.Node, Any] = {}
            needed = graph.needed(missing, lambda node: self._known(node, batch, found))
            computed = graph.run(needed, found, {}, wanted=missing)
            for node in missing:
                values[node] = computed[node]
                self._kept.put(node, batch, computed[node], border)
        return values

    def _known(self, node: fx.Node, batch: int, found: dict[fx.Node, Any]) -> bool:
        if node.op == "placeholder":
            found[node] = self._input(batch)
        elif (value := self._kept.get(node, batch)) is not None:
            found[node] = value
        return node in found

    def _changed(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what really changes, by full name, on the network's device."""
        changed = {}
        for name, value in changes.items():
            old = self._own.get(self._prefix + name)
            if old is None:
                raise ModelError(f"'{name}' is not a parameter or buffer of this network")
            if old.shape != value.shape:
                raise ModelError(f"'{name}' must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
            value = value.detach().to(old)
            if not torch.equal(value, old):
                changed[self._prefix + name] = value
        return changed

    def logits(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of all images, ``(n, classes)``, on the CPU."""
        return torch.cat([part.cpu() for part in self.stream(changes)])

    def predict(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return the predicted class of each image, int64 ``(n,)``; remembered, the last ones within the budget of memory."""
        changed = self._changed(changes)
        key = _digest(changed)
        if key in self._memo:
            self._memo.move_to_end(key)
            return self._memo[key].long()
        parts = [part.argmax(dim=1).to("cpu", torch.int32) for part in self._stream(changed, self._way(changed))]
        answers = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        self._memo[key] = answers
        if len(self._memo) * answers.nbytes > self._memory:
            self._memo.popitem(last=False)
        return answers.long()

    def correct(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return which images are answered rightly, bool ``(n,)``."""
        return self.predict(changes) == self.data.y

    def sweep(self, reader: str, groups: Sequence[Tensor]) -> Tensor:
        """Predict with ever more inputs of the last linear layer cut: all cut points from one pass, by running sums.

        Args:
            reader: Name of the linear layer, whose output is the network's.
            groups: What to cut first, second, ...: indices of its inputs, each in one group at most.

        Returns:
            int64 ``(len(groups) + 1, n)``; row ``k`` is the answer with the first ``k`` groups cut.

        Raises:
            MethodError: The network does not end in this layer.
        """
        layer, node = self._last_linear(reader)
        weight, bias = layer.weight.double(), 0.0 if layer.bias is None else layer.bias.double()
        keep = torch.ones(len(groups) + 1, layer.in_features, dtype=torch.bool, device=self._device)
        for cut, group in enumerate(groups):
            keep[cut + 1 :, group.to(self._device)] = False
        at_once = max(1, self._memory // (64 * len(keep) * layer.out_features))  # eight tensors of float64
        parts = []
        for batch in range(len(self._batches)):
            with torch.inference_mode():
                for features in self._features(node, batch).split(at_once):
                    parts.append(_cut_points(features, layer, weight, bias, groups, keep).cpu())
        return torch.cat(parts, dim=1) if parts else torch.empty(len(groups) + 1, 0, dtype=torch.int64)

    def ends_in(self, reader: str) -> bool:
        """Return whether a layer of this name can be swept: a linear one whose output is the network's."""
        last = self._graph.end.args[0] if self._graph else None
        is_last = isinstance(last, fx.Node) and last.op == "call_module" and last.target == self._prefix + reader
        return is_last and isinstance(self._model.get_submodule(self._prefix + reader), nn.Linear)

    def _last_linear(self, reader: str) -> tuple[nn.Linear, fx.Node]:
        if self.ends_in(reader):
            assert self._graph is not None
            layer, last = self._model.get_submodule(self._prefix + reader), self._graph.end.args[0]
            assert isinstance(layer, nn.Linear)
            assert isinstance(last, fx.Node)
            return layer, last.all_input_nodes[0]
        raise MethodError(f"a sweep needs the linear layer in which the network ends, got '{reader}'; use predict")

    def _features(self, node: fx.Node, batch: int) -> Tensor:
        assert self._graph is not None
        self.forwards += 1
        return self._border(self._graph, [node], batch)[node]


def _cut_points(
    features: Tensor, layer: nn.Linear, weight: Tensor, bias: Tensor | float, groups: Sequence[Tensor], keep: Tensor
) -> Tensor:
    """Return the predictions of one batch at every cut point, ``(len(groups) + 1, b)``."""
    wide = features.double()
    lost = [wide[:, group] @ weight[:, group].T for group in (g.to(features.device) for g in groups)]
    logits = wide @ weight.T + bias - torch.stack([torch.zeros_like(wide @ weight.T), *lost]).cumsum(dim=0)
    answers = logits.argmax(dim=-1)
    for cut in _close(logits).any(dim=1).nonzero().flatten().tolist():
        answers[cut] = F.linear(features, layer.weight * keep[cut], layer.bias).argmax(dim=1)
    return answers


def _close(logits: Tensor) -> Tensor:
    """Return where the two largest logits may swap places by rounding, bool without the last dimension; NaN is close."""
    top = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    apart = (top[..., 0] - top[..., -1]) > NEAR * (1 + logits.abs().amax(dim=-1))
    return ~apart if logits.shape[-1] > 1 else torch.zeros_like(apart)


def check_logits(answer: Any, images: int, classes: int) -> Tensor:
    """Return what a network answered; raise `ModelError` unless it is logits of ``(images, classes or more)``."""
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != images or shape[1] < classes:
        raise ModelError(f"the network must answer with logits of shape ({images}, {classes} or more), got {shape}")
    return answer


class _Kept:
    """Values of the unchanged network, by node and batch, within a budget."""

    def __init__(self, memory: int) -> None:
        self._memory, self._used = memory, 0
        self._values: OrderedDict[tuple[fx.Node, int], Tensor] = OrderedDict()

    def get(self, node: fx.Node, batch: int) -> Tensor | None:
        value = self._values.get((node, batch))
        if value is not None:
            self._values.move_to_end((node, batch))
        return value

    def put(self, node: fx.Node, batch: int, value: Any, border: Iterable[fx.Node]) -> None:
        """Keep a tensor; values at other places than ``border`` make room for it, and if that is not enough it is not kept."""
        if not isinstance(value, Tensor):
            return
        size, current = value.numel() * value.element_size(), set(border)
        while self._used + size > self._memory:
            victim = next((key for key in self._values if key[0] not in current), None)
            if victim is None:
                return
            gone = self._values.pop(victim)
            self._used -= gone.numel() * gone.element_size()
        self._values[node, batch] = value
        self._used += size


def _digest(changed: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(changed):
        digest.update(name.encode())
        digest.update(changed[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
