"""Quantised networks: weights that lie on a grid, and feature maps that are put on one whenever the network answers.

Uniform quantisation as in Jacob et al., CVPR 2018 (arXiv:1712.05877) and Krishnamoorthi (arXiv:1806.08342): weights symmetric
with a step for each output channel, ``w = s_c * q`` with ``|q| <= 2^(b-1) - 1``; feature maps affine with one step for a whole
tensor, ``x = s * (q - z)`` with ``0 <= q <= 2^b - 1``. In both 0 is on the grid, so that what is pruned stays pruned.

A batch-norm stays as it is. Its scale can be multiplied into the steps of the convolution before it (`compress.export`),
because each output channel has a step of its own: rounding before and after folding is the same.

The network is no other object than before: names, weights, classes and hooks stay. Its ``forward`` is that of `Quantiser`,
which takes the steps of the network one by one (`flow`) and rounds at its sites. Hooks of modules that hold others see what
these return, but not what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..errors import ModelError, check_choice, unknown
from .activations import through
from .flow import Flow, trace
from .quant import FILE, LARGEST, SMALLEST, check_bits, check_quant
from .wrapper import Classifier, core

Backward = Literal["clipped", "pass-through", "float"]
_BACKWARD: ContextVar[Backward] = ContextVar("gradient of quantised feature maps", default="clipped")


@dataclass(frozen=True, eq=False)
class Quantisation:
    """How a network is quantised, as data.

    Attributes:
        weight_bits: In [2, 8].
        activation_bits: In [2, 8].
        weights: Layer -> step of each output channel, float32 ``(channels,)``, above 0.
        activations: Site -> step (above 0) and zero point (in ``[0, 2^b - 1]``).
    """

    weight_bits: int
    activation_bits: int
    weights: Mapping[str, Tensor]
    activations: Mapping[str, tuple[float, int]]

    def fields(self) -> dict[str, Any]:
        """Return what ``arch.json`` keeps of it."""
        grids = {site: {"scale": scale, "zero_point": zero} for site, (scale, zero) in self.activations.items()}
        bits = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        return {**bits, "weights": FILE, "activations": grids}

    @staticmethod
    def read(fields: Any, weights: Mapping[str, Tensor]) -> Quantisation:
        """Return the quantisation that a bundle keeps; `ModelError` when a value is not what it must be."""
        checked = check_quant(fields)
        grids = {site: (grid["scale"], grid["zero_point"]) for site, grid in checked["activations"].items()}
        return Quantisation(checked["weight_bits"], checked["activation_bits"], dict(weights), grids)


class Quantiser:
    """The forward of a quantised network.

    Attributes:
        net: The network, whose own forward is not used.
        flow: Its steps.
        quantisation: What is done at its sites.
        live: Whether weights are free and rounded at each forward, as in training, with steps from their largest values.
    """

    def __init__(self, net: nn.Module, flow: Flow, quantisation: Quantisation, *, live: bool) -> None:
        self.net, self.flow, self.quantisation, self.live = net, flow, quantisation, live
        self._top = 2**quantisation.activation_bits - 1

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images."""
        edit = None if _BACKWARD.get() == "float" else self._rounded
        return self.flow.run(self.net, x, edit=edit, layer=self._layer if self.live else None)

    def _rounded(self, site: str, value: Tensor) -> Tensor:
        scale, zero = self.quantisation.activations[site]
        rounded = torch.fake_quantize_per_tensor_affine(value, scale, zero, 0, self._top)
        return through(value, rounded) if _BACKWARD.get() == "pass-through" and not isinstance(value, fx.Proxy) else rounded

    def _layer(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, top = module.weight, levels(self.quantisation.weight_bits)
        assert isinstance(weight, Tensor)
        scale = steps(weight, self.quantisation.weight_bits)
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -top, top)
        return functional_call(module, {"weight": rounded}, (x,))


@contextmanager
def backward_of(backward: Backward) -> Iterator[None]:
    """Choose the gradient of rounded feature maps; with ``float`` they are not rounded at all."""
    check_choice("backward", backward, get_args(Backward))
    token = _BACKWARD.set(backward)
    try:
        yield
    finally:
        _BACKWARD.reset(token)


def levels(bits: int) -> int:
    """Return the largest whole number that stands for a weight of so many bits; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def steps(weight: Tensor, bits: int) -> Tensor:
    """Return the step of each output channel, float32 ``(channels,)``, with which its largest weight is the last level.

    A channel of zeros gets 1: nothing is multiplied by it, and its bias is not rounded to it.
    """
    largest = weight.detach().flatten(1).abs().amax(dim=1).float()
    return torch.where(largest > 0, (largest / levels(bits)).clamp(SMALLEST, LARGEST), torch.ones_like(largest))


def whole(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the whole numbers, as floats of the weight's shape, that stand for weights nearest to these."""
    grid = scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
    return (weight.detach() / grid).round().clamp(-levels(bits), levels(bits)) + 0.0  # -0.3 rounds to -0.0; no file keeps it


def on_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the weights rounded to the grid; those that lie on it do not change by a bit."""
    return whole(weight, scale, bits) * scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))


def attach(model: Classifier, quantisation: Quantisation, *, live: bool = False) -> None:
    """Make ``model`` itself answer as a quantised network.

    Args:
        model: A float network; its weights must lie on the grid already, unless ``live``.
        quantisation: What fits this architecture: a step for each output channel of each layer, a grid for each site.
        live: Round the weights at each forward, and let gradients through; see `Quantiser`.

    Raises:
        ModelError: The network is quantised already, cannot be followed, or the quantisation does not fit it.
    """
    net = core(model)
    if isinstance(vars(net).get("forward"), Quantiser):
        raise ModelError("the network is quantised already; take it off first (dequantised)")
    for name in ("weight_bits", "activation_bits"):
        check_bits(name, getattr(quantisation, name))
    flow = trace(net, model.input_shape)
    _check_names("activations", quantisation.activations, flow.sites)
    _check_names("weights", quantisation.weights, flow.layers)
    if not live:
        check_grid(net, quantisation)
    vars(net)["forward"] = Quantiser(net, flow, quantisation, live=live)


def check_grid(net: nn.Module, quantisation: Quantisation) -> None:
    """Raise `ModelError` unless all weights lie on the grid: training or another edit moves them off."""
    for name, scale in quantisation.weights.items():
        weight = net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        ok = scale.shape == weight.shape[:1] and scale.dtype == torch.float32
        if not ok or not bool(((scale >= SMALLEST) & (scale <= LARGEST)).all()):
            rule = f"must be float32 {tuple(weight.shape[:1])} in [{SMALLEST:g}, {LARGEST:g}]"
            raise ModelError(f"quant: the steps of '{name}' {rule}, got {scale.dtype} {tuple(scale.shape)}")
        if not torch.equal(on_grid(weight, scale, quantisation.weight_bits), weight):
            raise ModelError(
                f"the weights of '{name}' do not lie on the grid that the network says it has; quantise it again "
                "(quantise(dequantised(model), ...))"
            )


def _check_names(what: str, given: Any, wanted: Any) -> None:
    missing = [name for name in wanted if name not in given]
    strange = [name for name in given if name not in wanted]
    if strange:
        raise ModelError(f"quant: {what}: {unknown('name', ascii(strange[0])[1:-1][:60], wanted)}")
    if missing:
        raise ModelError(f"quant: {what} must name {len(tuple(wanted))} places of this network; '{missing[0]}' is missing")


def quantisation_of(model: nn.Module) -> Quantisation | None:
    """Return how a network is quantised; None for one in floating point."""
    forward = vars(core(model)).get("forward")
    return forward.quantisation if isinstance(forward, Quantiser) else None


def is_on_grid(model: nn.Module) -> bool:
    """Return whether a network, or one within it, is quantised for good: training would move its weights off their grid."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return any(isinstance(forward, Quantiser) and not forward.live for forward in forwards)


def flow_of(model: nn.Module) -> Flow:
    """Return the steps of a quantised network."""
    return vars(core(model))["forward"].flow


def dequantised(model: Classifier) -> Classifier:
    """Return a copy that computes in floating point; its weights stay where the grid has put them."""
    copy = deepcopy(model)
    if quantisation_of(copy) is not None:
        del vars(core(copy))["forward"]
    return copy
