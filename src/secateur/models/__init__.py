"""Architectures, the classifier around them and the bundle on disk."""

from __future__ import annotations

from ..architectures import ARCHITECTURES, Architecture, names
from .bundle import load_bundle, load_masks, save
from .description import read_arch
from .registry import build, recognise
from .wrapper import Classifier, core

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Classifier",
    "build",
    "core",
    "load_bundle",
    "load_masks",
    "names",
    "read_arch",
    "recognise",
    "save",
]
