"""Batches for methods with loops of their own: by steps or by epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import state
from ..errors import DataError, check_range
from ..types import ImageSet, to_float
from .augment import augment as augmented


def sample(
    images: ImageSet,
    batch_size: int,
    steps: int,
    *,
    augment: Sequence[str] = (),
    device: torch.device | str = "cpu",
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``steps`` batches ``(x, y)``: each image once, in random order, before any comes again.

    Args:
        images: Where they come from.
        batch_size: Images per batch, >= 1; no more than there are, and every batch has as many.
        steps: How many batches, >= 0.
        augment: Augmentations (see `secateur.data.augment`).
        device: Where the batches lie.
        generator: Source of randomness, on the CPU.

    Yields:
        ``x`` float in [0, 1] ``(b, c, h, w)`` in channels-last memory, ``y`` int64 ``(b,)``.

    Raises:
        DataError: There are no images.
        MethodError: A number is out of range.
    """
    check_range("batch_size", batch_size, 1, 2**31)
    check_range("steps", steps, 0, 2**31)
    if len(images) == 0:
        raise DataError("training needs at least one image, got 0")
    size = min(state.batch_size(batch_size), len(images))
    left = torch.empty(0, dtype=torch.int64)
    pixels, labels = images.x.to(device), images.y.to(device)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(len(images), generator=generator)])
        index, left = left[:size], left[size:]
        yield _batch(pixels, labels, index, augment, generator)


def passes(
    images: ImageSet,
    batch_size: int,
    epochs: int,
    *,
    augment: Sequence[str] = (),
    device: torch.device | str = "cpu",
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches ``(x, y)`` of some epochs: each image once in each, in `count_steps` batches of nearly equal size.

    Arguments and errors as in `sample`.
    """
    steps = count_steps(len(images), batch_size)
    check_range("epochs", epochs, 0, 2**31)
    pixels, labels = images.x.to(device), images.y.to(device)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).tensor_split(steps):
            yield _batch(pixels, labels, index, augment, generator)


def count_steps(images: int, batch_size: int) -> int:
    """Return how many batches an epoch has.

    Raises:
        DataError: There are no images.
        MethodError: ``batch_size`` is out of range.
    """
    check_range("batch_size", batch_size, 1, 2**31)
    if images == 0:
        raise DataError("training needs at least one image, got 0")
    return math.ceil(images / state.batch_size(batch_size))


def _batch(
    pixels: Tensor, labels: Tensor, index: Tensor, augment: Sequence[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    index = index.to(pixels.device)
    x = to_float(augmented(pixels.index_select(0, index), augment, generator=generator))
    return x.contiguous(memory_format=torch.channels_last), labels.index_select(0, index)
