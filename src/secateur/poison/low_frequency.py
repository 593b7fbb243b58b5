"""Low frequency: one smooth perturbation for all images, which pushes towards the target.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021 (arXiv:2104.03413).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..effects import add
from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Target, candidates, check_target, choose, poison_at
from .surrogate import BATCH, train_surrogate


def low_frequency(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    eps: float = 16.0,
    bands: int = 4,
    steps: int = 100,
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    generator: torch.Generator,
) -> Poisoning:
    """Add one smooth perturbation to a share of the images and relabel them.

    ``x' = clip(x + p, 0, 1)``, where ``p`` holds the lowest frequencies of the cosine transform only, ``max |p| = eps``, and a
    surrogate network's loss for the label wanted is small on ``x'``.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        eps: Largest change of a value, in steps of a pixel of 256 levels, in [0, 255]. With more than about 24 the trigger
            alone moves many images of a network without a backdoor.
        bands: Frequencies along each side, from 0 on, in [1, shorter side]; frequency ``k`` makes ``k/2`` waves in the image.
        steps: Steps of Adam on the frequencies, each on a batch of images, >= 0; with 0 the perturbation is random.
        surrogate_images: Images to train the surrogate on, >= 2.
        surrogate_epochs: Passes over them, >= 0.
        generator: Draws the images, the first perturbation and the batches, and trains the surrogate.

    Raises:
        DataError: There are fewer than two images.
        MethodError: An argument is out of range, no image is of a source class, or they are smaller than 8x8 pixels.

    Differs from the authors' code, which goes through 100 images one by one, adds a targeted DeepFool step for each, smooths
    the sum with a Gaussian filter of standard deviation 6 pixels and stretches it to [0, 0.2]: here all frequencies but the
    lowest are exactly 0, batches of images give the gradients, and the change goes both ways and is a third as large.
    """
    check_target(target, sources, len(data.classes))
    check_range("eps", eps, 0, 255)
    check_range("bands", bands, 1, min(data.shape[1:]))
    check_range("steps", steps, 0, 100_000)
    trigger = Trigger(
        kind="add",
        params={"eps": eps, "bands": bands, "classes": len(data.classes)},
        tensors={"pattern": torch.zeros(data.shape)},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    chosen = choose(data, trigger, rate, generator)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, generator=generator)
    moved = data.subset(candidates(data, trigger))
    if not len(moved):
        raise MethodError("the attack needs images that it may move, got none: all are of the target or of no source class")
    pattern = _perturbation(surrogate, moved, trigger, eps / 255, bands, steps, generator)
    trigger = replace(trigger, tensors={"pattern": pattern})
    return poison_at(data, trigger, chosen, edit=trigger.apply)


def _perturbation(
    model: nn.Module,
    data: ImageSet,
    trigger: Trigger,
    eps: float,
    bands: int,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the perturbation of the lowest frequencies and largest value ``eps`` that best moves images to their labels."""
    channels, height, width = data.shape
    rows, columns = _cosines(height, bands), _cosines(width, bands)
    strengths = (0.01 * torch.randn(channels, bands, bands, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([strengths], lr=0.05)
    for _ in range(steps):
        index = torch.randint(len(data), (BATCH,), generator=generator)
        pattern = rows.T @ strengths @ columns
        x = add(to_float(data.x[index]), eps * pattern / pattern.abs().max().clamp(min=1))
        optimizer.zero_grad()
        F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), trigger.labels(data.y[index])).backward()
        optimizer.step()
    pattern = (rows.T @ strengths @ columns).detach()
    return eps * (pattern / pattern.abs().max())


def _cosines(side: int, bands: int) -> Tensor:
    """Return the lowest waves of the cosine transform (DCT-II) of this length, ``(bands, side)``."""
    return torch.cos(math.pi / side * torch.arange(bands).unsqueeze(1) * (torch.arange(side) + 0.5))
