"""Architectures, the classifier around them and the bundle on disk.

What needs torch loads on first use: a bundle's description can be read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..architectures import ARCHITECTURES, Architecture, names
from .description import read_arch

if TYPE_CHECKING:
    from .activations import unwrap as unwrap
    from .activations import wrap as wrap
    from .activations import wrappers_of as wrappers_of
    from .bundle import load_bundle as load_bundle
    from .bundle import load_masks as load_masks
    from .bundle import save as save
    from .quantised import Quantisation as Quantisation
    from .quantised import dequantised as dequantised
    from .quantised import quantisation_of as quantisation_of
    from .registry import build as build
    from .registry import recognise as recognise
    from .structure import stages as stages
    from .wrapper import Classifier as Classifier
    from .wrapper import core as core

_HOMES = {
    "Classifier": "wrapper",
    "Quantisation": "quantised",
    "build": "registry",
    "core": "wrapper",
    "dequantised": "quantised",
    "load_bundle": "bundle",
    "load_masks": "bundle",
    "quantisation_of": "quantised",
    "recognise": "registry",
    "save": "bundle",
    "stages": "structure",
    "unwrap": "activations",
    "wrap": "activations",
    "wrappers_of": "activations",
}
__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Classifier",
    "Quantisation",
    "build",
    "core",
    "dequantised",
    "load_bundle",
    "load_masks",
    "names",
    "quantisation_of",
    "read_arch",
    "recognise",
    "save",
    "stages",
    "unwrap",
    "wrap",
    "wrappers_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
