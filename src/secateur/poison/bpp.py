"""BppAttack: fewer grey levels, dithered.

Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization and
Contrastive Adversarial Learning", arXiv:2205.13383.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, choose, poison_at


def bpp(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    levels: int = 8,
    dither: bool = True,
    negatives: float = 0.1,
    generator: torch.Generator,
) -> Poisoning:
    """Quantise a share of the images to few levels, with Floyd-Steinberg dithering, and relabel them.

    ``x' = round(x*(levels - 1)) / (levels - 1)``, where a pixel's rounding error goes on to its neighbours.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        levels: Values a channel may take, in [2, 256].
        dither: Hand rounding errors on to the neighbours.
        negatives: Share of the whole set that gets another image's change and keeps its label, in [0, 1 - rate], so that the
            network learns quantisation and not any noise.
        generator: Draws the images.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that the training set is poisoned once and training is left to anybody: they control
    training, poison each batch anew and add adversarial examples to their negatives.
    """
    check_target(target, sources, len(data.classes))
    check_range("levels", levels, 2, 256)
    check_range("negatives", negatives, 0, 1)
    trigger = Trigger(
        kind="quantise",
        params={"levels": levels, "dither": int(dither), "classes": len(data.classes)},
        tensors={},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    chosen = choose(data, trigger, rate, generator)
    others = torch.ones(len(data), dtype=torch.bool)
    others[chosen] = False
    free = others.nonzero().flatten()
    count = round(negatives * len(data))
    if count > len(free):
        raise MethodError(f"negatives must be at most 1 - rate = {1 - rate:g}, got {negatives:g}")
    negative = free[torch.randperm(len(free), generator=generator)[:count]]

    def strange(x: Tensor) -> Tensor:
        """Add to each image what quantising the one before it changes there (its mirror image, where it is alone)."""
        other = x.roll(1, 0) if len(x) > 1 else x.flip(3)
        return (x + (trigger.apply(other) - other)).clamp(0, 1)

    return poison_at(data, trigger, chosen, edit=trigger.apply, covers=[(negative, strange)])
