"""ResNet-20, 32, 44, 56 and 110 for small images (He et al., CVPR 2016, arXiv:1512.03385, section 4.2).

Key names as in akamaster/pytorch_resnet_cifar10. Its option A shortcut pads with zero channels and has no keys; option
B is a 1x1 convolution with batch-norm, ``shortcut.0`` and ``shortcut.1``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError, unknown


class PadShortcut(nn.Module):
    """Option A: every second pixel, with the new channels zero, half of them on either side."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - channels) // 2
        self.after = out_channels - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, out_channels, h / 2, w / 2)``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 and option == "A":
            self.shortcut = PadShortcut(channels, out_channels)
        elif stride != 1:
            conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of ``(depth - 2) / 6`` blocks with ``width``, ``2 width`` and ``4 width`` channels."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int, option: str) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, option)
        self.layer2 = _stage(blocks, width, 2 * width, 2, option)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, option)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.linear(x)


def _stage(blocks: int, channels: int, out_channels: int, stride: int, option: str) -> nn.Sequential:
    first = BasicBlock(channels, out_channels, stride, option)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, option) for _ in range(blocks - 1)))


def resnet_cifar(*, depth: int = 20, width: int = 16, classes: int = 10, in_channels: int = 3, option: str = "A") -> nn.Module:
    """Build a CIFAR ResNet of ``depth`` layers; ``option`` is the paper's shortcut, A or B."""
    if depth % 6 != 2 or not 8 <= depth <= 1202:
        raise ModelError(f"depth must be 6n + 2 in [8, 1202], got {depth}")
    if option not in ("A", "B"):
        raise ModelError(unknown("option", option, ("A", "B")))
    return CifarResNet(depth, width, classes, in_channels, option)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    blocks = sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", key) is not None for key in shapes)
    if not blocks or "linear.weight" not in shapes or "layer4.0.conv1.weight" in shapes:
        return None
    width, in_channels, *_ = shapes["conv1.weight"]
    return {
        "depth": 6 * blocks + 2,
        "width": width,
        "classes": shapes["linear.weight"][0],
        "in_channels": in_channels,
        "option": "B" if "layer2.0.shortcut.0.weight" in shapes else "A",
    }
