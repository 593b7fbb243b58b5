"""What all evasion attacks share: checks of what is given, batches, and the climb along the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import state
from ..errors import DataError, check_range
from ..types import to_float
from .ball import Ball, Norm, check_budget
from .losses import Aim
from .network import Forward, Network, opened

Each = Callable[[Network, Ball, Tensor], Tensor]  # attacks one batch: network, ball around the images, labels
Move = Callable[[Ball, Tensor, Tensor], Tensor]  # one step: ball, points, slope; returns points of the ball


def check_numbers(*, steps: int = 1, step_size: float | None = None, restarts: int = 1, random_start: bool = True) -> None:
    """Raise `MethodError` unless the numbers that many attacks take are in range."""
    check_range("steps", steps, 1, 2**31)
    check_range("restarts", restarts, 1, 2**31 if random_start else 1)
    if step_size is not None:
        check_range("step_size", step_size, 0, 1e6)


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    each: Each,
    *,
    eps: float,
    norm: Norm,
    passes: int,
    batch_size: int,
    forward: Forward | None,
    generator: torch.Generator,
) -> Tensor:
    """Attack batch by batch, the network in eval mode and frozen; return images within the budget, like ``x``.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: Labels, int64 ``(n,)``.
        each: What to do with a batch.
        eps: Budget.
        norm: Its distance.
        passes: How often each image goes through the network.
        batch_size: Images at once.
        forward: What to call in place of the network.
        generator: Source of all randomness.

    Raises:
        DataError: The images or labels are not such.
        MethodError: The budget or the batch size is out of range.
        ModelError: The network does not take the images, or its gradient is not finite.
    """
    x = checked(x, y)
    check_budget(eps, norm, x.shape[1:].numel())
    check_range("batch_size", batch_size, 1, 2**31)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), x.device)
    size = state.batch_size(batch_size)
    with opened(model, x[:size].to(device), forward=forward, passes=passes, generator=generator) as network:
        found = torch.empty_like(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            ball = Ball(x[part].to(device, copy=True), eps, norm)
            points = each(network, ball, y[part].to(device, copy=True))
            network.check_slopes()
            found[part] = ball.project(points.detach()).to(x.device)
    return found


def checked(x: Tensor, y: Tensor) -> Tensor:
    """Return images as float32 in [0, 1].

    Raises:
        DataError: They are no images in [0, 1], or the labels are not theirs.
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.uint8):
        raise DataError(f"images must be float32 or uint8 (n, c, h, w), got {x.dtype} {tuple(x.shape)}")
    if y.ndim != 1 or y.dtype != torch.int64 or len(y) != len(x):
        raise DataError(f"labels must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    if x.dtype == torch.uint8:
        x = to_float(x)
    if x.numel() and not 0 <= float(x.amin()) <= float(x.amax()) <= 1:
        found = f"{float(x.amin()):.4g}..{float(x.amax()):.4g}"
        raise DataError(f"images must lie in [0, 1], got {found}; the normalisation belongs into the network")
    if len(y) and int(y.min()) < 0:
        raise DataError(f"labels must be at least 0, got {int(y.min())}")
    return x.detach()


def climb(
    network: Network,
    ball: Ball,
    y: Tensor,
    start: Tensor,
    *,
    steps: int,
    aim: Aim,
    move: Move,
    keep: bool = True,
    drop: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the gradient from ``start``: one forward and one backward a step, and none for the last points.

    Args:
        network: The network.
        ball: Where to stay.
        y: Labels.
        start: Points of the ball, like its centres.
        steps: How many steps.
        aim: What to climb.
        move: One step.
        keep: Return, of an image that any but the last points broke, the last of those with the highest loss; else the last.
        drop: An image leaves with the first points that break it, and costs no more.

    Returns:
        Points; whether points that were looked at broke the image; and the loss of those kept.
    """
    found, rows = start.clone(), torch.arange(len(ball), device=y.device)
    broken = torch.zeros(len(ball), dtype=torch.bool, device=y.device)
    best = torch.full((len(ball),), -torch.inf, device=y.device)
    points = start
    for step in range(steps):
        reached, value, slope = network.slope(points, y, aim, first=step == 0)
        if drop and bool(reached.any()):
            gone, stay = rows[reached], ~reached
            found[gone], broken[gone], best[gone] = points[reached], True, value[reached].to(best)
            rows, points, slope, y, ball = rows[stay], points[stay], slope[stay], y[stay], ball.subset(stay)
            if not len(rows):
                return found, broken, best
        elif keep and not drop:
            better = reached & (value >= best)
            found = torch.where(better[:, None, None, None], points, found)
            best = torch.where(better, value.to(best), best)
            broken |= better
        points = move(ball, points, slope)
    if drop:
        found[rows] = points
        return found, broken, best
    return torch.where(broken[:, None, None, None], found, points), broken, best
