"""BadNets: a small patch in a fixed place.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv:1708.06733.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import decode
from ..data.source import printable
from ..errors import MethodError
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Place, Target, box, check_target, poison

PATTERNS = ("white", "checker", "grid", "random")


def badnets(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    clean_label: bool = False,
    size: int = 3,
    margin: int = 1,
    pattern: str = "white",
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
        pattern: ``white``; ``checker``: white and black by turns; ``grid``: the checker without its top-left pixel; ``random``
            colours; or an image file, which is resized to the patch.
        place: The corner, or ``center``.
        generator: Draws the images to poison, and a ``random`` pattern.

    Raises:
        DataError: The image file cannot be read.
        MethodError: An argument is out of range.

    Differs from the authors' code in that the patch is a value of the trigger, for any size and number of channels.
    """
    check_target(target, sources, len(data.classes))
    rows, columns = box(data.shape, size, margin, place)
    patch, mask = torch.zeros(data.shape), torch.zeros(1, *data.shape[1:])
    patch[:, rows, columns] = _patch(pattern, size, data.shape[0], generator)
    mask[:, rows, columns] = 1
    trigger = Trigger(
        kind="blend",
        params={"alpha": 1.0, "classes": len(data.classes)},
        tensors={"mask": mask, "pattern": patch},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    return poison(data, trigger, rate, generator, clean_label=clean_label)


def _patch(pattern: str, size: int, channels: int, generator: torch.Generator) -> Tensor:
    """Return the patch, ``(c or 1, size, size)`` in [0, 1]."""
    if pattern == "white":
        return torch.ones(1, size, size)
    if pattern == "random":
        return torch.rand(channels, size, size, generator=generator).mul_(255).round_() / 255
    if pattern not in PATTERNS:
        if not Path(pattern).is_file():
            raise MethodError(f"pattern must be {', '.join(PATTERNS)} or an image file, got {printable(pattern)}")
        return _picture(Path(pattern), size, channels)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    even = (row + column) % 2 == 0
    return (even if pattern == "checker" else even & ((row != 0) | (column != 0))).float().unsqueeze(0)


def _picture(file: Path, size: int, channels: int) -> Tensor:
    if channels not in (1, 3):
        raise MethodError(f"an image file as pattern needs images of 1 or 3 channels, got {channels}")
    picture = to_float(torch.from_numpy(decode([file], [str(file)], (size, size))[0].copy()))
    return picture.expand(channels, -1, -1) if channels >= len(picture) else picture.mean(dim=0, keepdim=True)
