"""Random noise: the control. What a gradient attack gains over it is what the gradient is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import check_range
from .ball import Ball, Norm
from .common import attack
from .losses import Aim
from .network import Forward, Network, check_finite


def random_noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    tries: int = 10,
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Add noise drawn uniformly from the ball, up to ``tries`` times, until it breaks the image.

    An image that no draw breaks comes back with the draw of the highest margin ``max_{i != y} z_i - z_y``.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        tries: Draws, >= 1; one forward each.
        targeted: Draw until the labels given are answered.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`eot`).
        generator: Source of all randomness.

    Returns:
        Noisy images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images or answers with NaN.
    """
    check_range("tries", tries, 1, 2**31)
    aim = Aim("margin", targeted)

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        found, rows = ball.x.clone(), torch.arange(len(ball), device=y.device)
        best = torch.full((len(ball),), -torch.inf, device=y.device)
        for tried in range(tries):
            points = ball.draw(generator)[rows]
            logits = network.answers(points)
            if tried == 0:
                aim.check(logits, y)
                check_finite(logits)
            value = aim.value(logits, y[rows]).to(best)
            reached = aim.reached(logits, y[rows])
            better = reached | (value > best[rows])
            found[rows[better]], best[rows[better]] = points[better], value[better]
            rows = rows[~reached]
            if not len(rows):
                break
        return found

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=tries, batch_size=batch_size, forward=forward, generator=generator
    )  # fmt: skip
