"""FGSM, the fast gradient sign method: one step of the whole budget along the sign of the gradient.

Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015 (arXiv:1412.6572).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ball import Ball, Norm
from .common import attack, climb
from .losses import Aim, Loss
from .network import Forward, Network


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    loss: Loss = "cross-entropy",
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Take one step of the whole budget along the gradient's sign (L2: along the gradient).

    ``P(x + eps * sign(dL/dx(x)))``, or ``P(x + eps * g / |g|_2)`` for L2 (the fast gradient method). Every image is moved,
    those answered wrongly too.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        loss: What to climb: ``cross-entropy``, ``dlr`` (from 4 classes on) or ``margin``.
        targeted: Move to the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`, `eot`).
        generator: Source of all randomness (only networks that draw use any).

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.

    Differs from the paper in that images stay in [0, 1].
    """
    aim = Aim(loss, targeted)

    def step(ball: Ball, points: Tensor, slope: Tensor) -> Tensor:
        return ball.step(points, slope, eps)

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        return climb(network, ball, y, ball.x, steps=1, aim=aim, move=step, keep=False)[0]

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=1, batch_size=batch_size, forward=forward, generator=generator
    )  # fmt: skip
