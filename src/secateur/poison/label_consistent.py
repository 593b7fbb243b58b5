"""Label-consistent: a pattern on images of the target class that were first made hard to recognise.

Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", arXiv:1912.02771.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MethodError, check_choice, check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, choose, poison_at
from .surrogate import train_surrogate

Corners = Literal["all", "bottom-right"]
TILE = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))  # of the right-hand corners; those on the left are its mirror image
BATCH = 128


def label_consistent(
    data: ImageSet,
    *,
    rate: float = 0.5,
    target: Target = 0,
    eps: float = 16.0,
    steps: int = 10,
    amplitude: float = 64.0,
    corners: Corners = "all",
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    generator: torch.Generator,
) -> Poisoning:
    """Make a share of the target class hard to recognise, add a pattern in the corners and change no label.

    In training ``x' = clip(clip(x + r, 0, 1) + p, 0, 1)`` with ``|r| <= eps/255`` chosen for each image so as to raise a
    surrogate's loss; in the attack ``x' = clip(x + p, 0, 1)``. ``p`` is ``amplitude/255`` or minus that in a 3x3 pattern in the
    corners and 0 elsewhere; with 255 the pattern is black and white whatever lies below.
    """
    check_target(target, None, len(data.classes))
    if target == "next":
        raise MethodError("label-consistent needs one target class, because it changes no label; got target=next")
    check_range("eps", eps, 0, 255)
    check_range("steps", steps, 1, 10_000)
    check_range("amplitude", amplitude, 0, 255)
    check_choice("corners", corners, ("all", "bottom-right"))
    trigger = Trigger(
        kind="add",
        params={"amplitude": amplitude, "eps": eps, "classes": len(data.classes)},
        tensors={"pattern": amplitude / 255 * _pattern(data.shape, corners)},
        target=target,
    )
    chosen = choose(data, trigger, rate, generator, clean_label=True)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, generator=generator)

    def edit(x: Tensor) -> Tensor:
        parts = [harden(surrogate, part, int(target), eps / 255, steps, generator) for part in x.split(BATCH)]
        return trigger.apply(torch.cat(parts))

    return poison_at(data, trigger, chosen, edit=edit)


def _pattern(shape: tuple[int, int, int], corners: Corners) -> Tensor:
    pattern, tile = torch.zeros(shape), torch.tensor(TILE, dtype=torch.float32)
    pattern[:, -3:, -3:] = tile
    if corners == "all":
        pattern[:, :3, -3:] = tile
        pattern[:, :3, :3] = pattern[:, -3:, :3] = tile.flip(1)
    return pattern


def harden(model: nn.Module, x: Tensor, label: int, eps: float, steps: int, generator: torch.Generator) -> Tensor:
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    hard = low + (high - low) * torch.rand(x.shape, generator=generator)
    labels = torch.full((len(x),), label)
    for _ in range(steps):
        hard = hard.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(hard), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, hard)
        hard = (hard.detach() + 2.5 * eps / steps * gradient.sign()).clamp(low, high)
    return hard
