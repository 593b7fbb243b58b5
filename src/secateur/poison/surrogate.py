"""A network of the attacker's own, for attacks that need gradients and do not know the victim."""

from __future__ import annotations

import torch

from ..errors import check_range
from ..models import Classifier, build
from ..recipe import Recipe
from ..state import seeded
from ..train import train
from ..types import ImageSet

WIDTH = 32


def train_surrogate(data: ImageSet, *, images: int, epochs: int, generator: torch.Generator) -> Classifier:
    """Train a small convolutional network on clean images of the attacker's.

    Args:
        data: The attacker's images, which later become the poisoned set; not changed.
        images: How many of them to train on, drawn at random, >= 1.
        epochs: Passes over them, >= 0.
        generator: Source of all randomness.

    Returns:
        The network in eval mode, with the images' mean and standard deviation inside and without gradients for its weights.

    Raises:
        DataError: There are no images.
        MethodError: A number is out of range.
    """
    check_range("surrogate_images", images, 1, 2**31)
    check_range("surrogate_epochs", epochs, 0, 10_000)
    seen = data.subset(torch.randperm(len(data), generator=generator)[:images])
    kwargs = {"width": WIDTH, "classes": len(data.classes), "in_channels": data.shape[0]}
    with seeded(generator):
        net = build("convnet", **kwargs)
    pixels = seen.x.transpose(0, 1).flatten(1).double() / 255
    model = Classifier(
        net,
        classes=data.classes,
        input_shape=data.shape,
        mean=pixels.mean(dim=1).tolist() if len(seen) else None,
        std=pixels.std(dim=1, correction=0).clamp_min(1e-3).tolist() if len(seen) else None,
        arch={"name": "convnet", "kwargs": kwargs},
    )
    recipe = Recipe(epochs=epochs, lr=0.2, schedule="triangle", milestones=(0.2,), augment=("crop", "flip"))
    return train(model, seen, recipe, generator=generator).requires_grad_(False)
