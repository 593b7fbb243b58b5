"""The table of architectures: name -> builder, and the way back from a state dict's shapes to name and arguments.

Families are imported on first use. A row with ``fixed`` arguments is a familiar name for one member of a family.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, unknown

Shapes = Mapping[str, tuple[int, ...]]
COUNTERS = "num_batches_tracked"  # batch-norm counters, which older checkpoints lack and inference never reads


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        target: ``module:builder`` inside this package.
        fixed: Arguments that the name stands for.
        input_size: Height and width of the images the family is usually given.
    """

    target: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    input_size: int = 32

    @property
    def builder(self) -> Callable[..., nn.Module]:
        """The function that builds the network."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)

    def infer(self, shapes: Shapes) -> dict[str, Any] | None:
        """Return the arguments that a state dict of these shapes suggests; None when it is of another family."""
        module, _, name = self.target.partition(":")
        family = importlib.import_module(f".{module}", __package__)
        infer = getattr(family, f"infer_{name}", None) or family.infer
        with suppress(KeyError, IndexError, ValueError, ZeroDivisionError):
            return infer(shapes)
        return None


ARCHITECTURES: Mapping[str, Architecture] = {
    "convnet": Architecture("convnet:convnet"),
    "lenet5": Architecture("lenet:lenet5"),
    "badnet": Architecture("lenet:badnet"),
    "resnet_cifar": Architecture("resnet_cifar:resnet_cifar"),
    "resnet20": Architecture("resnet_cifar:resnet_cifar", {"depth": 20}),
    "resnet32": Architecture("resnet_cifar:resnet_cifar", {"depth": 32}),
    "resnet44": Architecture("resnet_cifar:resnet_cifar", {"depth": 44}),
    "resnet56": Architecture("resnet_cifar:resnet_cifar", {"depth": 56}),
    "resnet110": Architecture("resnet_cifar:resnet_cifar", {"depth": 110}),
    "resnet": Architecture("resnet:resnet"),
    "resnet18": Architecture("resnet:resnet", {"depth": 18, "stem": "cifar"}),
    "resnet34": Architecture("resnet:resnet", {"depth": 34, "stem": "cifar"}),
    "resnet18_imagenet": Architecture("resnet:resnet", {"depth": 18, "stem": "imagenet"}, 224),
    "resnet34_imagenet": Architecture("resnet:resnet", {"depth": 34, "stem": "imagenet"}, 224),
    "preact_resnet": Architecture("preact_resnet:preact_resnet"),
    "preact_resnet18": Architecture("preact_resnet:preact_resnet", {"depth": 18}),
    "preact_resnet34": Architecture("preact_resnet:preact_resnet", {"depth": 34}),
    "vgg": Architecture("vgg:vgg"),
    "vgg11_bn": Architecture("vgg:vgg", {"depth": 11, "head": "linear"}),
    "vgg13_bn": Architecture("vgg:vgg", {"depth": 13, "head": "linear"}),
    "vgg16_bn": Architecture("vgg:vgg", {"depth": 16, "head": "linear"}),
    "vgg19_bn": Architecture("vgg:vgg", {"depth": 19, "head": "linear"}),
    "vgg11_bn_imagenet": Architecture("vgg:vgg", {"depth": 11, "head": "mlp"}, 224),
    "vgg13_bn_imagenet": Architecture("vgg:vgg", {"depth": 13, "head": "mlp"}, 224),
    "vgg16_bn_imagenet": Architecture("vgg:vgg", {"depth": 16, "head": "mlp"}, 224),
    "vgg19_bn_imagenet": Architecture("vgg:vgg", {"depth": 19, "head": "mlp"}, 224),
    "small_vgg": Architecture("vgg:small_vgg"),
    "wrn": Architecture("wrn:wrn"),
    "mobilenet_v1": Architecture("mobilenet:mobilenet_v1", input_size=224),
    "mobilenet_v2": Architecture("mobilenet:mobilenet_v2", input_size=224),
    "squeezenet": Architecture("squeezenet:squeezenet", input_size=224),
    "vit": Architecture("vit:vit"),
}


def names() -> tuple[str, ...]:
    """Return the names of all architectures, in table order."""
    return tuple(ARCHITECTURES)


def architecture(name: str) -> Architecture:
    """Return one row of the table; `ModelError` when there is none of that name."""
    if name not in ARCHITECTURES:
        raise ModelError(unknown("architecture", name, ARCHITECTURES))
    return ARCHITECTURES[name]


def resolve(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` with the defaults filled in, checked against the builder's signature."""
    row = architecture(name)
    parameters = inspect.signature(row.builder).parameters
    free = {key: parameter.default for key, parameter in parameters.items() if key not in row.fixed}
    for key, value in kwargs.items():
        if key not in free:
            raise ModelError(unknown(f"argument of {name}", key, free))
        _check(f"{name}: {key}", value, free[key])
    return free | dict(kwargs)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build an architecture by name; the weights are drawn from torch's global generator.

    Raises:
        ModelError: Unknown name or argument, or an argument outside its range.
    """
    row = architecture(name)
    return row.builder(**row.fixed, **resolve(name, kwargs))


def skeleton(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build an architecture on the meta device: names and shapes without memory or random draws."""
    with torch.device("meta"):
        return build(name, **kwargs)


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state dict, without batch-norm counters."""
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(COUNTERS)}


def recognise(shapes: Shapes) -> list[tuple[str, dict[str, Any]]]:
    """Return every ``(name, kwargs)`` whose network has exactly these names and shapes.

    What shapes cannot tell (the heads of a ViT, an activation) is the family's documented default.
    """
    wanted = {key: shape for key, shape in shapes.items() if not key.endswith(COUNTERS)}
    found = []
    for name, row in ARCHITECTURES.items():
        kwargs = None if row.fixed else row.infer(wanted)
        with suppress(ModelError):
            if kwargs is not None and shapes_of(skeleton(name, kwargs).state_dict()) == wanted:
                found.append(_familiar(name, kwargs))
    return found


def fit(name: str, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for ``name`` that follow the shapes as far as its family can read them; ``given`` ones win."""
    row = architecture(name)
    inferred = row.infer(shapes) or {}
    return {key: value for key, value in inferred.items() if key not in row.fixed} | dict(given)


def nearest(keys: Iterable[str]) -> str:
    """Return the architecture whose state dict shares the largest part of its names with ``keys``."""
    wanted = set(keys)

    def overlap(name: str) -> tuple[float, bool]:
        own = set(shapes_of(skeleton(name, {}).state_dict()))
        return len(own & wanted) / len(own | wanted), bool(ARCHITECTURES[name].fixed)

    return max(ARCHITECTURES, key=overlap)


def _familiar(family: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for name, row in ARCHITECTURES.items():
        if row.target == ARCHITECTURES[family].target and row.fixed and row.fixed.items() <= kwargs.items():
            return name, {key: value for key, value in kwargs.items() if key not in row.fixed}
    return family, kwargs


def _check(what: str, value: Any, default: Any) -> None:
    kind = type(default)
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise ModelError(f"{what} must be of type {kind.__name__}, got {type(value).__name__}")
    if kind in (int, float) and not 0 < value <= 65536:
        raise ModelError(f"{what} must lie in (0, 65536], got {value}")
