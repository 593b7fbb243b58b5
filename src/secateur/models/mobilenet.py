"""MobileNet V1 (Howard et al., 2017, arXiv:1704.04861) and V2 (Sandler et al., CVPR 2018, arXiv:1801.04381).

V1 has the key names of biubug6/Pytorch_Retinaface (``stage1``, ``stage2``, ``stage3``, ``fc``) with plain ReLU, as in
its ImageNet checkpoint. V2 has those of torchvision (``features.N``, ``classifier.1``). ``width`` multiplies channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V1_STAGES = (
    ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)),
    ((128, 2), (128, 1), (128, 1), (128, 1), (128, 1), (128, 1)),
    ((256, 2), (256, 1)),
)  # (channels at width 0.25, stride)
V2_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # (expansion, channels at width 1, blocks, stride of the first)  # fmt: skip


class MobileNetV1(nn.Module):
    """A 3x3 convolution and thirteen depthwise separable ones."""

    def __init__(self, width: float, classes: int, in_channels: int) -> None:
        super().__init__()
        channels = max(1, round(32 * width))
        layers: list[nn.Module] = [_v1_stem(in_channels, channels)]
        stages = []
        for stage in V1_STAGES:
            for base, stride in stage:
                out_channels = max(1, round(4 * base * width))
                layers.append(_separable(channels, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*layers))
            layers = []
        self.stage1, self.stage2, self.stage3 = stages
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = self.stage3(self.stage2(self.stage1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape stays."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv6(channels, hidden, 1)]
        layers += [
            _conv6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, out_channels, h / stride, w / stride)``."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Seventeen inverted residuals between two convolutions."""

    def __init__(self, width: float, classes: int, in_channels: int) -> None:
        super().__init__()
        channels = _divisible(32 * width)
        layers: list[nn.Module] = [_conv6(in_channels, channels, 3, 2)]
        for expansion, base, blocks, stride in V2_STAGES:
            out_channels = _divisible(base * width)
            for block in range(blocks):
                layers.append(InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion))
                channels = out_channels
        last = _divisible(1280 * max(1.0, width))
        layers.append(_conv6(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for normalised images ``(batch, in_channels, h, w)``."""
        x = self.features(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.classifier(x)


def _v1_stem(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _separable(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _conv6(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


def _divisible(channels: float) -> int:
    """Round to a multiple of 8 as the authors do: at least 8, and never more than a tenth below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def mobilenet_v1(*, width: float = 1.0, classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build MobileNet V1."""
    return MobileNetV1(width, classes, in_channels)


def mobilenet_v2(*, width: float = 1.0, classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build MobileNet V2."""
    return MobileNetV2(width, classes, in_channels)


def infer_mobilenet_v1(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a V1 of these ``shapes``, or None when it is another network."""
    if not {"stage1.0.0.weight", "fc.weight"} <= shapes.keys():
        return None
    in_channels = shapes["stage1.0.0.weight"][1]
    classes, last = shapes["fc.weight"]
    return {"width": last / 1024, "classes": classes, "in_channels": in_channels}


def infer_mobilenet_v2(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a V2 of these ``shapes``, or None when it is another network.

    Widths that round to the same channels cannot be told apart; the ratio in the widest rounded layer is returned.
    """
    if not {"features.0.0.weight", "features.17.conv.2.weight", "classifier.1.weight"} <= shapes.keys():
        return None
    in_channels = shapes["features.0.0.weight"][1]
    width = shapes["features.17.conv.2.weight"][0] / 320
    return {"width": width, "classes": shapes["classifier.1.weight"][0], "in_channels": in_channels}
