"""Random changes to a whole batch at once, on the device it lies on: uint8 or float ``(n, c, h, w)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError, check_choice

NAMES = ("crop", "flip")


def augment(x: Tensor, names: Sequence[str], *, generator: torch.Generator) -> Tensor:
    """Apply the named augmentations in order: ``crop`` pads by an eighth of the height (4 of 32), ``flip`` mirrors."""
    for name in names:
        check_choice("augmentation", name, NAMES)
        x = random_flip(x, generator=generator) if name == "flip" else random_crop(x, x.shape[2] // 8, generator=generator)
    return x


def random_crop(x: Tensor, pad: int, *, generator: torch.Generator) -> Tensor:
    """Pad every image with zeros and cut its own size out again at a random place, its own for each image.

    Args:
        x: Images, uint8 or float ``(n, c, h, w)``.
        pad: Pixels added on each side, >= 0; the offset is uniform in [-pad, pad] both ways.
        generator: Source of randomness; the offsets are drawn on its device.

    Returns:
        Images of the same shape, dtype and device; contiguous.
    """
    _check(x)
    if pad < 0:
        raise DataError(f"the padding must be at least 0 pixels, got {pad}")
    n, c, h, w = x.shape
    height, width = h + 2 * pad, w + 2 * pad
    offset = torch.randint(2 * pad + 1, (2, n, 1, 1), generator=generator, device=generator.device).to(x.device)
    padded = functional.pad(x, (pad, pad, pad, pad)).contiguous()
    # Every run of w neighbouring pixels, as one overlapping view: a cropped row is one of them, copied whole.
    runs = padded.as_strided((max(padded.numel() - w + 1, 0), w), (1, 1))
    plane = torch.arange(n * c, device=x.device).view(n, c, 1) * height
    row = offset[0] + torch.arange(h, device=x.device)
    return runs.index_select(0, ((plane + row) * width + offset[1]).flatten()).view(n, c, h, w)


def random_flip(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half.

    Args:
        x: Images, uint8 or float ``(n, c, h, w)``.
        generator: Source of randomness; the choices are drawn on its device.

    Returns:
        Images of the same shape, dtype and device.
    """
    _check(x)
    flipped = torch.randint(2, (len(x), 1, 1, 1), generator=generator, device=generator.device).bool().to(x.device)
    return torch.where(flipped, x.flip(3), x)


def _check(x: Tensor) -> None:
    if x.ndim != 4:
        raise DataError(f"a batch of images must be (n, c, h, w), got {tuple(x.shape)}")
