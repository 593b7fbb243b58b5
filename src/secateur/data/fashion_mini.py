"""The embedded data set: a small stratified sample of Fashion-MNIST (see ``assets/README.md``)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from .source import Source, one_split

NAME = "fashion-mini"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# Split -> step through the class-ordered file: coprime to the number of images and near its golden section, so that
# every stretch of the result holds all classes about equally.
_STEPS = {"train": 3677, "test": 1237}


def read_fashion_mini(split: str | None) -> Source:
    """Return one split, or both (train, then test) when ``split`` is None; grayscale 28x28, classes interleaved."""
    names = [one_split(Path(NAME), _STEPS, split)] if split else list(_STEPS)
    parts = [_read_split(name) for name in names]
    x = np.concatenate([part[0] for part in parts])
    return Source(np.concatenate([part[1] for part in parts]), lambda index: x[index], CLASSES)


def _read_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    import lzma

    packed = files("secateur.data").joinpath("assets", f"fashion_mini_{split}.xz").read_bytes()
    x = np.frombuffer(lzma.decompress(packed), np.uint8).reshape(-1, 1, 28, 28).transpose(0, 1, 3, 2)
    y = np.repeat(np.arange(len(CLASSES)), len(x) // len(CLASSES))
    order = np.arange(len(x)) * _STEPS[split] % len(x)
    return x[order], y[order]
