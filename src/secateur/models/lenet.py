"""Two LeNet-like networks (LeCun et al., Proceedings of the IEEE 86(11), 1998).

`lenet5` has the key names of kuangliu/pytorch-cifar. `badnet` has those of verazuo/badnets-pytorch, a network in the
manner of BadNets (arXiv:1708.06733); that repository's model ends in a softmax, ours returns the logits before it: the
predictions are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max-pooling and three linear layers: 6, 16, 120 and 84 units at width 6."""

    def __init__(self, width: int, classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        second, side = 8 * width // 3, _side(input_size)
        self.conv1 = nn.Conv2d(in_channels, width, 5)
        self.conv2 = nn.Conv2d(width, second, 5)
        self.fc1 = nn.Linear(second * side * side, 20 * width)
        self.fc2 = nn.Linear(20 * width, 14 * width)
        self.fc3 = nn.Linear(14 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, size, size)``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class BadNet(nn.Module):
    """Two 5x5 convolutions with average pooling and two linear layers: 16, 32 and 512 units at width 16."""

    def __init__(self, width: int, classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        side = _side(input_size)
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, width, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(width, 2 * width, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(2 * width * side * side, 32 * width), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(32 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, size, size)``."""
        x = self.conv2(self.conv1(x))
        x = torch.flatten(x, 1)
        return self.fc2(self.fc1(x))


def _side(input_size: int) -> int:
    """Return the side of the last feature map: two times a 5x5 convolution without padding, then halved."""
    side = ((input_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ModelError(f"input_size must be at least 16, got {input_size}")
    return side


def lenet5(*, width: int = 6, classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build LeNet-5."""
    return LeNet5(width, classes, in_channels, input_size)


def badnet(*, width: int = 16, classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build the network of verazuo/badnets-pytorch."""
    return BadNet(width, classes, in_channels, input_size)


def infer_lenet5(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a LeNet-5 of these ``shapes``, or None when it is another network."""
    return _infer(shapes, "conv1.weight", "conv2.weight", "fc1.weight", "fc3.weight")


def infer_badnet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a BadNet of these ``shapes``, or None when it is another network."""
    return _infer(shapes, "conv1.0.weight", "conv2.0.weight", "fc1.0.weight", "fc2.0.weight")


def _infer(shapes: Mapping[str, tuple[int, ...]], conv1: str, conv2: str, fc1: str, last: str) -> dict[str, object] | None:
    """Four input sizes give the same shapes; the multiple of four (32, 28) is the usual one."""
    if not {conv1, conv2, fc1, last} <= shapes.keys():
        return None
    width, in_channels, *_ = shapes[conv1]
    side = math.isqrt(shapes[fc1][1] // shapes[conv2][0])
    return {"width": width, "classes": shapes[last][0], "in_channels": in_channels, "input_size": 4 * side + 12}
