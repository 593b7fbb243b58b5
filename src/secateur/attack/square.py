"""Square Attack: random squares of the full budget, kept where the margin falls; it asks for answers, never for a gradient.

Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial attack via random search",
ECCV 2020 (arXiv:1912.00049).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import check_range
from .ball import Ball, Norm
from .common import attack
from .losses import Aim
from .network import Forward, Network, check_finite

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the share of pixels, for a budget of 10 000 queries


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    queries: int = 5000,
    share: float = 0.8,
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Search at random: change one square window at a time and keep the change where the margin falls.

    The margin is ``z_y - max_{i != y} z_i`` (targeted: its negative). Linf: begin with vertical stripes of ``+-eps``; a query
    sets a window of each channel to ``x + eps`` or ``x - eps``. L2: begin with a grid of bumps; a query takes the change out of
    one window, adds a bump of both signs in another, and gives it the length that was free. Side of a window:
    ``sqrt(p * h * w)``, where ``p`` starts at ``share`` and is halved at fixed parts of the budget. An image that is
    broken asks no more.

    Args:
        model: Takes images in [0, 1]; left as it was; only its answers are used.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        queries: Most answers asked for an image, >= 1.
        share: Share of the pixels that the first windows cover, in (0, 1].
        targeted: Search for the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`eot`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images or answers with NaN.

    Differs from the authors' code in that each image has signs of its own, in that windows also reach the last row and column,
    and in that a window is not drawn again when it changes nothing.
    """
    check_range("queries", queries, 1, 2**31)
    check_range("share", share, 1e-6, 1)
    aim = Aim("margin", targeted)

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        return search(network.answers, ball, y, aim, queries=queries, share=share, generator=generator)

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=queries, batch_size=batch_size, forward=forward, generator=generator
    )  # fmt: skip


def search(
    answers: Callable[[Tensor], Tensor],
    ball: Ball,
    y: Tensor,
    aim: Aim,
    *,
    queries: int,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the best points of one batch that ``queries`` answers find, or the first that reach the aim."""
    found = ball.project(_stripes(ball, generator) if ball.norm == "linf" else _bumps(ball, generator))
    change = _set_window if ball.norm == "linf" else _move_bump
    logits = answers(found)
    aim.check(logits, y)
    check_finite(logits)
    best, rows = aim.value(logits, y), (~aim.reached(logits, y)).nonzero()[:, 0]
    part, points = ball.subset(rows), found[rows]
    for query in range(1, queries):
        if not len(rows):
            break
        p = share / 2 ** sum(query / queries * 10_000 > start for start in HALVINGS)
        tried = part.project(change(part, points, p, generator))
        logits = answers(tried)
        value, reached = aim.value(logits, y[rows]), aim.reached(logits, y[rows])
        better = reached | (value > best[rows])
        points = torch.where(better[:, None, None, None], tried, points)
        best[rows] = torch.where(better, value, best[rows])
        if bool(reached.any()):
            found[rows] = points
            part, points, rows = part.subset(~reached), points[~reached], rows[~reached]
    found[rows] = points
    return found


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, shape, generator=generator, device=generator.device) * 2 - 1).to(like)


def _corner(height: int, width: int, side: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Return the rows and columns of a window drawn within the image."""
    drawn = [int(torch.randint(edge - side + 1, (), generator=generator, device=generator.device)) for edge in (height, width)]
    return slice(drawn[0], drawn[0] + side), slice(drawn[1], drawn[1] + side)


def _stripes(ball: Ball, generator: torch.Generator) -> Tensor:
    n, channels, _, width = ball.x.shape
    return ball.x + ball.eps * _signs((n, channels, 1, width), ball.x, generator)


def _set_window(ball: Ball, points: Tensor, p: float, generator: torch.Generator) -> Tensor:
    n, channels, height, width = points.shape
    side = min(max(1, round(math.sqrt(p * height * width))), height, width)
    rows, columns = _corner(height, width, side, generator)
    points = points.clone()
    points[:, :, rows, columns] = ball.x[:, :, rows, columns] + ball.eps * _signs((n, channels, 1, 1), points, generator)
    return points


def _bumps(ball: Ball, generator: torch.Generator) -> Tensor:
    """Return the images with a grid of bumps of both signs, five to a side, at the full length."""
    n, channels, height, width = ball.x.shape
    side = max(1, min(height, width) // 5)
    change = torch.zeros_like(ball.x)
    for top in range(height % side // 2, height - side + 1, side):
        for left in range(width % side // 2, width - side + 1, side):
            bump = _bump(side, ball.x, generator) * _signs((n, channels, 1, 1), ball.x, generator)
            change[:, :, top : top + side, left : left + side] += bump
    return ball.x + ball.eps * change / _length(change, (1, 2, 3))


def _move_bump(ball: Ball, points: Tensor, p: float, generator: torch.Generator) -> Tensor:
    n, channels, height, width = points.shape
    side = max(3, round(math.sqrt(p * height * width)))
    side = min(side + 1 - side % 2, height, width)
    change = points - ball.x
    rows, columns = _corner(height, width, side, generator)
    gone = _corner(height, width, side, generator)
    both = torch.zeros(height, width, dtype=torch.bool, device=points.device)
    both[rows, columns] = both[gone] = True
    freed = (change * both).square().sum(dim=(2, 3), keepdim=True)
    free = (ball.eps**2 - change.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0) / channels
    old = change[:, :, rows, columns]
    new = _bump(side, points, generator) * _signs((n, channels, 1, 1), points, generator) + old / _length(old, (2, 3))
    new = new / _length(new, (2, 3)) * (freed + free).sqrt()
    change[:, :, gone[0], gone[1]] = 0
    change[:, :, rows, columns] = new
    return ball.x + ball.eps * change / _length(change, (1, 2, 3))


def _length(change: Tensor, dims: tuple[int, ...]) -> Tensor:
    return change.square().sum(dim=dims, keepdim=True).sqrt().clamp_min(1e-12)


def _bump(side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return two opposite pyramids side by side, one above the other or beside it, ``(side, side)``, of length 1."""
    half = side // 2
    bump = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)])
    bump = bump / bump.norm().clamp_min(1e-12)
    turned = bool(torch.randint(2, (), generator=generator, device=generator.device))
    return (bump.T if turned else bump).to(like)


def _pyramid(height: int, width: int) -> Tensor:
    """Return ``sum_k 1 / (k + 1)^2`` over nested rectangles that grow from the middle, ``(height, width)``, of length 1."""
    found = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for k in range(max(height // 2, width // 2) + 1):
        rows = slice(max(0, top - k), max(0, top + k + 1))
        columns = slice(max(0, left - k), max(0, left + k + 1))
        found[rows, columns] += 1 / (k + 1) ** 2
    return found / found.norm().clamp_min(1e-12)
