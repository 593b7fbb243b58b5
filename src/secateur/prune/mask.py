"""Masks: what they mean for parameters, how they are put on, counted and carried over to a smaller network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ModelError, check_choice
from ..models import core
from ..types import ChannelMask, HardMask, Mask, SoftMask, WeightMask
from .layers import prunable_layers

Edit = Literal["weight+bias", "weight"]
SEEN = 1.005  # compression that is more than a few stray zeros


def parameter_masks(model: nn.Module, mask: HardMask, *, edit: Edit = "weight+bias") -> dict[str, Tensor]:
    """Say which entries of which parameters a mask keeps.

    Args:
        model: The network that the mask is for.
        mask: A weight or channel mask.
        edit: For channels, whether the site's weight and bias go to 0 (the channel is then silent), or the weight alone (as
            several published codes do; the bias then still speaks).

    Returns:
        Parameter name -> bool of the parameter's shape; True = kept. Parameters that stay whole are absent.

    Raises:
        ModelError: A name or shape does not belong to this network.
    """
    check_choice("edit", edit, get_args(Edit))
    parameters = dict(core(model).named_parameters())
    if isinstance(mask, WeightMask):
        for name, keep in mask.keep.items():
            _check(name, parameters.get(name), tuple(keep.shape))
        return dict(mask.keep)
    return _channel_parameters(parameters, mask, edit)


def hard(mask: Mask | None) -> HardMask | None:
    """Return what a bundle keeps of a repair's mask: nothing of a soft one, whose factors are in the weights."""
    return None if isinstance(mask, SoftMask) else mask


def edited(model: nn.Module, mask: HardMask, edit: Edit) -> HardMask:
    """Return the mask that does, put on as masks are, what ``edit`` says: for ``weight``, one of the sites' weights alone.

    Raises:
        MethodError: There is no such edit.
    """
    check_choice("edit", edit, get_args(Edit))
    return WeightMask(parameter_masks(model, mask, edit=edit)) if edit == "weight" else mask


def _channel_parameters(parameters: Mapping[str, Tensor], mask: ChannelMask, edit: Edit) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for site, keep in mask.keep.items():
        weight = parameters.get(f"{site}.weight")
        _check(f"{site}.weight", weight, (len(keep), *(weight.shape[1:] if weight is not None else ())))
        for name in (f"{site}.weight", f"{site}.bias") if edit == "weight+bias" else (f"{site}.weight",):
            if name in parameters:
                parameter = parameters[name]
                masks[name] = keep.reshape(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
    return masks


def _check(name: str, parameter: Tensor | None, shape: tuple[int, ...]) -> None:
    if parameter is None:
        raise ModelError(f"the mask names '{name}', which is not a parameter of this network")
    if tuple(parameter.shape) != shape:
        raise ModelError(f"the mask of '{name}' must have shape {tuple(parameter.shape)}, got {shape}")


def masked_values(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Return the new values of the parameters that a mask sets to 0 in part (or scales, for a `SoftMask`), by name.

    Raises:
        ModelError: A name or shape does not belong to this network.
    """
    parameters = {name: parameter.detach() for name, parameter in core(model).named_parameters()}
    if isinstance(mask, SoftMask):
        return {key: value for name, factor in mask.scale.items() for key, value in _scaled(parameters, name, factor)}
    keeps = parameter_masks(model, mask)
    return {name: parameters[name].masked_fill(~keep.to(parameters[name].device), 0) for name, keep in keeps.items()}


def _scaled(parameters: Mapping[str, Tensor], name: str, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in parameters:
        _check(name, parameters[name], tuple(factor.shape))
        yield name, parameters[name] * factor.to(parameters[name])
        return
    weight = parameters.get(f"{name}.weight")
    _check(f"{name}.weight", weight, (len(factor), *(weight.shape[1:] if weight is not None else ())))
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in parameters:
            parameter = parameters[key]
            yield key, parameter * factor.to(parameter).reshape(-1, *[1] * (parameter.ndim - 1))


def apply_mask(model: nn.Module, mask: Mask) -> nn.Module:
    """Return a copy of ``model`` with what the mask cuts set to 0 (or scaled, for a `SoftMask`)."""
    copy = deepcopy(model)
    parameters = dict(core(copy).named_parameters())
    with torch.no_grad():
        for name, value in masked_values(model, mask).items():
            parameters[name].copy_(value)
    return copy


def removed(mask: HardMask) -> dict[str, int]:
    """Return how many entries the mask cuts, by name."""
    return {name: int((~keep).sum()) for name, keep in mask.keep.items()}


def zeros(model: nn.Module) -> WeightMask:
    """Return what was cut before, as a mask: every weight or bias that is exactly 0, which training by itself leaves none.

    A bias, a norm's weights or a classifier of zeros throughout were initialised so, and are not among them. Rounding leaves
    zeros too: of a network that was quantised before (`models.dequantised`) those count as cut.
    """
    found, classifier = {}, [f"{name}.weight" for name in prunable_layers(model)[-1:]]
    for name, parameter in core(model).named_parameters():
        keep = (parameter.detach() != 0).cpu()
        initial = not bool(keep.any()) and (parameter.ndim == 1 or name in classifier)
        if name.rpartition(".")[2] in ("weight", "bias") and not bool(keep.all()) and not initial:
            found[name] = keep
    return WeightMask(found)


def still(mask: WeightMask, model: nn.Module) -> WeightMask:
    """Return a mask that cuts what another cuts and what is 0 in ``model``, of the same shape."""
    zero = {name: (parameter.detach() == 0).cpu() for name, parameter in core(model).named_parameters()}
    kept = {name: keep for name, keep in mask.keep.items() if name in zero and zero[name].shape == keep.shape}
    return WeightMask({name: keep | ~zero[name] for name, keep in kept.items()})


def joined(model: nn.Module, mask: HardMask | None, before: WeightMask) -> HardMask | None:
    """Return a mask that cuts what either does; None where there is nothing to cut."""
    if not before.keep:
        return mask
    both = dict(before.keep)
    for name, keep in (parameter_masks(model, mask) if mask else {}).items():
        both[name] = keep & both[name].to(keep.device) if name in both else keep
    return WeightMask(both)


def compression(model: nn.Module, mask: HardMask | None) -> float:
    """Return all parameters over those that a mask leaves, as GAP computes it; infinite where it leaves none."""
    keeps = parameter_masks(model, mask) if mask else {}
    total = sum(parameter.numel() for parameter in core(model).parameters())
    left = total - sum(int((~keep).sum()) for keep in keeps.values())
    return total / left if left else math.inf


def collapsed(mask: HardMask) -> tuple[str, ...]:
    """Return the names of which the mask leaves nothing (layer collapse); biases do not count, a layer does without."""
    biases = isinstance(mask, WeightMask)
    return tuple(n for n, keep in mask.keep.items() if not bool(keep.any()) and not (biases and n.endswith(".bias")))


def carry_over(mask: ChannelMask, kept: Mapping[str, Tensor]) -> ChannelMask:
    """Return what is left of a mask in the network that `shrink` made with ``kept``, without sites that have nothing left."""
    smaller = {name: keep[kept[name]] if name in kept else keep for name, keep in mask.keep.items()}
    return ChannelMask({name: keep for name, keep in smaller.items() if not bool(keep.all())})
