"""Networks of timm and torchvision by name: ``timm:NAME``, ``torchvision:NAME``. Both are extras, imported on first use.

Weights are never downloaded. Of the settings that those packages know, only the number of classes and (timm) of input
channels, the pooling and the size of the images can be given; all else is as the package's own weights of that name have it.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..architectures import is_external, resolve
from ..errors import ModelError
from .files import one_line

__all__ = ["build_external", "infer_external", "is_external", "skeleton_external", "usual_input"]

Shapes = Mapping[str, tuple[int, ...]]
MARKER = 997  # a number of classes that no layer inside a network has
CHANNELS = 3
MAX_IMAGE = 1024  # larger ones make tables of positions that fill the memory
SPELLINGS = {"classes": "num_classes", "in_channels": "in_chans"}  # of timm
# The same weights mean two networks here: with or without a transformed input, with the stem of version 1 or 2.
AMBIGUOUS = re.compile(r"torchvision:(googlenet|inception_v3|mnasnet\w+)")


def build_external(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network without weights of its own; they are drawn from torch's global generator.

    Args:
        name: ``timm:NAME`` or ``torchvision:NAME``.
        kwargs: ``classes`` and, for timm, ``in_channels``, ``global_pool`` and ``img_size`` (of transformers).

    Raises:
        ModelError: The package is missing or does not load, or it has no such network.
    """
    settings = resolve(name, kwargs)
    if settings.get("img_size", 0) > MAX_IMAGE:
        raise ModelError(f"{name}: img_size must be at most {MAX_IMAGE}, got {settings['img_size']}")
    package, plain = _known(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name.startswith("timm:"):
                given = {SPELLINGS.get(key, key): value for key, value in settings.items()}
                return package.create_model(plain, pretrained=False, **given)
            return package.models.get_model(plain, weights=None, num_classes=settings["classes"])
        except Exception as error:
            raise ModelError(f"{name} cannot be built with {settings}: {one_line(error)}") from error


def skeleton_external(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network on the meta device: names and shapes, nothing drawn that shows.

    Constants that are no part of the state dict (position indices, attention masks) become real once weights are loaded.
    """
    with torch.random.fork_rng(devices=[]):
        net = _build_light(name, kwargs)
    named = net.state_dict().keys()
    constants = {key: value for key, value in net.named_buffers(remove_duplicate=False) if key not in named}
    net.to("meta")
    net.register_load_state_dict_post_hook(_Constants(constants))
    return net


def infer_external(name: str, shapes: Shapes) -> dict[str, int]:
    """Return the classes and channels that these shapes suggest; what they do not tell is left out."""
    settings = resolve(name, {"classes": MARKER})
    own = {key: tuple(value.shape) for key, value in skeleton_external(name, settings).state_dict().items()}
    head = next((key for key, shape in own.items() if shape[:1] == (MARKER,)), "")
    stem = next((key for key, shape in own.items() if len(shape) == 4 and shape[1] == CHANNELS), "")
    found = {"classes": shapes.get(head, ())[:1], "in_channels": shapes.get(stem, ())[1:2]}
    return {key: shape[0] for key, shape in found.items() if key in settings and shape and 0 < shape[0] <= 65536}


def usual_input(
    name: str, kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]] | None:
    """Return height and width, mean and standard deviation (three channels) that the package gives its own weights.

    An ``img_size`` among ``kwargs`` says height and width itself. None when the package names nothing.
    """
    package, plain = _known(name)
    if name.startswith("timm:"):
        found = package.get_pretrained_cfg(plain)
        side = (kwargs or {}).get("img_size")
        size = (side, side) if side else found and tuple(found.input_size[1:])
        return (size, tuple(found.mean), tuple(found.std)) if found else None
    presets = [weights.transforms() for weights in package.models.get_model_weights(plain)]
    if not presets:
        return None
    first = min(presets, key=lambda preset: preset.crop_size[0])
    return (first.crop_size[0], first.crop_size[0]), tuple(first.mean), tuple(first.std)


def _known(name: str) -> tuple[Any, str]:
    """Return the package and the network's name in it."""
    prefix, _, plain = name.partition(":")
    package = _import(prefix)
    names = package.list_models() if prefix == "timm" else package.models.list_models(module=package.models)
    if plain not in names:
        near = get_close_matches(plain.partition(".")[0], names, n=1)
        remedy = f"did you mean '{prefix}:{near[0]}'?" if near else f"{prefix}'s own list_models() names them"
        raise ModelError(f"unknown architecture '{name}'; {remedy}")
    if AMBIGUOUS.fullmatch(name):
        raise ModelError(f"{name} is not read by name: its weights do not tell all about it; use --arch file.py:make")
    return package, plain


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name in ("timm", "torchvision"):
            raise ModelError(f"{package} networks need the extra: pip install 'secateur[{package}]'") from error
        raise ModelError(f"{package} is installed but lacks a module: {one_line(error)}") from error
    except Exception as error:
        remedy = "install the builds of torch and torchvision that belong together"
        raise ModelError(f"{package} is installed but does not load ({one_line(error)}): {remedy}") from error


def _build_light(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network, without memory for its parameters unless it computes with them while it is built."""
    with suppress(ModelError), _parameters_on_meta():
        net = build_external(name, kwargs)
        if not any(buffer.is_meta for buffer in net.buffers()):
            return net
    return build_external(name, kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters on the meta device as modules register them; what is computed besides them stays real."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


class _Constants:
    """Puts buffers that no state dict holds back into a network that was on the meta device."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = dict(values)

    def __call__(self, net: nn.Module, _: Any) -> None:
        for key, value in self.values.items():
            path, _, name = key.rpartition(".")
            module = net.get_submodule(path)
            if getattr(module, name).is_meta:
                setattr(module, name, value.clone())
