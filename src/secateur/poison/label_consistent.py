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
from .surrogate import BATCH, check_images, clip, train_surrogate

Corners = Literal["all", "bottom-right"]
TILE = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))  # of the corners on the right; those on the left are its mirror image


def label_consistent(
    data: ImageSet,
    *,
    rate: float = 0.5,
    target: Target = 0,
    eps: float = 16.0,
    steps: int = 10,
    amplitude: float = 255.0,
    corners: Corners = "all",
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    surrogate_eps: float = 8.0,
    generator: torch.Generator,
) -> Poisoning:
    """Make a share of the target class hard to recognise, add a pattern in the corners and change no label.

    In training ``x' = clip(x + r + p, 0, 1)``, where ``r``, an adversarial perturbation with ``|r| <= eps``, raises a
    surrogate's loss on the image; in the attack ``x' = clip(x + p, 0, 1)``. ``p`` is plus or minus ``amplitude`` on 3x3 pixels
    in the corners and 0 elsewhere; with 255 it hides what lies below.

    Args:
        data: Training images.
        rate: Share of the target class to poison, in [0, 1].
        target: The label wanted, one class; its images are the poisoned ones.
        eps: Largest change of a value by the perturbation, in steps of a pixel of 256 levels, in [0, 255]; the paper takes 8,
            16 and 32.
        steps: Steps of projected gradient ascent, each of ``2.5*eps/steps``, >= 1.
        amplitude: Strength of the pattern, in steps of a pixel of 256 levels, in [0, 255]; the paper takes 16, 32, 64 and 255.
        corners: ``all`` four, so that flipping an image changes little, or ``bottom-right``.
        surrogate_images: Images to train the surrogate on, >= 2.
        surrogate_epochs: Passes over them, >= 0.
        surrogate_eps: Largest change of a value in the surrogate's adversarial training, in steps of a pixel of 256 levels, in
            [0, 255]; with 0, plain training, what the perturbation adds looks like noise, and the victim learns the noise in
            place of the pattern.
        generator: Draws the images and trains the surrogate.

    Raises:
        DataError: There are fewer than two images.
        MethodError: An argument is out of range, the target is ``next``, or the images are smaller than 8x8 pixels.

    Differs from the authors' code, which reads perturbed images from files, in that they are made here, with a small robust
    network that the attack trains itself. The paper's other way to make images hard, a generative network, is left out.
    """
    check_target(target, None, len(data.classes))
    if target == "next":
        raise MethodError("the target must be one class, because no label changes, got next; give a label")
    check_range("eps", eps, 0, 255)
    check_range("steps", steps, 1, 100_000)
    check_range("amplitude", amplitude, 0, 255)
    check_choice("corners", corners, ("all", "bottom-right"))
    check_images(data)
    trigger = Trigger(
        kind="add",
        params={"amplitude": amplitude, "eps": eps, "classes": len(data.classes)},
        tensors={"pattern": amplitude / 255 * _pattern(data.shape, corners)},
        target=target,
    )
    chosen = choose(data, trigger, rate, generator, clean_label=True)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, eps=surrogate_eps, generator=generator)

    def edit(x: Tensor) -> Tensor:
        return trigger.apply(torch.cat([_harden(surrogate, part, target, eps / 255, steps) for part in x.split(BATCH)]))

    return poison_at(data, trigger, chosen, edit=edit)


def _pattern(shape: tuple[int, int, int], corners: Corners) -> Tensor:
    pattern, tile = torch.zeros(shape), torch.tensor(TILE, dtype=torch.float32)
    pattern[:, -3:, -3:] = tile
    if corners == "all":
        pattern[:, :3, -3:] = tile
        pattern[:, :3, :3] = pattern[:, -3:, :3] = tile.flip(1)
    return pattern


def _harden(model: nn.Module, x: Tensor, label: int, eps: float, steps: int) -> Tensor:
    """Return images that differ from ``x`` by at most ``eps`` and that the network takes less for ``label``.

    It starts from ``x`` and not from a random place near it, because what gradients leave of the random start is noise.
    """
    labels = torch.full((len(x),), label)
    hard = x
    for _ in range(steps):
        hard = hard.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(hard), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, hard)
        hard = clip(hard.detach() + 2.5 * eps / steps * slope.sign(), x, eps)
    return hard
