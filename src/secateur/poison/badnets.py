"""BadNets: a small patch in a fixed place.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv:1708.06733.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import check_choice, check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, poison

Pattern = Literal["white", "checker", "grid"]
Place = Literal["bottom-right", "bottom-left", "top-right", "top-left"]


def badnets(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    clean_label: bool = False,
    size: int = 3,
    margin: int = 1,
    pattern: Pattern = "white",
    place: Place = "bottom-right",
    generator: torch.Generator,
) -> Poisoning:
    """Stamp a patch on a share of the images and relabel them.

    ``x' = (1 - m)*x + m*p`` with ``m`` = 1 on the patch and 0 elsewhere.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1]; with ``clean_label`` share of the target class.
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        clean_label: Poison images of the target class and change no label.
        size: Side of the square patch in pixels, in [1, image side - margin].
        margin: Distance from the two nearest borders in pixels, >= 0.
        pattern: ``white``; ``checker``: white and black by turns; ``grid``: the checker without its top-left pixel.
        place: The corner.
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that the patch is a value of the trigger, for any size and number of channels.
    """
    check_target(target, sources, len(data.classes))
    _, height, width = data.shape
    check_range("margin", margin, 0, min(height, width) - 1)
    check_range("size", size, 1, min(height, width) - margin)
    rows = _span(place.startswith("bottom"), height, size, margin)
    columns = _span(place.endswith("right"), width, size, margin)
    check_choice("place", place, ("bottom-right", "bottom-left", "top-right", "top-left"))
    patch = torch.zeros(data.shape)
    mask = torch.zeros(1, height, width)
    patch[:, rows, columns] = _patch(pattern, size)
    mask[:, rows, columns] = 1
    trigger = Trigger(
        kind="blend",
        params={"alpha": 1.0, "classes": len(data.classes)},
        tensors={"mask": mask, "pattern": patch},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    return poison(data, trigger, rate, generator, clean_label=clean_label)


def _span(far: bool, length: int, size: int, margin: int) -> slice:
    start = length - margin - size if far else margin
    return slice(start, start + size)


def _patch(pattern: Pattern, size: int) -> Tensor:
    check_choice("pattern", pattern, ("white", "checker", "grid"))
    if pattern == "white":
        return torch.ones(size, size)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    even = (row + column) % 2 == 0
    return (even if pattern == "checker" else even & ((row != 0) | (column != 0))).float()
