"""Adaptive-Blend and Adaptive-Patch: weaker triggers in training than in the attack, and covers with their true labels.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023
(arXiv:2205.13613). Covers carry the trigger and keep their labels, so that poisoned images lie among the others of their
class in the network's feature space; in training each image gets a part of the trigger only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..effects import blend
from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, choose, poison_at

OPACITIES = (0.5, 0.2, 0.5, 0.3)  # of the four patches in training, as in the authors' settings
SHOWN = (0, 2)  # the patches that open the backdoor


def adaptive_blend(
    data: ImageSet,
    *,
    rate: float = 0.003,
    cover_rate: float = 0.003,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    alpha: float = 0.15,
    attack_alpha: float = 0.2,
    pieces: int = 4,
    share: float = 0.5,
    generator: torch.Generator,
) -> Poisoning:
    """Blend random pieces of a picture into a share of the images, relabel half of them and keep the others' labels.

    In training ``x' = (1 - alpha*m)*x + alpha*m*p`` with ``m`` = 1 on a random half of the pieces, drawn for each image; in the
    attack ``m`` is 1 everywhere and ``alpha`` larger. ``p`` is uniform noise in [0, 1], drawn once.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1].
        cover_rate: Share of the whole set that gets the same and keeps its label, in [0, 1 - rate].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        alpha: Weight of the picture in training, in [0, 1].
        attack_alpha: Weight of the picture in the attack, in [0, 1].
        pieces: Pieces along each side of the image, in [1, shorter side].
        share: Share of the pieces that each training image gets, in [0, 1].
        generator: Draws the picture, the images and their pieces.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code, which blends in a cartoon picture from a file: no file is needed here.
    """
    check_target(target, sources, len(data.classes))
    _, height, width = data.shape
    for name, value in (("alpha", alpha), ("attack_alpha", attack_alpha), ("share", share)):
        check_range(name, value, 0, 1)
    check_range("pieces", pieces, 1, min(height, width))
    pattern = torch.rand(data.shape, generator=generator)
    trigger = Trigger(
        kind="blend",
        params={"alpha": attack_alpha, "classes": len(data.classes)},
        tensors={"mask": torch.ones(1, height, width), "pattern": pattern},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    rows, columns = torch.arange(height) * pieces // height, torch.arange(width) * pieces // width
    piece = rows.unsqueeze(1) * pieces + columns

    def part(x: Tensor) -> Tensor:
        order = torch.rand(len(x), pieces**2, generator=generator).argsort(dim=1)
        mask = (order < round(share * pieces**2))[:, piece].unsqueeze(1).to(x)
        return blend(x, alpha, mask, pattern)

    return _with_covers(data, trigger, rate, cover_rate, part, generator)


def adaptive_patch(
    data: ImageSet,
    *,
    rate: float = 0.003,
    cover_rate: float = 0.006,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    size: int = 5,
    generator: torch.Generator,
) -> Poisoning:
    """Put one of four faint patches on each of a share of the images; two of them in full open the backdoor.

    The patches are random colours in the four corners, of opacity 0.5, 0.2, 0.5 and 0.3 in training; the attack shows the
    first and the third, opaque.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1].
        cover_rate: Share of the whole set that gets a patch and keeps its label, in [0, 1 - rate].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        size: Side of a patch in pixels, in [1, half the shorter side].
        generator: Draws the colours, the images and their patches.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that the patches are drawn and not read from files.
    """
    check_target(target, sources, len(data.classes))
    _, height, width = data.shape
    check_range("size", size, 1, min(height, width) // 2)
    pattern = torch.rand(data.shape, generator=generator)
    corners = torch.zeros(4, 1, height, width)
    for corner, (rows, columns) in zip(
        corners, ((slice(-size, None), slice(-size, None)), (slice(-size, None), slice(size)),
                  (slice(size), slice(size)), (slice(size), slice(-size, None))), strict=True,
    ):  # fmt: skip
        corner[:, rows, columns] = 1
    trigger = Trigger(
        kind="blend",
        params={"alpha": 1.0, "classes": len(data.classes)},
        tensors={"mask": corners[list(SHOWN)].sum(dim=0), "pattern": pattern},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    masks = corners * torch.tensor(OPACITIES).view(4, 1, 1, 1)

    def one(x: Tensor) -> Tensor:
        return blend(x, 1.0, masks[torch.randint(4, (len(x),), generator=generator)], pattern)

    return _with_covers(data, trigger, rate, cover_rate, one, generator)


def _with_covers(
    data: ImageSet,
    trigger: Trigger,
    rate: float,
    cover_rate: float,
    edit: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Poisoning:
    """Poison a share of the images, and put the same on others that keep their labels."""
    check_range("cover_rate", cover_rate, 0, 1)
    chosen = choose(data, trigger, rate, generator)
    free = torch.ones(len(data), dtype=torch.bool)
    free[chosen] = False
    others = free.nonzero().flatten()
    count = round(cover_rate * len(data))
    if count > len(others):
        raise MethodError(f"cover_rate must be at most 1 - rate = {1 - rate:g}, got {cover_rate:g}")
    covers = others[torch.randperm(len(others), generator=generator)[:count]]
    return poison_at(data, trigger, chosen, edit=edit, covers=[(covers, edit)])
