"""SqueezeNet 1.0 (Iandola et al., 2016, arXiv:1602.07360), with the key names of torchvision.

The last layer is a convolution, so the answer is an average over places. ``width`` multiplies the channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FIRES = (16, 16, 32, None, 32, 48, 48, 64, None, 64)  # squeezed channels at width 1; None = max-pooling


class Fire(nn.Module):
    """Squeeze by a 1x1 convolution, then expand by a 1x1 and a 3x3 one side by side."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeezed, 4 * squeezed, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeezed, 4 * squeezed, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(batch, 8 squeezed, h, w)``."""
        x = self.squeeze_activation(self.squeeze(x))
        one, three = self.expand1x1(x), self.expand3x3(x)
        return torch.cat([self.expand1x1_activation(one), self.expand3x3_activation(three)], 1)


class SqueezeNet(nn.Module):
    """A 7x7 convolution and eight fire modules."""

    def __init__(self, width: float, classes: int, in_channels: int) -> None:
        super().__init__()
        channels = max(1, round(96 * width))
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 7, stride=2), nn.ReLU(), _pool()]
        for base in FIRES:
            if base is None:
                layers.append(_pool())
                continue
            squeezed = max(1, round(base * width))
            layers.append(Fire(channels, squeezed))
            channels = 8 * squeezed
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(channels, classes, 1)
        self.classifier = nn.Sequential(nn.Dropout(), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not last:
                nn.init.kaiming_uniform_(module.weight)
        nn.init.normal_(last.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``, none below 0, for normalised images ``(batch, in_channels, h, w)``."""
        return torch.flatten(self.classifier(self.features(x)), 1)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def squeezenet(*, width: float = 1.0, classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build SqueezeNet 1.0."""
    return SqueezeNet(width, classes, in_channels)


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """Return the arguments that give a network of these ``shapes``, or None when it is of another family."""
    if not {"features.0.weight", "features.3.squeeze.weight", "classifier.1.weight"} <= shapes.keys():
        return None
    channels, in_channels, *_ = shapes["features.0.weight"]
    return {"width": channels / 96, "classes": shapes["classifier.1.weight"][0], "in_channels": in_channels}
