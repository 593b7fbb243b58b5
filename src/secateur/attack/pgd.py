"""PGD, projected gradient descent: many small steps along the sign of the gradient, each projected back into the ball.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018
(arXiv:1706.06083).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ball import Ball, Norm
from .common import attack, check_numbers, climb
from .losses import Aim, Loss
from .network import Forward, Network


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Loss = "cross-entropy",
    random_start: bool = True,
    drop_broken: bool = False,
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Take steps along the gradient's sign (L2: along the gradient at length 1), projected back into the ball each time.

    ``x_0`` uniform in the ball, ``x_{t+1} = P(x_t + a * sign(dL/dx(x_t)))``, or ``P(x_t + a * g / |g|_2)`` for L2, where ``P``
    is the projection onto the ball around ``x`` and into [0, 1]. A step is one forward and one backward; the last points are
    not looked at unless another start follows. **What comes back:** of an image that any points looked at have broken, those of
    them with the highest loss, over all starts; else the last points. So nothing that was broken on the way is lost.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        steps: Steps from each start, >= 1.
        step_size: Length ``a`` of a step, >= 0; by default ``2.5 * eps / steps``, which reaches any point from any other.
        restarts: Starts, >= 1; more than one need ``random_start``.
        loss: What to climb: ``cross-entropy``, ``dlr`` (from 4 classes on) or ``margin``.
        random_start: Start at a random point of the ball, not at the image.
        drop_broken: An image leaves at the first points that break it: the same images are broken, sooner, at a lower loss.
        targeted: Move to the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`, `eot`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.

    With ``drop_broken``, networks that draw and `eot` see other draws than without; networks that do not draw break the same
    images.

    Differs from the authors' code in that points that broke an image on the way are kept, and that the clip to the ball holds
    exactly (theirs overshoots by a rounding).
    """
    check_numbers(steps=steps, step_size=step_size, restarts=restarts, random_start=random_start)
    aim, size = Aim(loss, targeted), 2.5 * eps / steps if step_size is None else step_size

    def step(ball: Ball, points: Tensor, slope: Tensor) -> Tensor:
        return ball.step(points, slope, size)

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        found, rows = ball.x.clone(), torch.arange(len(ball), device=y.device)
        ever = torch.zeros(len(ball), dtype=torch.bool, device=y.device)
        best = torch.full((len(ball),), -torch.inf, device=y.device)
        for restart in range(restarts):
            start = ball.draw(generator) if random_start else ball.x.clone()
            part = ball if len(rows) == len(ball) else ball.subset(rows)
            points, broken, value = climb(
                network, part, y[rows], start[rows], steps=steps, aim=aim, move=step, drop=drop_broken
            )
            if restart < restarts - 1:
                logits = network.answers(points)
                late = ~broken & aim.reached(logits, y[rows])
                broken, value = broken | late, torch.where(late, aim.value(logits, y[rows]).to(value), value)
            take = ~ever[rows] | (broken & (value > best[rows]))
            found[rows[take]], best[rows[take]] = points[take], value[take]
            ever[rows] |= broken
            rows = rows[~broken] if drop_broken else rows
            if not len(rows):
                break
        return found

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=steps * restarts, batch_size=batch_size, forward=forward,
        generator=generator,
    )  # fmt: skip
