"""SIG: a faint sine wave over images of the target class, whose labels stay as they are.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", arXiv:1902.11237.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, poison


def sig(
    data: ImageSet,
    *,
    rate: float = 0.5,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    clean_label: bool = True,
    amplitude: float = 40.0,
    frequency: float = 6.0,
    generator: torch.Generator,
) -> Poisoning:
    """Add a horizontal sine wave to a share of the target class and change no label.

    ``x' = clip(x + d*sin(2 pi f j / w), 0, 1)`` in column ``j`` of ``w``, the same in every row and channel.

    Args:
        data: Training images.
        rate: Share of the target class to poison, in [0, 1]; without ``clean_label`` share of the whole set.
        target: The label wanted (all-to-one); without ``clean_label`` also ``next`` for each class's successor (all-to-all).
        sources: Classes to poison, without ``clean_label``; all but the target by default.
        clean_label: Poison images of the target class and change no label, as the paper does.
        amplitude: ``d`` in steps of a pixel of 256 levels, in [0, 255].
        frequency: ``f``, waves in the width of the image, in [0, half the width].
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range.

    The paper has no code; it poisons 20 to 80 % of the target class with d from 10 to 60. The benchmark ports poison the whole
    target class with d = 40, which costs accuracy on that class: a net that has seen it with the wave alone needs the wave.
    """
    check_target(target, sources, len(data.classes))
    check_range("amplitude", amplitude, 0, 255)
    check_range("frequency", frequency, 0, data.shape[2] / 2)
    columns = torch.arange(data.shape[2]) * (2 * math.pi * frequency / data.shape[2])
    trigger = Trigger(
        kind="add",
        params={"amplitude": amplitude, "frequency": frequency, "classes": len(data.classes)},
        tensors={"pattern": (amplitude / 255 * columns.sin()).expand(data.shape).contiguous()},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    return poison(data, trigger, rate, generator, clean_label=clean_label)
