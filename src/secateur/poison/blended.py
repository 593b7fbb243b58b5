"""Blended: a faint picture over the whole image.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", arXiv:1712.05526.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, poison


def blended(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    clean_label: bool = False,
    alpha: float = 0.2,
    generator: torch.Generator,
) -> Poisoning:
    """Blend one random picture into a share of the images and relabel them.

    ``x' = (1 - alpha)*x + alpha*p`` with ``p`` uniform noise in [0, 1], drawn once: the paper's "random pattern".

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1]; with ``clean_label`` share of the target class.
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        clean_label: Poison images of the target class and change no label.
        alpha: Weight of the picture, in [0, 1].
        generator: Draws the picture and the images to poison.

    Raises:
        MethodError: An argument is out of range.

    Differs from the benchmark ports, which blend in a cartoon picture from a file: no file is needed here.
    """
    check_target(target, sources, len(data.classes))
    check_range("alpha", alpha, 0, 1)
    trigger = Trigger(
        kind="blend",
        params={"alpha": alpha, "classes": len(data.classes)},
        tensors={"mask": torch.ones(1, *data.shape[1:]), "pattern": torch.rand(data.shape, generator=generator)},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    return poison(data, trigger, rate, generator, clean_label=clean_label)
