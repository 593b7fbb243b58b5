"""Attacks on a defence that knows it: what to call in place of a network whose gradient misleads.

Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018 (arXiv:1802.00420);
Athalye, Engstrom, Ilyas, Kwok, "Synthesizing Robust Adversarial Examples", ICML 2018 (arXiv:1707.07397).

An attack is *adaptive* when it was made against this very defence. `bpda` is for steps without a useful gradient (rounding,
quantisation, JPEG): answers are exact, the gradient is that of a differentiable twin. `eot` is for networks that draw. Both
make a `Forward` for the setting ``forward`` of every gradient attack, and combine: ``eot(20, forward=bpda(twin))``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError, check_range, unknown
from ..models.activations import passing_through
from ..models.quantised import Backward, backward_of
from ..state import evaluating
from .network import Forward


def bpda(twin: Callable[..., Tensor], *, layer: str | None = None) -> Forward:
    """Return a forward whose values are exact and whose gradient, at a layer or in the whole network, is that of a twin.

    Args:
        twin: Differentiable, takes what the layer takes and returns what it returns, nearly: ``lambda x: x`` for rounding.
        layer: Name of the submodule to bypass in the backward pass; by default the whole network is.

    Raises:
        MethodError: The network has no such layer (once the forward is called).
    """

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if layer is None:
            with torch.no_grad():
                exact = model(x)
            with evaluating(twin) if isinstance(twin, nn.Module) else nullcontext():
                return _Exact.apply(exact, twin(x))
        layers = dict(model.named_modules())
        if layer not in layers:
            raise MethodError(unknown("layer", layer, layers))
        handle = layers[layer].register_forward_hook(lambda _, given, output: _Exact.apply(output.detach(), twin(*given)))
        try:
            return model(x)
        finally:
            handle.remove()

    return forward


def through_wrappers(model: nn.Module, x: Tensor) -> Tensor:
    """Answer with the gradient of the network without its edits of feature maps (`models.wrap`): `bpda` at each of them.

    Rounding has a gradient of 0 everywhere, clamping one of 0 beyond its bounds; the twin of both is the identity.
    """
    with passing_through():
        return model(x)


def through_rounding(model: nn.Module, x: Tensor) -> Tensor:
    """Answer with the gradient of the network without its rounding of feature maps; that of its clamps is the true one."""
    with passing_through(("round",)):
        return model(x)


def through_quantisation(backward: Backward = "clipped", *, forward: Forward | None = None) -> Forward:
    """Return a forward for a quantised network (`compress.quantise`): exact values, with one of three gradients of rounding.

    None of them is best on every network, so a claim of robustness reports the worst over all (`prune.adaptives`).

    Args:
        backward: ``clipped``: that of the identity within the range of the grid, 0 beyond (what the network has by itself);
            ``pass-through``: that of the identity everywhere; ``float``: that of the network whose feature maps are not
            rounded, taken where that network's feature maps are (`bpda` with the float network as twin).
        forward: What to call in place of the network, such as `through_wrappers`.

    Raises:
        MethodError: There is no such gradient (once the forward is called).
    """

    def answered(model: nn.Module, x: Tensor) -> Tensor:
        call = forward or (lambda network, images: network(images))
        if backward == "float":
            with torch.no_grad():
                exact = call(model, x)
            with backward_of("float"):
                return _Exact.apply(exact, call(model, x))
        with backward_of(backward):
            return call(model, x)

    return answered


def eot(draws: int, *, forward: Forward | None = None) -> Forward:
    """Return a forward of several draws, so that an attack follows the mean of the gradients of their losses.

    An image counts as broken when the mean of the draws' probabilities says so. Time and memory grow with ``draws``.

    Args:
        draws: How often the network, or ``forward``, is called for each step, >= 1.
        forward: What to call in place of the network; its draws must come from torch's own generators, which attacks seed.

    Raises:
        MethodError: ``draws`` is out of range.
    """
    check_range("draws", draws, 1, 2**31)

    def drawn(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([model(x) if forward is None else forward(model, x) for _ in range(draws)])

    return drawn


class _Exact(torch.autograd.Function):
    """The first argument's value with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, soft: Tensor) -> Tensor:
        """Return the exact value."""
        if exact.shape != soft.shape:
            raise MethodError(f"a twin must return what it stands for: {tuple(exact.shape)}, got {tuple(soft.shape)}")
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """Hand the gradient to the twin."""
        return None, grads[0]
