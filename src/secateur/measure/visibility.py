"""How much a trigger changes images: L2 and Linf norms, and structural similarity (SSIM).

Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE Transactions
on Image Processing 13 (2004).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, InconclusiveError
from ..types import ImageSet, Trigger, to_float

REACH, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2
PIXELS = 2**17  # values in memory at once: small enough for the cache


@dataclass(frozen=True)
class Visibility:
    """What a trigger changes, as means over images with values in [0, 1].

    Attributes:
        l2: Euclidean norm of the change of an image.
        linf: Largest change of a value.
        ssim: Structural similarity; 1 is no change.
        n: Number of images.
    """

    l2: float
    linf: float
    ssim: float
    n: int


def visibility(trigger: Trigger, data: ImageSet) -> Visibility:
    """Measure what a trigger changes on the images that are eligible for it, not rounded to whole pixel values.

    Raises:
        DataError: The trigger does not fit the images.
        InconclusiveError: No image is eligible for the trigger.
    """
    shown = data.x[trigger.eligible(data.y)]
    if not len(shown):
        raise InconclusiveError("no image is eligible for the trigger: all belong to its target or to no source class")
    with torch.inference_mode():
        return _means([_changes(x, trigger.apply(x)) for x in (to_float(part) for part in shown.split(_part(shown)))])


def compare(clean: Tensor, changed: Tensor) -> Visibility:
    """Measure what was changed, image by image, float ``(n, c, h, w)`` in [0, 1].

    Raises:
        DataError: The two differ in shape.
        InconclusiveError: There are no images.
    """
    if clean.shape != changed.shape:
        raise DataError(f"images to compare must have the same shape, got {tuple(clean.shape)} and {tuple(changed.shape)}")
    if not len(clean):
        raise InconclusiveError("a comparison needs at least one image, got 0")
    size = _part(clean)
    with torch.inference_mode():
        return _means([_changes(x, y) for x, y in zip(clean.split(size), changed.split(size), strict=True)])


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images, float64 ``(n,)``.

    The mean over channels and pixels, each compared through a Gaussian window around it of 11x11 pixels with standard deviation
    1.5; constants K1 = 0.01 and K2 = 0.03. The paper leaves out pixels whose window goes beyond the image. Here images go on as
    their mirror image, as in torchmetrics, because triggers often lie in a corner. With fewer than 6 rows or columns the window
    reaches only as far as they can be mirrored.

    Args:
        x: Images, float ``(n, c, h, w)`` in [0, 1].
        y: Images of the same shape.
    """
    x, y = x.double(), y.double()
    maps = _smooth(_smooth(torch.stack([x, y, x * x, y * y, x * y]), 3), 4)
    mean_x, mean_y, xx, yy, xy = maps.flatten(2)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    top = (2 * product + C1) * (2 * (xy - product) + C2)
    return (top / ((squares + C1) * (xx + yy - squares + C2))).mean(dim=1)


def _smooth(x: Tensor, dim: int) -> Tensor:
    """Return weighted means over the window along one side, beyond whose ends lies the mirror image."""
    side = x.shape[dim]
    reach = min(REACH, side - 1)
    places = torch.arange(-reach, side + reach, device=x.device).abs()
    mirrored = x.index_select(dim, side - 1 - (side - 1 - places).abs())
    weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * SIGMA**2))
    total = torch.zeros_like(x)
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        total.add_(mirrored.narrow(dim, i, side), alpha=weight)
    return total


def _part(x: Tensor) -> int:
    return max(1, PIXELS // max(1, x.shape[1:].numel()))


def _changes(x: Tensor, y: Tensor) -> Tensor:
    """Return L2, Linf and SSIM of each pair, float64 ``(n, 3)``."""
    change = (y - x).flatten(1).double()
    return torch.stack([change.norm(dim=1), change.abs().amax(dim=1), ssim(x, y)], dim=1)


def _means(parts: list[Tensor]) -> Visibility:
    rows = torch.cat(parts)
    l2, linf, similarity = rows.mean(dim=0).tolist()
    return Visibility(l2, linf, similarity, len(rows))
