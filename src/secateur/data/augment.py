"""Augmentation of whole batches: no loop over images, any number of channels, uint8 or float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MethodError, check_range, unknown

PAD = 4


def random_crop(x: Tensor, pad: int = PAD, *, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``pad`` pixels in each direction; what comes in from outside is 0.

    Args:
        x: Images ``(n, c, h, w)``.
        pad: Largest shift in pixels, >= 0.
        generator: Draws two offsets per image.
    """
    check_range("pad", pad, 0, 4096)
    n, c, h, w = x.shape
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=generator.device).to(x.device)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1).reshape(n, -1, c)
    rows = offsets[0, :, None] + torch.arange(h, device=x.device)
    columns = offsets[1, :, None] + torch.arange(w, device=x.device)
    places = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).reshape(n, h * w)
    picked = padded[torch.arange(n, device=x.device)[:, None], places]
    return picked.reshape(n, h, w, c).permute(0, 3, 1, 2)


def random_flip(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        x: Images ``(n, c, h, w)``.
        generator: Draws one bit per image.
    """
    chosen = torch.randint(0, 2, (len(x), 1, 1, 1), generator=generator, device=generator.device).bool()
    return torch.where(chosen.to(x.device), x.flip(3), x)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {"crop": random_crop, "flip": random_flip}


def augment(x: Tensor, names: Sequence[str], *, generator: torch.Generator) -> Tensor:
    """Apply augmentations by name (``crop``, ``flip``), in the order given.

    Raises:
        MethodError: There is no augmentation of that name.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise MethodError(unknown("augmentation", name, AUGMENTATIONS))
        x = AUGMENTATIONS[name](x, generator=generator)
    return x
