"""ONNX files: a network in floating point, or, where it is quantised, a QDQ graph that runtimes compute in whole numbers.

The input is ``images``, float ``(batch, c, h, w)`` in [0, 1]; the normalisation is inside; the output is ``logits``.
Batch-norms are folded into the convolutions that feed them alone.

In a QDQ graph weights are stored as int8, biases as int32, each behind a `DequantizeLinear`; each site of the network
(`models.flow`) is followed by a `QuantizeLinear` to uint8 and a `DequantizeLinear`. A runtime that knows the pattern computes
what stands between them in whole numbers (ONNX Runtime: `QLinearConv`, `QLinearAdd` ...). The operators are those of opset 17.

It is written from the steps of the network, not by ``torch.onnx.export`` (2.13): its older way refuses weights of 255 levels,
which are symmetric, and has rounding of float32 weights in the graph; its newer way has no translation of fake-quantised
tensors.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, check_range
from ..models import Classifier, Quantisation, quantisation_of, wrappers_of
from ..models.flow import Flow, affine, after, folded, is_layer, origin, trace
from ..models.quant import LARGEST, SMALLEST
from ..models.quantised import check_grid, flow_of, levels, whole
from ..state import evaluating
from .onnx_ops import array, pair, write

OPSET, IR = 17, 8
BIAS = 2**30  # largest bias in steps: int32 with a bit to spare for the sum that it is added to
ALONE = 2**20  # steps of the bias of a row of zeros, whose step is free: float32 tells apart what is 16 times finer


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: Where.
        size_bytes: How large.
        kind: ``int8`` or ``float32``.
        notes: What else there is to say.
    """

    path: Path
    size_bytes: int
    kind: str
    notes: tuple[str, ...] = ()


def need(module: str) -> Any:
    """Import a module of the extra ``onnx``; raise `ModelError` with the remedy where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"this needs {module}: pip install 'secateur[onnx]'") from error


def export_onnx(model: Classifier, path: str | Path, *, batch: int = 0, overwrite: bool = False) -> Exported:
    """Write a network as ONNX; a quantised one as a QDQ graph of 8 bit.

    Args:
        model: A classifier, in floating point or quantised (`quantise`, `qat`); left as it was.
        path: File to write, in a folder that is made if need be.
        batch: Images at once that the file takes; 0: any number.
        overwrite: Whether ``path`` may exist.

    Returns:
        What was written. Weights of fewer than 8 bits lie in int8, too.

    Raises:
        ModelError: The extra ``onnx`` is missing; a step has no translation; feature maps of fewer than 8 bits, which no
            runtime has; edits of feature maps are on the network; weights have left their grid; or ``path`` is in use.
    """
    check_range("batch", batch, 0, 65536)
    onnx = need("onnx")
    path = Path(path)
    if path.exists() and not overwrite:
        raise ModelError(f"{path} must not exist; overwrite it on purpose (overwrite=True)")
    if wrappers_of(model):
        raise ModelError("edits of feature maps are not exported; take them off first (unwrap)")
    quantisation = quantisation_of(model)
    if quantisation is not None:
        if quantisation.activation_bits != 8:
            bits = quantisation.activation_bits
            raise ModelError(
                f"an integer runtime has feature maps of 8 bits, got {bits}; quantise with bits=8, weight_bits={bits}"
            )
        check_grid(model.net, quantisation)
    graph = _Graph(model, quantisation)
    content = graph.model(onnx, batch).SerializeToString()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
    return Exported(path, len(content), "float32" if quantisation is None else "int8", tuple(graph.notes))


class _Graph:
    """The ONNX graph while it is written."""

    def __init__(self, model: Classifier, quantisation: Quantisation | None) -> None:
        self.classifier, self.quantisation = model, quantisation
        self.modules: Mapping[str, nn.Module] = dict(model.net.named_modules())
        self.flow: Flow = trace(model.net, model.input_shape) if quantisation is None else flow_of(model)
        self.sites = {node: name for name, node in self.flow.sites.items()}
        seen: dict[fx.Node, Any] = {}
        self.seen: Mapping[fx.Node, Any] = seen
        self.names: dict[fx.Node, str] = {}
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, Any] = {}
        self.notes: list[str] = []
        with evaluating(model), torch.no_grad():
            self.flow.run(model.net, torch.zeros(2, *model.input_shape, device=model.mean.device), seen=seen)
            self._write_all()

    def name(self, node: Any) -> str:
        """Return the name of a step's value, written down as a constant if it is a number or a parameter."""
        if not isinstance(node, fx.Node):
            return self.constant(np.float32(node), "number")
        if node not in self.names:
            value = self.seen[node]
            if not isinstance(value, Tensor | int | float):
                raise ModelError(f"'{node.name}' is no tensor and has no translation to ONNX here")
            self.names[node] = self.constant(array(value) if isinstance(value, Tensor) else np.float32(value), node.name)
        return self.names[node]

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Write an operation of one output and return its name."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append((kind, inputs, name, attributes))
        return name

    def constant(self, value: Any, hint: str) -> str:
        """Write a constant and return its name."""
        name = f"{hint}_{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def _write_all(self) -> None:
        model, shape = self.classifier, (1, -1, 1, 1)
        gone: set[fx.Node] = set()
        for node, _ in self.flow.steps:
            if node.op == "placeholder":
                shifted = self.node("Sub", ["images", self.constant(array(model.mean).reshape(shape), "mean")])
                self.names[node] = self.node("Div", [shifted, self.constant(array(model.std).reshape(shape), "std")])
            elif node in gone or node.target is after:
                assert isinstance(node.args[0], fx.Node)
                self.names[node] = self.names.get(node.args[0], "")
            elif node.op == "output":
                assert isinstance(node.args[0], fx.Node)
                self.nodes.append(("Identity", [self.name(node.args[0])], "logits", {}))
            elif node.op == "get_attr" or not isinstance(self.seen[node], Tensor):
                continue
            elif is_layer(node, self.modules):
                norm = folded(node, self.modules, self.sites)
                gone.update({norm} if norm else ())
                self.names[node] = self._layer(node, norm)
            else:
                self.names[node] = write(self, node)
            self._mark(node)

    def _mark(self, node: fx.Node) -> None:
        """Put a value on the grid of its site, also again behind what only moved it: the runtime wants whole numbers there."""
        if self.quantisation is None or node.op == "output" or node.target is after:
            return
        source = origin(node, self.modules)
        if source in self.sites and any(user.op != "output" for user in node.users):
            scale, zero = self.quantisation.activations[self.sites[source]]
            grid = [self.constant(np.float32(scale), "scale"), self.constant(np.uint8(zero), "zero")]
            whole_ = self.node("QuantizeLinear", [self.names[node], *grid])
            self.names[node] = self.node("DequantizeLinear", [whole_, *grid])

    def _layer(self, node: fx.Node, norm: fx.Node | None) -> str:
        module: Any = self.modules[str(node.target)]
        factor, shift = affine(self.modules[str(norm.target)] if norm else None, module)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        plain = type(module) is nn.Conv2d or self.seen[source].ndim == 2
        weight, bias = self._parameters(str(node.target), module, factor, shift, source, plain)
        name = self.name(source)
        if type(module) is nn.Conv2d:
            return self.node("Conv", [name, weight, bias], **_settings(node, module))
        if plain:
            return self.node("Gemm", [name, weight, bias], transB=1)
        return self.node("Add", [self.node("MatMul", [name, weight]), bias])

    def _parameters(
        self, layer: str, module: Any, factor: Tensor, shift: Tensor, source: fx.Node, plain: bool
    ) -> tuple[str, str]:  # fmt: skip
        """Write weight and bias, folded; in whole numbers where the network is quantised."""
        weight = module.weight.detach().double().cpu()
        if self.quantisation is None:
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            weight = weight if plain else weight.T
            return self.constant(array(weight), f"{layer}.weight"), self.constant(array(shift), f"{layer}.bias")
        bits, steps = self.quantisation.weight_bits, self.quantisation.weights[layer].double().cpu()
        numbers = whole(weight, steps, bits) * factor.sign().reshape(-1, *[1] * (weight.ndim - 1))
        site = self.sites.get(origin(source, self.modules))
        if site is None:
            raise ModelError(f"'{layer}' reads what is not rounded, and is not exported in whole numbers; export it in float")
        given, _ = self.quantisation.activations[site]
        dead = numbers.flatten(1).abs().amax(dim=1) == 0  # a filter of zeros, or a norm's weight of 0
        scale = torch.where(dead, _alone(shift, given), steps * factor.abs())
        floor = shift.abs() / (given * BIAS)
        wider = torch.maximum(scale, floor)  # where a bias would leave 32 bits, its channel gets coarser weights
        if bool((wider > scale).any()):
            self.notes.append(
                f"{int((wider > scale).sum())} channels of '{layer}' have coarser weights: their bias is far larger"
            )
            numbers = (numbers * (scale / wider).reshape(-1, *[1] * (weight.ndim - 1))).round()
        numbers, wide = numbers.clamp(-levels(bits), levels(bits)), wider.float()
        kept = (numbers if plain else numbers.T).to(torch.int8).numpy()
        axis = 0 if plain else 1
        name = self._whole(kept, wide.numpy(), f"{layer}.weight", axis)
        if not plain:
            return name, self.constant(array(shift), f"{layer}.bias")
        step = np.float32(given) * wide.numpy()
        return name, self._whole(np.rint(shift.numpy() / step.astype(np.float64)).astype(np.int32), step, f"{layer}.bias", 0)

    def _whole(self, numbers: Any, scale: Any, hint: str, axis: int) -> str:
        zero = np.zeros(len(scale), numbers.dtype)
        names = [self.constant(value, what) for value, what in ((numbers, hint), (scale, "scale"), (zero, "zero"))]
        return self.node("DequantizeLinear", names, axis=axis)

    def model(self, onnx: Any, batch: int) -> Any:
        """Return the graph as ONNX keeps it, checked."""
        from .. import __version__

        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        model = self.classifier
        size = batch or "batch"
        graph = helper.make_graph(
            [helper.make_node(kind, inputs, [name], name=name, **given) for kind, inputs, name, given in self.nodes],
            "network",
            [helper.make_tensor_value_info("images", float32, [size, *model.input_shape])],
            [helper.make_tensor_value_info("logits", float32, [size, *self.seen[self.flow.end].shape[1:]])],
            [onnx.numpy_helper.from_array(np.array(value, order="C"), name) for name, value in self.constants.items()],
        )
        made = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR,
            producer_name="secateur",
            producer_version=__version__,
        )
        helper.set_model_props(made, {"classes": json.dumps(list(model.classes))})
        onnx.checker.check_model(made, full_check=True)
        return made


def _alone(shift: Tensor, given: float) -> Tensor:
    """Return steps for rows of zeros: no weight needs one, so it is made for the bias, which a norm could coarsen."""
    return torch.where(shift == 0, torch.ones_like(shift), (shift.abs() / (given * ALONE)).clamp(SMALLEST, LARGEST))


def _settings(node: fx.Node, conv: Any) -> Mapping[str, Any]:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ModelError(f"'{node.target}' pads in a way ('{conv.padding}', {conv.padding_mode}) that is not exported")
    down, right = pair(conv.padding)
    return {
        "kernel_shape": pair(conv.kernel_size),
        "strides": pair(conv.stride),
        "pads": [down, right, down, right],
        "dilations": pair(conv.dilation),
        "group": conv.groups,
    }
