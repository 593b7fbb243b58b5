"""ResNet-18 and ResNet-34 (He et al., CVPR 2016, arXiv:1512.03385).

``stem="cifar"`` is the 3x3 stem for small images with the key names of kuangliu/pytorch-cifar (``shortcut``,
``linear``); ``stem="imagenet"`` is the 7x7 stem and max-pooling with those of torchvision (``downsample``, ``fc``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError, unknown

BLOCKS: Mapping[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; ``shortcut`` is empty where nothing changes shape."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(*_projection(channels, out_channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ImageNetBlock(nn.Module):
    """Two 3x3 convolutions; ``downsample`` is None where nothing changes shape."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        projection = _projection(channels, out_channels, stride)
        self.downsample = nn.Sequential(*projection) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


class CifarStemResNet(nn.Module):
    """Four stages of `CifarBlock` behind a 3x3 convolution."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(CifarBlock, depth, width)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.linear(x)


class ImageNetStemResNet(nn.Module):
    """Four stages of `ImageNetBlock` behind a 7x7 convolution and max-pooling."""

    def __init__(self, depth: int, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(ImageNetBlock, depth, width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


def _projection(channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    if stride == 1 and channels == out_channels:
        return ()
    return nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)


def _stages(block: type[CifarBlock] | type[ImageNetBlock], depth: int, width: int) -> list[nn.Sequential]:
    stages, channels = [], width
    for stage, count in enumerate(BLOCKS[depth]):
        out_channels = width * 2**stage
        first = block(channels, out_channels, 1 if stage == 0 else 2)
        stages.append(nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1))))
        channels = out_channels
    return stages


def check_depth(depth: int) -> None:
    """Raise `ModelError` unless there is a network of basic blocks with this many layers."""
    if depth not in BLOCKS:
        raise ModelError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")


def count_depth(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the depth whose third stage has as many blocks as these ``shapes``; 0 when there is none."""
    blocks = sum(key.startswith("layer3.") and key.endswith(".conv1.weight") for key in shapes)
    return {counts[2]: depth for depth, counts in BLOCKS.items()}.get(blocks, 0)


def resnet(*, depth: int = 18, width: int = 64, classes: int = 10, in_channels: int = 3, stem: str = "cifar") -> nn.Module:
    """Build a ResNet of basic blocks; ``stem`` is ``cifar`` or ``imagenet``."""
    check_depth(depth)
    networks = {"cifar": CifarStemResNet, "imagenet": ImageNetStemResNet}
    if stem not in networks:
        raise ModelError(unknown("stem", stem, networks))
    return networks[stem](depth, width, classes, in_channels)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    stem, last = ("imagenet", "fc.weight") if "fc.weight" in shapes else ("cifar", "linear.weight")
    depth = count_depth(shapes)
    if not depth or not {"conv1.weight", "bn1.weight", "layer4.0.conv1.weight", last} <= shapes.keys():
        return None
    width, in_channels, *_ = shapes["conv1.weight"]
    return {"depth": depth, "width": width, "classes": shapes[last][0], "in_channels": in_channels, "stem": stem}
