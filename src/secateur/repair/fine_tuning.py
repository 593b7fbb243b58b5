"""Fine-tuning on clean images alone: the repair that every pruning must beat."""

from __future__ import annotations

import torch
from torch import nn

from ..measure import correct, wilson
from ..train import OnStep, Recipe, train
from ..types import ImageSet, Repaired


def healing(epochs: int, lr: float) -> Recipe:
    """Return the recipe with which repairs fine-tune."""
    return Recipe(epochs=epochs, lr=lr, batch_size=64, schedule="cosine", weight_decay=5e-4, augment=("crop", "flip"))


def fine_tuning(
    model: nn.Module,
    clean: ImageSet,
    *,
    epochs: int = 10,
    lr: float = 0.02,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Train on the clean images for a few epochs (SGD with momentum 0.9, cosine schedule, crops and flips).

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        epochs: Passes over them, >= 0.
        lr: Largest learning rate, > 0.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        ModelError: Training diverged.
    """
    before = wilson(int(correct(model, clean).sum()), len(clean))
    healed = train(model, clean, healing(epochs, lr), on_step=on_step, generator=generator)
    return Repaired(healed, None, log={"clean_accuracy_before": before.value})
