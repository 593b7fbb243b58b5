"""What a weight or a channel does to the loss, in first and second order: derivatives in a factor on it.

Every score made of gradients speaks of a factor ``a = 1`` on a *unit*, which is cut by taking it to 0. The unit is one weight
or, of a channel, all that its mask sets to 0: weight and bias at its site. So ``dL/da = sum over the unit of w * dL/dw``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import passes
from ..errors import ModelError, check_choice
from ..forward import check_logits
from ..models import core
from ..models.channels import trace_channels
from ..state import seeded
from ..types import Granularity, ImageSet, Scores
from .layers import layer_of_site, prunable_layers

Units = Mapping[str, Sequence[str]]


def units(model: nn.Module, input_shape: tuple[int, int, int], granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Return what is scored: score name -> the parameters that it is about.

    Weights are those of convolutions and linear layers, without biases; channels those that a filter writes, without the
    classes.

    Raises:
        ModelError: For channels, when the network cannot be traced.
    """
    check_choice("granularity", granularity, ("weight", "channel"))
    if granularity == "weight":
        return {f"{layer}.weight": (f"{layer}.weight",) for layer in prunable_layers(model)}
    own = dict(core(model).named_parameters())
    sites = layer_of_site(trace_channels(model, input_shape))
    return {site: tuple(n for n in (f"{site}.weight", f"{site}.bias") if n in own) for site in sites}


def filter_units(model: nn.Module, input_shape: tuple[int, int, int], *, biases: bool) -> dict[str, tuple[str, ...]]:
    """Return, site -> parameters, the filters that write channels, with their own biases if asked.

    Raises:
        ModelError: The network cannot be traced.
    """
    own = dict(core(model).named_parameters())
    kinds = ("weight", "bias") if biases else ("weight",)
    sites = layer_of_site(trace_channels(model, input_shape))
    return {site: tuple(f"{layer}.{kind}" for kind in kinds if f"{layer}.{kind}" in own) for site, layer in sites.items()}


class Factors:
    """A private copy of a network, in eval mode, that can be asked for derivatives.

    Attributes:
        network: The copy.
        granularity: Of the units.
        parameters: The parameters that are part of a unit, by name.
    """

    def __init__(self, model: nn.Module, chosen: Units, granularity: Granularity) -> None:
        self.network = deepcopy(model).eval().requires_grad_(True)
        self.granularity: Granularity = granularity
        own = dict(core(self.network).named_parameters())
        self.parameters = {name: own[name] for names in chosen.values() for name in names}
        self._units = chosen

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def batches(self, clean: ImageSet, batch_size: int, *, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, in random order, in batches of nearly equal size.

        Raises:
            DataError: There are no images.
            MethodError: ``batch_size`` is out of range.
        """
        yield from passes(clean, batch_size, 1, device=self.device, generator=generator)

    def loss(self, x: Tensor, y: Tensor, classes: int) -> Tensor:
        """Return the mean cross-entropy of images in [0, 1].

        Raises:
            ModelError: The network does not take the images.
        """
        dtype = next(iter(self.parameters.values())).dtype
        # GroupNorm's backward pass for its weights alone crashes the process in channels-last memory (torch 2.13, CPU).
        x = x.to(dtype).contiguous()
        try:
            return F.cross_entropy(check_logits(self.network(x), len(x), classes), y)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"the network cannot take {len(x)} images of shape {tuple(x.shape[1:])}: {reason}") from error

    def slopes(self, loss: Tensor, *, graph: bool = False) -> dict[str, Tensor]:
        """Return the gradient of a loss in each parameter, with a graph of its own if asked."""
        found = torch.autograd.grad(
            loss, list(self.parameters.values()), create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.parameters, found, strict=True))

    def mean_slopes(self, clean: ImageSet, batch_size: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradient of the mean loss on all images."""
        total = self.zeros()
        for x, y in self.batches(clean, batch_size, generator=generator):
            add(total, self.slopes(self.loss(x, y, len(clean.classes))), len(x) / len(clean))
        return total

    def zeros(self) -> dict[str, Tensor]:
        """Return a zero for every entry of every parameter."""
        return {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}

    def gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum values of parameters over each unit: score name -> ``(channels,)`` or the parameter's shape."""
        if self.granularity == "weight":
            return dict(values)
        return {unit: sum_rows([values[name] for name in names]) for unit, names in self._units.items()}

    def fold(self, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the derivative in each unit's factor, ``sum of w * dL/dw``."""
        return self.gather({name: self.parameters[name].detach() * slope for name, slope in slopes.items()})

    def spread(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the step of every parameter when factors change by ``factors``: its value times that of its unit."""
        steps = {}
        for unit, names in self._units.items():
            for name in names:
                value = self.parameters[name].detach()
                factor = factors[unit]
                steps[name] = value * (factor if self.granularity == "weight" else factor.reshape(-1, *[1] * (value.ndim - 1)))
        return steps

    def scores(self, values: Mapping[str, Tensor]) -> Scores:
        """Return scores, in the order of the units, on the CPU.

        Raises:
            ModelError: A value is not finite.
        """
        for name in self._units:
            if not bool(values[name].isfinite().all()):
                raise ModelError(
                    f"the scores of '{name}' must be finite, got NaN or infinity; the network's gradient has no use"
                )
        return Scores({name: values[name].detach().cpu() for name in self._units}, self.granularity)


def add(total: Mapping[str, Tensor], values: Mapping[str, Tensor], share: float = 1.0) -> None:
    """Add a share of some values to a total, in place."""
    for name, value in values.items():
        total[name].add_(value.detach(), alpha=share)


def sum_rows(parts: Sequence[Tensor]) -> Tensor:
    """Sum tensors, each ``(channels, ...)``, to ``(channels,)``."""
    return torch.stack([part.reshape(len(part), -1).sum(dim=1) for part in parts]).sum(dim=0)


@contextmanager
def differentiating(generator: torch.Generator) -> Iterator[None]:
    """Let gradients flow, also those of gradients, and networks that draw do so from ``generator``."""
    with torch.inference_mode(False), torch.enable_grad(), seeded(generator), sdpa_kernel(SDPBackend.MATH):
        yield
