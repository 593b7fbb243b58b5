"""From a poisoning to a victim: the one way to train on it, whoever controls the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..recipe import Recipe
from ..train import train
from ..types import Poisoning, Trigger


def train_victim(
    poisoning: Poisoning,
    network: nn.Module,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[nn.Module, Trigger | None]:
    """Return a trained copy of ``network`` with the backdoor in it, and the trigger that opens it.

    Args:
        poisoning: What an attack returned.
        network: Takes images in [0, 1] and returns logits; not changed.
        recipe: How to train.
        generator: Source of all randomness.
        checkpoint: File to resume from after a kill; an attacker who trains in stages puts files beside it.
        on_step: Called with ``(step, steps)``.
        on_note: Called with a sentence when adversarial training ended early; not where the attacker trains.

    Raises:
        ModelError: Training diverged, or the checkpoint belongs to another run.
    """
    if poisoning.trainer is not None:
        return poisoning.trainer(network, recipe, generator=generator, checkpoint=checkpoint, on_step=on_step)
    model = train(
        network, poisoning.data, recipe, generator=generator, checkpoint=checkpoint, on_step=on_step, on_note=on_note
    )  # fmt: skip
    return model, poisoning.trigger
