"""Pre-activation ResNet-18 and 34 (He et al., ECCV 2016, arXiv:1603.05027).

Key names as in kuangliu/pytorch-cifar and BackdoorBench, whose network pools the last residual stream as it is. Other
codes put the paper's last batch-norm and ReLU before the pooling, under the name ``bn``: ``final_bn=True``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import BLOCKS, check_depth, count_depth


class PreActBlock(nn.Module):
    """Batch-norm and ReLU before each of two 3x3 convolutions."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + identity


class PreActResNet(nn.Module):
    """Four stages of `PreActBlock` behind a 3x3 convolution."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int, final_bn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(depth, width)
        self.bn = nn.BatchNorm2d(8 * width) if final_bn else None
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = self.conv1(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn is not None:
            x = F.relu(self.bn(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.linear(x)


def _stages(depth: int, width: int) -> list[nn.Sequential]:
    stages, channels = [], width
    for stage, count in enumerate(BLOCKS[depth]):
        out_channels = width * 2**stage
        first = PreActBlock(channels, out_channels, 1 if stage == 0 else 2)
        stages.append(nn.Sequential(first, *(PreActBlock(out_channels, out_channels, 1) for _ in range(count - 1))))
        channels = out_channels
    return stages


def preact_resnet(
    *, depth: int = 18, width: int = 64, classes: int = 10, in_channels: int = 3, final_bn: bool = False
) -> nn.Module:
    """Build a pre-activation ResNet of basic blocks."""
    check_depth(depth)
    return PreActResNet(depth, width, classes, in_channels, final_bn)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    depth = count_depth(shapes)
    if not depth or "bn1.weight" in shapes or not {"layer1.0.bn1.weight", "linear.weight"} <= shapes.keys():
        return None
    width, in_channels, *_ = shapes["conv1.weight"]
    return {
        "depth": depth,
        "width": width,
        "classes": shapes["linear.weight"][0],
        "in_channels": in_channels,
        "final_bn": "bn.weight" in shapes,
    }
