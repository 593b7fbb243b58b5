"""VGG with batch-norm (Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556).

`vgg` has the key names that kuangliu/pytorch-cifar and torchvision share (``features.N``); ``head="linear"`` is the
former's one linear layer for 32x32 images, ``head="mlp"`` the latter's three. `small_vgg` is the network of
YiZeng623/I-BAU (arXiv:2110.03735) with its key names: six convolutions, ELU and dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ModelError, unknown

CONVOLUTIONS: Mapping[int, tuple[int, int, int, int, int]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by max-pooling."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int, head: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, count in enumerate(CONVOLUTIONS[depth]):
            out_channels = width * min(2**stage, 8)
            for _ in range(count):
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if head == "linear" else 7)
        self.classifier = nn.Linear(channels, classes) if head == "linear" else _mlp(channels * 49, 64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``, at least 32x32."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class SmallVGG(nn.Module):
    """Three stages of two 3x3 convolutions with batch-norm and ELU, each followed by max-pooling and dropout."""

    def __init__(self, width: int, classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels, dropout in ((width, 0.3), (2 * width, 0.4), (4 * width, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ELU()]
                channels = out_channels
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (input_size // 8) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, size, size)``."""
        return self.classifier(torch.flatten(self.features(x), 1))


def _mlp(inputs: int, hidden: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def vgg(*, depth: int = 16, width: int = 64, classes: int = 10, in_channels: int = 3, head: str = "linear") -> nn.Module:
    """Build VGG-11, 13, 16 or 19 with batch-norm; ``head`` is ``linear`` or ``mlp``."""
    if depth not in CONVOLUTIONS:
        raise ModelError(f"depth must be one of {', '.join(map(str, CONVOLUTIONS))}, got {depth}")
    if head not in ("linear", "mlp"):
        raise ModelError(unknown("head", head, ("linear", "mlp")))
    return VGG(depth, width, classes, in_channels, head)


def small_vgg(*, width: int = 32, classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build the small VGG of I-BAU."""
    if input_size < 8:
        raise ModelError(f"input_size must be at least 8, got {input_size}")
    return SmallVGG(width, classes, in_channels, input_size)


def infer_vgg(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a VGG of these ``shapes``, or None when it is another network."""
    head, last = ("linear", "classifier.weight") if "classifier.weight" in shapes else ("mlp", "classifier.6.weight")
    convolutions = sum(key.startswith("features.") and len(shape) == 4 for key, shape in shapes.items())
    depth = {sum(counts): depth for depth, counts in CONVOLUTIONS.items()}.get(convolutions)
    if depth is None or last not in shapes:
        return None
    width, in_channels, *_ = shapes["features.0.weight"]
    return {"depth": depth, "width": width, "classes": shapes[last][0], "in_channels": in_channels, "head": head}


def infer_small_vgg(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a small VGG of these ``shapes``, or None when it is another network.

    Eight input sizes give the same shapes; the multiple of eight is the usual one.
    """
    if not {"features.0.weight", "features.19.weight", "classifier.weight"} <= shapes.keys():
        return None
    width, in_channels, *_ = shapes["features.0.weight"]
    classes, inputs = shapes["classifier.weight"]
    size = 8 * math.isqrt(inputs // (4 * width))
    return {"width": width, "classes": classes, "in_channels": in_channels, "input_size": size}
