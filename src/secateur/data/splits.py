"""Splits by role: disjoint, stratified, shuffled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, check_range
from ..types import ImageSet


def stratified(y: Tensor, sizes: Sequence[int], *, generator: torch.Generator) -> list[Tensor]:
    """Draw disjoint index sets whose class shares follow those of ``y``.

    The images are put in an order in which every stretch holds the classes in their shares, and cut from there.

    Args:
        y: Labels, int64 ``(n,)``.
        sizes: How many images each set gets, each >= 0, together at most ``n``.
        generator: Draws which images, and their order.

    Returns:
        One int64 tensor of indices per size.

    Raises:
        DataError: More images are asked for than there are.
    """
    if any(size < 0 for size in sizes) or sum(sizes) > len(y):
        raise DataError(f"split sizes must be >= 0 and add up to at most {len(y)}, got {list(sizes)}")
    order = torch.randperm(len(y), generator=generator)
    labels = y.cpu()[order]
    counts = labels.bincount()
    places = torch.empty(len(y), dtype=torch.float64)
    for label, count in enumerate(counts.tolist()):
        ranks = torch.arange(count, dtype=torch.float64)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        places[labels == label] = (ranks + offset) / max(count, 1)
    spread = order[places.argsort(stable=True)]
    parts = spread[: sum(sizes)].split(list(sizes))
    return [part[torch.randperm(len(part), generator=generator)] for part in parts]


def split_clean(data: ImageSet, share: float, *, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split into the defender's clean images (``share`` of all) and the rest.

    Args:
        data: Images to split.
        share: In [0, 1].
        generator: Draws which images.
    """
    check_range("share", share, 0, 1)
    count = round(share * len(data))
    clean, rest = stratified(data.y, [count, len(data) - count], generator=generator)
    return data.subset(clean, f"{data.name}, clean"), data.subset(rest, f"{data.name}, rest")


def holdout(clean: ImageSet, share: float, *, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Split clean images into those a method may use and a hold-out (``share`` of them) to judge it on."""
    held, fit = split_clean(clean, share, generator=generator)
    return ImageSet(fit.x, fit.y, fit.classes, clean.name), ImageSet(held.x, held.y, held.classes, f"{clean.name}, hold-out")
