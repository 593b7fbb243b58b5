"""A frozen network whose mask is learned: scores are trained, the largest keep their weight, gradients pass straight through.

What HYDRA and HARP share. The network's own parameters become buffers, so that `secateur.train.train` moves scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MethodError, check_choice
from ..models import core
from ..models.channels import trace_channels
from ..recipe import Recipe
from ..train import train
from ..types import Granularity, ImageSet
from .layers import filters, prunable_layers

Objective = Literal["pgd", "trades", "fast"]


class Masked(nn.Module):
    """A copy of a network in which each weight (or channel) is multiplied by its entry of a mask of 0 and 1.

    Attributes:
        network: The copy; its parameters are buffers. In train mode its running statistics move.
        names: Of what is scored: parameters, or sites of channels; the order is that of the layers.
        scores: One tensor for each name, the only parameters. What has the larger magnitude matters more.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int], granularity: Granularity) -> None:
        """Copy ``model`` and start from scores that are proportional to its weights.

        ``s = sqrt(6 / fan_in) * w / max |w|`` in each layer (HYDRA's scaled initialisation); for channels, of ``sum |W_k|``.

        Raises:
            MethodError: There is nothing to prune.
            ModelError: For channels, when the network cannot be traced.
        """
        super().__init__()
        check_choice("granularity", granularity, ("weight", "channel"))
        parameters = dict(core(model).named_parameters())
        if granularity == "weight":
            weights = {f"{layer}.weight": parameters[f"{layer}.weight"].detach() for layer in prunable_layers(model)}
            fans = {name: weight[0].numel() for name, weight in weights.items()}
            self._keys = {name: (name,) for name in weights}
        else:
            rows = filters(model, trace_channels(model, input_shape))
            weights = {site: weight.abs().sum(dim=1) for site, weight in rows.items()}
            fans = {site: weight.shape[1] for site, weight in rows.items()}
            affine = {site: (f"{site}.weight", f"{site}.bias") for site in rows}
            self._keys = {site: tuple(key for key in keys if key in parameters) for site, keys in affine.items()}
        if not weights:
            raise MethodError("this network has no convolution or linear layer to prune")
        self.names = tuple(weights)
        start = (math.sqrt(6 / fans[name]) * w / w.abs().amax().clamp_min(1e-12) for name, w in weights.items())
        self.scores = nn.ParameterList(nn.Parameter(score.clone()) for score in start)
        self._prefix = "" if core(model) is model else "net."
        self.network = _frozen(model)

    def magnitudes(self) -> list[Tensor]:
        """Return the importance of each entry, ``|s|``."""
        return [score.abs() for score in self.scores]

    def masks(self) -> list[Tensor]:
        """Return a mask for each name: 0 and 1, in the shape of its scores, with gradients of its own choice."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the masked network."""
        own, changed = dict(self.network.named_buffers()), {}
        for name, mask in zip(self.names, self.masks(), strict=True):
            for key in self._keys[name]:
                weight = own[self._prefix + key]
                factor = mask if mask.ndim == weight.ndim else mask.reshape(-1, *[1] * (weight.ndim - 1))
                changed[self._prefix + key] = weight * factor
        return functional_call(self.network, changed, (x,))


M = TypeVar("M", bound=Masked)


def learn_scores(masked: M, clean: ImageSet, recipe: Recipe, *, generator: torch.Generator, **given: Any) -> M:
    """Return the masked network after its scores were trained; ``given`` goes to `secateur.train.train`."""
    trained = train(masked, clean, recipe, generator=generator, **given)
    assert isinstance(trained, type(masked))
    return trained


def straight_through(mask: Tensor, *followed: Tensor) -> Tensor:
    """Return a mask as floats whose gradient goes to each of what it followed from, unchanged."""
    values = mask.to(followed[0].dtype)
    for each in followed:
        values = values + (each - each.detach())
    return values


def largest(values: Tensor, cut: int) -> Tensor:
    """Return which values stay when the ``cut`` smallest go, bool of their shape; of equal ones the first go first."""
    if cut == 0:
        return torch.ones_like(values, dtype=torch.bool)
    flat = values.detach().flatten()
    keep = flat > flat.kthvalue(cut).values
    if int(keep.sum()) != len(flat) - cut:  # ties at the threshold
        keep = torch.ones_like(keep)
        keep[flat.sort(stable=True).indices[:cut]] = False
    return keep.reshape(values.shape)


def adopt_statistics(model: nn.Module, masked: Masked) -> nn.Module:
    """Return a copy of ``model`` with the running statistics that its masked copy has now."""
    copy, known = deepcopy(model), dict(masked.network.named_buffers())
    with torch.no_grad():
        for name, buffer in copy.named_buffers():
            buffer.copy_(known[name])
    return copy


def robust_recipe(
    *,
    adversarial: Objective,
    eps: float,
    norm: Literal["linf", "l2"],
    steps: int,
    beta: float,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
) -> Recipe:
    """Return how the authors train: SGD with momentum 0.9, cosine schedule, crops and flips, on perturbed images.

    Raises:
        MethodError: A number is out of range, or has no effect.
    """
    return Recipe(
        epochs=epochs, batch_size=batch_size, lr=lr, nesterov=False, weight_decay=weight_decay, augment=("crop", "flip"),
        adversarial=adversarial, eps=eps, norm=norm, adversarial_steps=steps, beta=beta,
    )  # fmt: skip


def final_scores(masked: Masked) -> Mapping[str, Tensor]:
    """Return the importance of each entry by name, on the CPU."""
    found: Sequence[Tensor] = masked.magnitudes()
    return {name: score.detach().cpu().contiguous() for name, score in zip(masked.names, found, strict=True)}


def _frozen(model: nn.Module) -> nn.Module:
    copy = deepcopy(model)
    for module in copy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return copy
