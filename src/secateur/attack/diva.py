"""DIVA: images that the network before compression answers rightly and the one after it wrongly.

Hao, Awatramani, Hu, Mao, Chen, Cidon, Cidon, Yang, "A Tale of Two Models: Constructing Evasive Attacks on Edge Models",
MLSys 2022 (arXiv:2204.10933).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError, check_range
from .ball import Ball, Norm
from .common import attack, check_numbers, climb
from .losses import Aim, together
from .network import Forward, Network


def diva(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    original: nn.Module,
    c: float = 1.0,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 20,
    step_size: float = 0.00392156862745098,
    random_start: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Climb ``p_original(y) - c * p_model(y)`` as PGD climbs the cross-entropy: who validates with the original sees nothing.

    Such images matter where what is checked is not what runs: a network is validated in floating point and shipped pruned or in
    8 bit. Of an image that points looked at have set apart, those of them with the highest loss come back; else the last.

    Args:
        model: The compressed network; takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, int64 ``(n,)``.
        original: The network that is to stay right; on the same device, with the same classes; left as it was.
        c: Weight of the compressed network's mistake, > 0; 1 in the paper. More breaks it more often, and the original too.
        eps: Budget in units of pixels that go from 0 to 1: in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds.
        steps: Steps, >= 1; 20 in the paper.
        step_size: Length of a step, >= 0; 1/255 in the paper.
        random_start: Start at a random point of the ball, not at the image as in the paper.
        batch_size: Images at once, >= 1.
        forward: Called with the *compressed* network and images in its place (`prune.adaptives`).
        generator: Source of all randomness.

    Returns:
        Images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: A network does not take the images, answers with NaN or passes no gradient back, or they have other classes.

    Differs from the authors' code in that images are in [0, 1] and stay there, and that points that reached the aim on the way
    are kept. Theirs on a network that is only known by its answers trains a copy of it first: give that copy as ``model``.
    """
    check_numbers(steps=steps, step_size=step_size)
    check_range("c", c, 1e-12, 1e6)
    aim = _Apart("margin", weight=c)

    def step(ball: Ball, points: Tensor, slope: Tensor) -> Tensor:
        return ball.step(points, slope, step_size)

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        start = ball.draw(generator) if random_start else ball.x.clone()
        return climb(network, ball, y, start, steps=steps, aim=aim, move=step)[0]

    return attack(
        _Pair(original, model, forward), x, y, each, eps=eps, norm=norm, passes=2 * steps, batch_size=batch_size, forward=None,
        generator=generator,
    )  # fmt: skip


class _Pair(nn.Module):
    """Two networks that answer together: logits ``(n, 2 * classes)``, the original's first."""

    def __init__(self, original: nn.Module, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.original, self.model, self._forward = original, model, forward

    def forward(self, x: Tensor) -> Tensor:
        """Return both answers side by side."""
        answer = self.model(x) if self._forward is None else together(self._forward(self.model, x))
        before = self.original(x)
        if answer.shape != before.shape:
            classes = f"the one before answers with {tuple(before.shape[1:])}, the one after with {tuple(answer.shape[1:])}"
            raise ModelError(f"both networks must have the same classes: {classes} logits")
        return torch.cat([before, answer], dim=1)


@dataclass(frozen=True)
class _Apart(Aim):
    """The original right, the other wrong."""

    weight: float = 1.0

    def check(self, logits: Tensor, y: Tensor) -> None:
        """Raise unless the labels are among the classes."""
        super().check(logits.chunk(2, dim=1)[0], y)

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the difference of both probabilities of the label, ``(n,)``."""
        own, other = (half.softmax(dim=1).gather(1, y[:, None])[:, 0] for half in logits.chunk(2, dim=1))
        return own - self.weight * other

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return where one is right and the other wrong, bool ``(n,)``."""
        own, other = (half.argmax(dim=1) for half in logits.chunk(2, dim=1))
        return (own == y) & (other != y)
