"""What data-poisoning attacks share: choosing the images, putting the trigger on, changing the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger, to_float

Target = int | Literal["next"]


def check_target(target: Target, sources: Sequence[int] | None, classes: int) -> None:
    """Raise `MethodError` unless target and sources are labels of a set with this many classes."""
    if target != "next":
        check_range("target", target, 0, classes - 1)
    for source in sources or ():
        check_range("sources", source, 0, classes - 1)


def poison_labels_too(data: ImageSet, trigger: Trigger, rate: float, generator: torch.Generator) -> Poisoning:
    """Put the trigger on a share of the images and give them the label the attacker wants (dirty-label poisoning).

    Args:
        data: The training set.
        trigger: What to put on.
        rate: Share of the *whole* set to poison, in [0, 1], drawn from the images that are eligible for the trigger.
        generator: Draws which images.

    Raises:
        MethodError: ``rate`` is out of range or asks for more images than are eligible.
    """
    check_range("rate", rate, 0, 1)
    candidates = trigger.eligible(data.y).nonzero().flatten()
    count = round(rate * len(data))
    if count > len(candidates):
        raise MethodError(f"rate must be at most {len(candidates) / len(data):.3f} (the eligible share), got {rate:g}")
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    x, y = data.x.clone(), data.y.clone()
    x[chosen] = apply_uint8(trigger, data.x[chosen])
    y[chosen] = trigger.labels(data.y[chosen])
    poisoned = torch.zeros(len(data), dtype=torch.bool)
    poisoned[chosen] = True
    return Poisoning(trigger, replace(data, x=x, y=y, name=f"{data.name}, poisoned"), poisoned)


def apply_uint8(trigger: Trigger, x: Tensor) -> Tensor:
    """Put the trigger on uint8 images and round to whole pixel values, as an image file would hold them."""
    chunks = [trigger.apply(to_float(part)).mul_(255).round_().to(torch.uint8) for part in x.split(4096)]
    return torch.cat(chunks) if chunks else x
