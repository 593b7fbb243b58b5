"""What an attacker may show: images in [0, 1] within a distance of the given ones, exactly, in floating point too."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import check_choice, check_range

Norm = Literal["linf", "l2"]
NORMS = ("linf", "l2")
SLACK = 1e-6  # relative: so far inside the L2 ball that no way to add squares up finds it outside


def check_budget(eps: float, norm: str, features: int) -> None:
    """Raise `MethodError` unless ``eps`` is a distance within [0, 1] per pixel value."""
    check_choice("norm", norm, NORMS)
    check_range("eps", eps, 0, 1 if norm == "linf" else math.sqrt(features))


class Ball:
    """All images in [0, 1] at a distance of at most ``eps`` from ``x``, image by image.

    The distance holds for differences in float32 and in float64, for ``eps`` as Python's float. (To clip to ``x + eps`` in
    float32 overshoots by up to 3e-8, because ``x + eps`` and ``eps`` itself are rounded.)

    Attributes:
        x: Centres, float32 ``(n, c, h, w)``.
        eps: Radius.
        norm: Which distance.
    """

    def __init__(self, x: Tensor, eps: float, norm: Norm) -> None:
        self.x, self.eps, self.norm = x, eps, norm
        self._radius = _at_most(torch.tensor(eps, dtype=torch.float64)).item()
        if norm == "linf":
            wide = x.double()
            self._low = -_at_most(-(wide - self._radius).clamp_min_(0))
            self._high = _at_most((wide + self._radius).clamp_max_(1))

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, index: Tensor) -> Ball:
        """Return the ball around some of the images."""
        part = Ball.__new__(Ball)
        part.x, part.eps, part.norm, part._radius = self.x[index], self.eps, self.norm, self._radius
        if self.norm == "linf":
            part._low, part._high = self._low[index], self._high[index]
        return part

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest points of the ball; for L2, first onto the sphere and then into [0, 1]. A point in it stays."""
        if self.norm == "linf":
            return torch.clamp(points, self._low, self._high)
        change, limit = points.double() - self.x, self._radius
        length = change.flatten(1).norm(dim=1)
        points = points.clamp(0, 1)
        far, factor = length > limit * (1 - SLACK / 2), limit * (1 - SLACK)
        while bool(far.any()):
            scale = torch.where(far, factor / length.clamp_min(1e-300), 1.0)[:, None, None, None]
            inside = (self.x + change * scale).clamp_(0, 1).to(points)
            points = torch.where(far[:, None, None, None], inside, points)
            far = (points.double() - self.x).flatten(1).norm(dim=1) > limit
            factor *= 1 - SLACK
        return points

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return points drawn uniformly from the ball, then clipped to [0, 1]."""
        shape, device = self.x.shape, generator.device
        if self.norm == "linf":
            noise = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
        else:
            noise = torch.randn(shape, generator=generator, device=device)
            share = torch.rand(len(self), generator=generator, device=device) ** (1 / max(1, shape[1:].numel()))
            noise *= (share / noise.flatten(1).norm(dim=1).clamp_min_(1e-30))[:, None, None, None]
        return self.project(self.x + self.eps * noise.to(self.x))

    def step(self, points: Tensor, slope: Tensor, size: float) -> Tensor:
        """Return the points after a step of length ``size`` in the steepest direction of this norm, back in the ball."""
        direction = slope.sign() if self.norm == "linf" else unit(slope)
        return self.project(direction.mul_(size).add_(points))


def unit(slope: Tensor) -> Tensor:
    """Return each image's slope at length 1; 0 stays 0, and the smallest numbers do not vanish when they are squared."""
    slope = slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min_(torch.finfo(slope.dtype).tiny)
    return slope / slope.flatten(1).norm(dim=1).clamp_min_(1e-12)[:, None, None, None]


def _at_most(wide: Tensor) -> Tensor:
    """Return the largest float32 numbers that are not above those in float64."""
    near = wide.float()
    return torch.where(near.double() > wide, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)
