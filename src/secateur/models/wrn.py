"""Wide ResNet (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146).

Key names as in xternalz/WideResNet-pytorch (``block1.layer.0.convShortcut``), which many repositories took over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError


class WideBlock(nn.Module):
    """Batch-norm and ReLU before each of two 3x3 convolutions; where the shape changes, before the shortcut too."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if channels != out_channels:
            self.convShortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        out = self.relu1(self.bn1(x))
        identity = x if self.convShortcut is None else self.convShortcut(out)
        out = self.relu2(self.bn2(self.conv1(out)))
        return identity + self.conv2(out)


class WideStage(nn.Module):
    """A row of blocks under the name ``layer``."""

    def __init__(self, blocks: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of ``(depth - 4) / 6`` blocks with 16, 32 and 64 times ``width`` channels."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, 16 * width, 1)
        self.block2 = WideStage(blocks, 16 * width, 32 * width, 2)
        self.block3 = WideStage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(x)


def wrn(*, depth: int = 16, width: int = 1, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build WRN-``depth``-``width``."""
    if depth % 6 != 4 or not 10 <= depth <= 1000:
        raise ModelError(f"depth must be 6n + 4 in [10, 1000], got {depth}")
    return WideResNet(depth, width, classes, in_channels)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    blocks = sum(re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", key) is not None for key in shapes)
    if not blocks or not {"conv1.weight", "fc.weight"} <= shapes.keys():
        return None
    width = shapes["block1.layer.0.conv1.weight"][0] // 16
    classes, in_channels = shapes["fc.weight"][0], shapes["conv1.weight"][1]
    return {"depth": 6 * blocks + 4, "width": width, "classes": classes, "in_channels": in_channels}
