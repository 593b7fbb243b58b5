"""The retuning attack: how fast a repaired network learns its backdoor again, as a measure of how deep a repair goes.

Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense", NeurIPS 2024
(arXiv:2410.09838).
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InconclusiveError, check_range
from ..measure import evaluate
from ..recipe import Recipe
from ..train import train
from ..types import ImageSet, Rate, Trigger
from .common import poison_at


def retuned_success(
    model: nn.Module,
    clean: ImageSet,
    test: ImageSet,
    trigger: Trigger,
    *,
    rate: float = 0.02,
    epochs: int = 3,
    lr: float = 0.01,
    generator: torch.Generator,
) -> Rate:
    """Fine-tune a copy on clean images of which a few carry the trigger and its label; return the attack success rate then.

    A network that never had the backdoor says what so few images teach anyway: measure one beside it.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images that the attacker trains on.
        test: Labelled images to measure on.
        trigger: The trigger that was put in at first.
        rate: Share of the clean images that are poisoned, in [0, 1]; at least one image.
        epochs: Of fine-tuning (SGD with momentum 0.9, batches of 64, crops and flips), >= 0.
        lr: Largest learning rate (cosine), > 0.
        generator: Source of all randomness.

    Raises:
        InconclusiveError: None of the clean or test images is of a class that the attacker wants to move.
        MethodError: An argument is out of range.

    Differs from the paper, which tunes on a share of its training set with several rates, in the settings: here they are small,
    so that the measure can stand beside the others.
    """
    check_range("rate", rate, 0, 1)
    eligible = trigger.eligible(clean.y).nonzero().flatten()
    if not len(eligible):
        raise InconclusiveError("no clean image is of a class that the attacker wants to move; give others")
    count = min(len(eligible), max(1, round(rate * len(clean))))
    chosen = eligible[torch.randperm(len(eligible), generator=generator)[:count]]
    mixed = poison_at(clean, trigger, chosen, edit=trigger.apply).data
    recipe = Recipe(epochs=epochs, lr=lr, batch_size=64, schedule="cosine", weight_decay=5e-4, augment=("crop", "flip"))
    again = train(model, mixed, recipe, generator=generator)
    success = evaluate(again, test, trigger=trigger).attack_success
    assert success is not None
    return success
