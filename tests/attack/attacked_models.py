"""Small networks whose best attacks are known in closed form, and wrappers that spoil a gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.state import generator


class Linear(nn.Module):
    """``z = W x + b`` on flattened images."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def linear(classes: int, features: int, seed: int = 0) -> Linear:
    return Linear(torch.randn(classes, features, generator=generator(seed)))


def grey(n: int, shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    """Images in [0.3, 0.7]: budgets up to 0.3 are not clipped."""
    return 0.3 + 0.4 * torch.rand(n, *shape, generator=generator(seed))


class Scaled(nn.Module):
    """A network with its logits times a factor."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


class Round(nn.Module):
    """Rounds to 32 levels: a gradient of 0 nearly everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 31).round() / 31


class Noisy(nn.Module):
    """Adds strong noise to the image, drawn anew each time."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.scale * torch.randn_like(x))


class Counting(nn.Module):
    """Counts forwards and the images in them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls, self.images = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.images += len(x)
        return self.net(x)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(dim=1) == y).float().mean())


def distance(adv: Tensor, x: Tensor, norm: str) -> Tensor:
    change = (adv.double() - x.double()).flatten(1)
    return change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
