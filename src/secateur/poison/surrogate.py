"""A network of the attacker's own, for attacks that need gradients and do not know the victim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, MethodError, check_range
from ..models import Classifier, build
from ..recipe import Recipe
from ..state import seeded
from ..train import Penalty, train
from ..types import ImageSet

WIDTH = 24  # of the first layer; the last feature has four times as many channels
BATCH = 128  # images whose gradients are computed at once
SIDE = 8  # of the smallest images that the network takes


def train_surrogate(data: ImageSet, *, images: int, epochs: int, eps: float = 0.0, generator: torch.Generator) -> nn.Module:
    """Train a small convolutional network on the attacker's images.

    Args:
        data: What the attacker has; not changed.
        images: How many of them to train on, drawn at random, >= 2.
        epochs: Passes over them, >= 0.
        eps: Largest change of a value in adversarial training, in steps of a pixel of 256 levels, in [0, 255]; 0 for plain
            training.
        generator: Source of all randomness.

    Returns:
        The network in eval mode, with normalisation inside; only images get gradients, weights do not.

    Raises:
        DataError: There are fewer than two images.
        MethodError: A number is out of range, or the images are smaller than 8x8 pixels.
    """
    check_images(data)
    check_range("surrogate_images", images, 2, 2**31)
    check_range("surrogate_epochs", epochs, 0, 100_000)
    check_range("surrogate_eps", eps, 0, 255)
    seen = data.subset(torch.randperm(len(data), generator=generator)[:images])
    arguments = {"width": WIDTH, "classes": len(data.classes), "in_channels": data.shape[0]}
    with seeded(generator):
        net = build("convnet", **arguments)
    pixels = seen.x.transpose(0, 1).flatten(1).double() / 255
    model = Classifier(
        net,
        classes=data.classes,
        input_shape=data.shape,
        mean=pixels.mean(dim=1).nan_to_num().tolist(),
        std=pixels.std(dim=1, correction=0).nan_to_num().clamp_min(1e-3).tolist(),
        arch={"name": "convnet", "kwargs": arguments},
    )
    recipe = Recipe(epochs=epochs, lr=0.2, schedule="triangle", milestones=(0.2,), augment=("crop", "flip"))
    penalty = _adversarial(eps / 255) if eps else None
    return train(model, seen, recipe, generator=generator, penalty=penalty).requires_grad_(False)


def check_images(data: ImageSet) -> None:
    """Raise an error unless the network can be trained on these images.

    Raises:
        DataError: There are fewer than two; one alone has no batch statistics.
        MethodError: They are smaller than 8x8 pixels.
    """
    if min(data.shape[1:]) < SIDE:
        needed = f"the surrogate needs images of at least {SIDE}x{SIDE} pixels"
        raise MethodError(f"{needed}, got {data.shape}; choose another attack")
    if len(data) < 2:
        raise DataError(f"the surrogate needs at least two images, got {len(data)}")


def clip(x: Tensor, centre: Tensor, eps: float) -> Tensor:
    """Return the nearest images to ``x`` in [0, 1] that differ from ``centre`` by at most ``eps`` in every value."""
    return x.clamp((centre - eps).clamp(min=0), (centre + eps).clamp(max=1))


def _adversarial(eps: float) -> Penalty:
    """Return the loss on half of a batch after one gradient step from a random start (Wong, Rice, Kolter, arXiv:2001.03994)."""

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        half = max(2, len(x) // 2)  # one image alone has no batch statistics
        x, y = x[:half], y[:half]
        start = clip(x + eps * (2 * torch.rand(x.shape) - 1), x, eps)
        start = start.contiguous(memory_format=torch.channels_last).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
        return F.cross_entropy(model(clip(start.detach() + 1.25 * eps * slope.sign(), x, eps)), y)

    return penalty
