"""From a name to a network, and the way back from a state dict's shapes to name and arguments.

The table is `architectures.ARCHITECTURES`; families are imported on first use, and so are the packages of `external`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..architectures import ARCHITECTURES, Architecture, architecture, is_external, resolve
from ..errors import ModelError
from .external import build_external, infer_external, skeleton_external

Shapes = Mapping[str, tuple[int, ...]]
COUNTERS = "num_batches_tracked"  # batch-norm counters, which older checkpoints lack and inference never reads


def builder(row: Architecture) -> Callable[..., nn.Module]:
    """Return the function that builds a row's network."""
    module, _, name = row.target.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def infer(row: Architecture, shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments that a state dict of these shapes suggests; None when it is of another family."""
    module, _, name = row.target.partition(":")
    family = importlib.import_module(f".{module}", __package__)
    read = getattr(family, f"infer_{name}", None) or family.infer
    with suppress(KeyError, IndexError, ValueError, ZeroDivisionError):
        return read(shapes)
    return None


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build an architecture by name; the weights are drawn from torch's global generator.

    Raises:
        ModelError: Unknown name or argument, or an argument outside its range.
    """
    if is_external(name):
        return build_external(name, kwargs)
    row = architecture(name)
    return builder(row)(**row.fixed, **resolve(name, kwargs))


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they are: on the meta device a normal draw would import torch's compiler, two seconds of it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer an initialiser with the tensor itself."""
        kwargs = kwargs or {}
        if function is torch.Tensor.normal_ or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def skeleton(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build an architecture on the meta device: names and shapes without memory or random draws."""
    if is_external(name):
        return skeleton_external(name, kwargs)
    with torch.device("meta"), _Undrawn():
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
        kwargs = None if row.fixed else infer(row, wanted)
        with suppress(ModelError):
            if kwargs is not None and shapes_of(skeleton(name, kwargs).state_dict()) == wanted:
                found.append(_familiar(name, kwargs))
    return found


def fit(name: str, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for ``name`` that follow the shapes as far as its family can read them; ``given`` ones win."""
    row = architecture(name)
    inferred = infer_external(name, shapes) if is_external(name) else infer(row, shapes) or {}
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
