"""What each step of a network is in ONNX: one function for each family of operations, chosen by what the step calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..models.flow import ADDITIONS, CONCATENATIONS


class Writer(Protocol):
    """What an operation needs of the graph that is being written."""

    modules: Mapping[str, nn.Module]
    seen: Mapping[fx.Node, Any]

    def name(self, node: Any) -> str:
        """Return the name of a step's value, written down as a constant if it is a number or a parameter."""
        ...

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Write an operation of one output and return its name."""
        ...

    def constant(self, value: Any, hint: str) -> str:
        """Write a constant and return its name."""
        ...


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a step, given by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def write(writer: Writer, node: fx.Node) -> str:
    """Write a step that is no convolution or linear layer; return the name of its value.

    Raises:
        ModelError: There is no such operation here, or it has arguments that are not translated.
    """
    if not node.args and node.target not in CONCATENATIONS:
        raise ModelError(f"'{node.name}' ({_word(node)}) must be given its input by place to be exported, not by name")
    if node.op == "call_module":
        module = writer.modules[str(node.target)]
        kind = next((kind for kind in MODULES if type(module) is kind), None)
        if kind is None:
            raise ModelError(f"'{node.target}' ({type(module).__name__}) has no translation to ONNX here")
        return MODULES[kind](writer, node, module)
    if node.target not in FUNCTIONS:
        raise ModelError(f"'{node.name}' ({_word(node)}) has no translation to ONNX here")
    return FUNCTIONS[node.target](writer, node)


def _word(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _one(kind: str, **attributes: Any) -> Callable[..., str]:
    return lambda writer, node, *_: writer.node(kind, [writer.name(node.args[0])], **attributes)


def _two(kind: str) -> Callable[[Writer, fx.Node], str]:
    def operation(writer: Writer, node: fx.Node) -> str:
        if len(node.args) != 2 or node.kwargs:  # alpha= of an addition, rounding_mode= of a division
            given = f"{len(node.args)} by place and {', '.join(node.kwargs) or 'none'} by name"
            raise ModelError(f"'{node.name}' ({_word(node)}) must have two arguments, both by place, got {given}")
        return writer.node(kind, [writer.name(value) for value in node.args])

    return operation


def _same(writer: Writer, node: fx.Node, *_: Any) -> str:
    return writer.name(node.args[0])


def _clip(writer: Writer, node: fx.Node, low: float, high: float) -> str:
    bounds = [writer.constant(np.float32(bound), "bound") for bound in (low, high)]
    return writer.node("Clip", [writer.name(node.args[0]), *bounds])


def _norm(writer: Writer, node: fx.Node, module: Any) -> str:
    if module.training or module.running_mean is None:
        raise ModelError(f"'{node.target}' takes its statistics from the batch, which an exported network cannot")
    ones, zeros = torch.ones_like(module.running_mean), torch.zeros_like(module.running_mean)
    values = (ones if module.weight is None else module.weight, zeros if module.bias is None else module.bias,
              module.running_mean, module.running_var)  # fmt: skip
    names = [writer.constant(array(value), "norm") for value in values]
    return writer.node("BatchNormalization", [writer.name(node.args[0]), *names], epsilon=module.eps)


def _pool(writer: Writer, node: fx.Node, of: Callable[[str, int, Any], Any], *, average: bool) -> str:
    """Write a pooling; ``of`` gives its settings by name, place and default."""
    kernel = pair(of("kernel_size", 1, None))
    stride = of("stride", 2, None)
    down, right = pair(of("padding", 3, 0))
    settings: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": pair(stride) if stride else kernel,
        "pads": [down, right, down, right],
        "ceil_mode": int(bool(of("ceil_mode", 4 if average else 5, False))),
    }
    if average:
        if of("divisor_override", 6, None) is not None:
            raise ModelError(f"'{node.name}' divides by a number of its own, which ONNX's pooling cannot")
        settings["count_include_pad"] = int(bool(of("count_include_pad", 5, True)))
    else:
        settings["dilations"] = pair(of("dilation", 4, 1))
    return writer.node("AveragePool" if average else "MaxPool", [writer.name(node.args[0])], **settings)


def _module_pool(average: bool) -> Callable[..., str]:
    return lambda w, node, module: _pool(w, node, lambda name, _, default: getattr(module, name, default), average=average)


def _function_pool(average: bool) -> Callable[[Writer, fx.Node], str]:
    return lambda w, node: _pool(w, node, lambda name, i, default: argument(node, i, name, default), average=average)


def _adaptive(writer: Writer, node: fx.Node, module: Any = None) -> str:
    source = node.args[0]
    before, after = writer.seen[source].shape[2:], writer.seen[node].shape[2:]  # type: ignore[index]
    if tuple(after) == (1, 1):
        return writer.node("GlobalAveragePool", [writer.name(source)])
    if any(old % new for old, new in zip(before, after, strict=True)):
        raise ModelError(f"'{node.name}' pools {tuple(before)} to {tuple(after)} by windows of several sizes; ONNX has none")
    kernel = [old // new for old, new in zip(before, after, strict=True)]
    return writer.node("AveragePool", [writer.name(source)], kernel_shape=kernel, strides=kernel)


def _mean(writer: Writer, node: fx.Node) -> str:
    dims, keep = argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    source = writer.seen[node.args[0]]  # type: ignore[index]
    chosen = tuple(range(source.ndim)) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
    axes = sorted(dim % source.ndim for dim in chosen)
    if axes != [2, 3] or source.ndim != 4:
        return writer.node("ReduceMean", [writer.name(node.args[0])], axes=axes, keepdims=int(keep))
    pooled = writer.node("GlobalAveragePool", [writer.name(node.args[0])])
    return pooled if keep else writer.node("Flatten", [pooled], axis=1)


def _shape(writer: Writer, node: fx.Node, *_: Any) -> str:
    """Write a new shape; the batch, 2 in the example, stays free."""
    shape, before = tuple(writer.seen[node].shape), writer.seen[node.args[0]].shape  # type: ignore[index]
    if shape[0] != before[0]:
        raise ModelError(f"'{node.name}' mixes images of a batch, which an exported network cannot")
    if len(shape) == 2:
        return writer.node("Flatten", [writer.name(node.args[0])], axis=1)
    return writer.node("Reshape", [writer.name(node.args[0]), writer.constant(np.array([-1, *shape[1:]]), "shape")])


def _concatenated(writer: Writer, node: fx.Node) -> str:
    parts: Any = argument(node, 0, "tensors")
    return writer.node("Concat", [writer.name(part) for part in parts], axis=argument(node, 1, "dim", 0))


def _slice(writer: Writer, node: fx.Node) -> str:
    key: Any = node.args[1]
    key = key if isinstance(key, tuple) else (key,)
    rows = [(axis, part) for axis, part in enumerate(key) if part != slice(None)]
    if Ellipsis in key or not all(isinstance(part, slice) and _plain(part) for _, part in rows):
        raise ModelError(f"'{node.name}' picks values in a way that has no translation to ONNX here")
    end = 2**31 - 1
    columns = (
        [part.start or 0 for _, part in rows],
        [end if part.stop is None else part.stop for _, part in rows],
        [axis for axis, _ in rows],
        [part.step or 1 for _, part in rows],
    )
    return writer.node("Slice", [writer.name(node.args[0]), *(writer.constant(np.array(c), "slice") for c in columns)])


def _plain(part: slice) -> bool:
    return all(isinstance(value, int | None) for value in (part.start, part.stop, part.step))


def _pad(writer: Writer, node: fx.Node) -> str:
    widths: Any = argument(node, 1, "pad")
    if argument(node, 2, "mode", "constant") != "constant":
        raise ModelError(f"'{node.name}' pads by other than a constant, which has no translation to ONNX here")
    dims = len(writer.seen[node].shape)
    pads = [0] * (2 * dims)
    for i in range(len(widths) // 2):
        pads[dims - 1 - i], pads[2 * dims - 1 - i] = widths[2 * i], widths[2 * i + 1]
    value = writer.constant(np.float32(argument(node, 3, "value") or 0), "padding")
    return writer.node("Pad", [writer.name(node.args[0]), writer.constant(np.array(pads), "pads"), value])


def _axis(kind: str) -> Callable[..., str]:
    def softmax(writer: Writer, node: fx.Node, module: Any = None) -> str:
        axis = argument(node, 1, "dim") if module is None else module.dim
        return writer.node(kind, [writer.name(node.args[0])], axis=1 if axis is None else axis)

    return softmax


def pair(value: Any) -> list[int]:
    """Return a setting for height and width."""
    return [value, value] if isinstance(value, int) else list(value)


def array(value: Tensor) -> Any:
    """Return a tensor as a float32 array."""
    return value.detach().cpu().float().numpy()


MODULES: Mapping[type, Callable[..., str]] = {
    nn.ReLU: _one("Relu"),
    nn.ReLU6: lambda writer, node, _: _clip(writer, node, 0, 6),
    nn.Hardtanh: lambda writer, node, module: _clip(writer, node, module.min_val, module.max_val),
    nn.ELU: lambda writer, node, module: _one("Elu", alpha=module.alpha)(writer, node),
    nn.LeakyReLU: lambda writer, node, module: _one("LeakyRelu", alpha=module.negative_slope)(writer, node),
    nn.Sigmoid: _one("Sigmoid"),
    nn.Tanh: _one("Tanh"),
    nn.Softmax: _axis("Softmax"),
    nn.LogSoftmax: _axis("LogSoftmax"),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout2d: _same,
    nn.Flatten: _shape,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.MaxPool2d: _module_pool(average=False),
    nn.AvgPool2d: _module_pool(average=True),
    nn.AdaptiveAvgPool2d: _adaptive,
}
FUNCTIONS: Mapping[Any, Callable[[Writer, fx.Node], str]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _one("Relu")),
    F.relu6: lambda writer, node: _clip(writer, node, 0, 6),
    F.elu: lambda writer, node: _one("Elu", alpha=argument(node, 1, "alpha", 1.0))(writer, node),
    F.leaky_relu: lambda writer, node: _one("LeakyRelu", alpha=argument(node, 1, "negative_slope", 0.01))(writer, node),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), _one("Sigmoid")),
    **dict.fromkeys((torch.tanh, "tanh"), _one("Tanh")),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _axis("Softmax")),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), _axis("LogSoftmax")),
    **dict.fromkeys((F.dropout, "contiguous", "clone"), _same),
    **dict.fromkeys((torch.flatten, torch.reshape, "flatten", "view", "reshape"), _shape),
    F.max_pool2d: _function_pool(average=False),
    F.avg_pool2d: _function_pool(average=True),
    F.adaptive_avg_pool2d: _adaptive,
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys(ADDITIONS, _two("Add")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), _two("Mul")),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _two("Sub")),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _two("Div")),
    **dict.fromkeys(CONCATENATIONS, _concatenated),
    operator.getitem: _slice,
    F.pad: _pad,
}
