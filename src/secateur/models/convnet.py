"""A small convolutional network with batch-norm, for demonstrations and tests.

Four 3x3 convolutions, three poolings, global average pooling: 61 thousand weights at the default width. The key names
(``conv1 bn1 ... linear``) are this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Conv-bn-relu four times with ``width, 2 width, 4 width, 4 width`` channels."""

    def __init__(self, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.conv4 = nn.Conv2d(4 * width, 4 * width, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``, at least 8x8."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = F.relu(self.bn4(self.conv4(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.linear(x)


def convnet(*, width: int = 16, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the small convolutional network."""
    return ConvNet(width, classes, in_channels)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    if not {"conv1.weight", "conv4.weight", "bn4.weight", "linear.weight"} <= shapes.keys():
        return None
    width, in_channels, *_ = shapes["conv1.weight"]
    return {"width": width, "classes": shapes["linear.weight"][0], "in_channels": in_channels}
