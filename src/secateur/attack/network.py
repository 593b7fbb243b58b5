"""The network under attack: in eval mode, frozen, and, where its answers stay the same, as a faster copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..forward import check_logits
from ..models import quantisation_of
from ..state import evaluating, frozen, seeded
from .losses import Aim, together

Forward = Callable[[nn.Module, Tensor], Tensor]
PROBED = 8  # images on which a copy must answer as the network does
SAME = 1e-5  # largest difference of two logits that count as the same, relative to the largest
WORTH = 256  # images through the network from which on a copy pays


class Network:
    """Calls a network, or a user's `Forward` in its place.

    A call returns logits ``(n, classes)``, or ``(draws, n, classes)`` from a `Forward` that draws.
    """

    def __init__(self, module: nn.Module, forward: Forward | None, layout: torch.memory_format) -> None:
        self._module, self._forward, self._layout = module, forward, layout
        self._unusable: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits; raise `ModelError` when the network does not take the images."""
        x = x.contiguous(memory_format=self._layout)
        try:
            logits: Any = self._module(x) if self._forward is None else self._forward(self._module, x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"the network cannot take images of shape {tuple(x.shape[1:])}: {reason}") from error
        if isinstance(logits, Tensor) and logits.ndim == 3:
            for draw in logits:
                check_logits(draw, len(x), 2)
            return logits
        return check_logits(logits, len(x), 2)

    def answers(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes)`` without a gradient."""
        with torch.no_grad():
            return together(self(x))

    def slope(self, x: Tensor, y: Tensor, aim: Aim, *, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the aim is reached, the loss, both ``(n,)``, and the loss's gradient in ``x``, from one forward.

        Raises:
            DataError: A label is not among the classes.
            MethodError: The loss needs more classes.
            ModelError: The answers are not finite, or no gradient comes back.
        """
        x = x.detach().requires_grad_()
        logits = self(x)
        if first:
            aim.check(logits, y)
            check_finite(logits)
        value = aim.value(logits, y)
        try:
            [slope] = torch.autograd.grad(value.sum(), [x], allow_unused=True) if value.requires_grad else [None]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation without a derivative
            raise no_gradient(error) from error
        if slope is None:
            raise no_gradient()
        unusable = ~slope.isfinite().all()
        self._unusable = unusable if self._unusable is None else self._unusable | unusable
        return aim.reached(logits.detach(), y), value.detach(), slope

    def check_slopes(self) -> None:
        """Raise `ModelError` unless all slopes so far were finite: asked once, because each answer waits for the device."""
        if self._unusable is not None and bool(self._unusable):
            raise ModelError("the network's gradient must be finite, got NaN or infinity; attack without gradients ('square')")


def no_gradient(error: RuntimeError | None = None) -> ModelError:
    """Return what to raise where no gradient comes back, with what torch says of it."""
    said = next(iter(str(error).strip().splitlines()), "") if error else ""
    why = f" ({said})" if said else ""
    return ModelError(
        f"the network passes no gradient back to the images{why}; give a differentiable twin (forward=bpda(twin)), or attack "
        "without gradients ('square')"
    )


def check_finite(logits: Tensor) -> None:
    """Raise `ModelError` unless all logits are finite."""
    if not bool(logits.isfinite().all()):
        raise ModelError("the network's answers must be finite, got NaN or infinity on the images as given; repair it first")


@contextmanager
def opened(
    model: nn.Module, x: Tensor, *, forward: Forward | None, passes: int, generator: torch.Generator
) -> Iterator[Network]:
    """Make ``model`` ready for an attack on ``x`` that sends each image through it ``passes`` times; then put all back.

    Meanwhile torch's own random draws come from ``generator``, for networks that draw.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(generator),
        evaluating(model),
        frozen(model),
    ):
        copy = quick_copy(model, x[:PROBED]) if forward is None and passes * len(x) >= WORTH else None
        layout = torch.contiguous_format if copy is None else torch.channels_last
        yield Network(model if copy is None else copy, forward, layout)


def quick_copy(model: nn.Module, x: Tensor) -> nn.Module | None:
    """Return a copy of a network in eval mode with the same answers, faster where it convolves; None if there is none.

    Each batch-norm that is all that reads a convolution is folded into it, and weights lie as convolutions want them. A
    network that draws, that is quantised or has hooks, that cannot be copied, or that answers differently on ``x`` once folded,
    has none.
    """
    modules = list(model.modules())
    if not any(type(module) is nn.Conv2d for module in modules) or any(map(_hooked, modules)):
        return None
    if any(quantisation_of(module) is not None for module in modules):  # folded, values may be rounded the other way
        return None
    x = x.clone(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            copy = deepcopy(model).requires_grad_(False)
            _fold(copy, x)
            copy = copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            answers = [network(x) for network in (model, copy, model)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever somebody's network raises when it is copied; then there is none
        return None
    if not all(isinstance(answer, Tensor) for answer in answers):
        return None
    off = max(float((answer - answers[0]).abs().max()) for answer in answers)
    return copy if off <= SAME * max(1.0, float(answers[0].abs().max())) and torch.equal(answers[0], answers[2]) else None


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(len, hooks))


class _Reads(TorchFunctionMode):
    """Counts how many operations read each convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, nn.Module]] = []
        self.count: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the tensors among the arguments, unless only a shape or the like is asked for."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            for value in tree_leaves((args, kwargs)):
                if id(value) in self.count:
                    self.count[id(value)] += 1
        return result


def _fold(network: nn.Module, x: Tensor) -> None:
    """Fold batch-norms into the convolutions that they alone read, in place, as a forward of ``x`` shows them."""
    reads = _Reads()
    fed: dict[nn.Module, list[tuple[nn.Module, Tensor] | None]] = {}

    def convolved(module: nn.Module, _: object, output: Tensor) -> None:
        reads.outputs.append((output, module))
        reads.count[id(output)] = 0

    def normed(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        source = next(((conv, output) for output, conv in reads.outputs if output is given[0]), None)
        fed.setdefault(module, []).append(source)

    handles = [m.register_forward_hook(convolved) for m in network.modules() if type(m) is nn.Conv2d]
    handles += [m.register_forward_pre_hook(normed) for m in network.modules() if type(m) is nn.BatchNorm2d]
    try:
        with reads:
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    runs = Counter(conv for _, conv in reads.outputs)
    for norm, sources in fed.items():
        if len(sources) == 1 and sources[0] is not None:
            conv, output = sources[0]
            if runs[conv] == 1 and reads.count[id(output)] == 1:
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(norm, nn.BatchNorm2d)
                _fold_one(network, conv, norm)


def _fold_one(network: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child is norm:
                setattr(parent, name, nn.Identity())
