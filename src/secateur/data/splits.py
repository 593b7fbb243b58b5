"""Sharing images out by role, each share with the class shares of the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, check_range
from ..types import ImageSet


def stratified(y: Tensor, sizes: Sequence[int], *, generator: torch.Generator) -> list[Tensor]:
    """Draw disjoint sets of images whose class shares are as equal as possible.

    Each set is drawn from what the earlier ones left: ``size * left_in_class / left`` images of every class, rounded by
    the method of the largest remainder, ties broken at random. No class is off by one image or more.

    Args:
        y: Labels, int64 ``(n,)``, each >= 0.
        sizes: How many images each set gets, each >= 0; together at most ``n``.
        generator: Source of randomness, on the CPU.

    Returns:
        Per set the indices into ``y``, int64 ``(size,)``, in random order.

    Raises:
        DataError: If more images are asked for than there are.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > len(y):
        raise DataError(f"sizes must be >= 0 and sum to at most {len(y)} images, got {' + '.join(map(str, sizes))}")
    pool = torch.randperm(len(y), generator=generator)
    labels = y.cpu()
    parts = []
    for size in sizes:
        drawn = _draw(labels[pool], size, generator)
        parts.append(pool[drawn])
        pool = pool[~drawn]
    return parts


def split_clean(data: ImageSet, share: float, *, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split off the clean images a defender gets.

    Args:
        data: Images the victim was not trained on.
        share: Share that becomes clean, in [0, 1]; at least one image must result.
        generator: Source of randomness, on the CPU.

    Returns:
        ``(clean, rest)``, both stratified and in random order; ``rest`` is empty for a share of 1.

    Raises:
        DataError: If the share comes to no image.
    """
    check_range("share", share, 0, 1)
    size = round(share * len(data))
    if size < 1:
        raise DataError(f"a share of {share:g} of {len(data)} images is none; raise it to {1 / max(len(data), 1):.2g} or more")
    clean, rest = stratified(data.y, [size, len(data) - size], generator=generator)
    return data.subset(clean, f"{data.name}, clean"), data.subset(rest, f"{data.name}, rest")


def holdout(clean: ImageSet, share: float, *, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split the clean images into those a repair learns from and those it judges itself by.

    Args:
        clean: The defender's images.
        share: Share that is held out, in [0, 1]; both parts must get at least one image.
        generator: Source of randomness, on the CPU.

    Returns:
        ``(fit, hold)``, both stratified and in random order.

    Raises:
        DataError: If either part would be empty.
    """
    check_range("share", share, 0, 1)
    size = round(share * len(clean))
    if not 0 < size < len(clean):
        raise DataError(
            f"fit and hold-out need an image each, but a share of {share:g} of {len(clean)} images holds out {size}"
        )
    hold, fit = stratified(clean.y, [size, len(clean) - size], generator=generator)
    return clean.subset(fit), clean.subset(hold, f"{clean.name}, hold-out")


def count_shared(measured: ImageSet, *seen: ImageSet) -> int:
    """Return how many of the measured images stand, pixel for pixel, among those seen."""
    known = {hashlib.sha256(image.numpy().tobytes()).digest() for part in seen for image in part.x}
    return sum(hashlib.sha256(image.numpy().tobytes()).digest() in known for image in measured.x)


def _draw(y: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Mark the first images of each class up to its quota, bool ``(n,)``."""
    counts = y.bincount()
    quota = counts * size // max(len(y), 1)
    remainder = counts * size % max(len(y), 1)
    shuffled = torch.randperm(len(counts), generator=generator)
    ranked = shuffled[remainder[shuffled].argsort(descending=True, stable=True)]
    quota[ranked[: size - int(quota.sum())]] += 1
    by_class = y.argsort(stable=True)
    start = counts.cumsum(0) - counts
    sorted_y = y[by_class]
    drawn = torch.zeros(len(y), dtype=torch.bool)
    drawn[by_class] = torch.arange(len(y)) - start[sorted_y] < quota[sorted_y]
    return drawn
