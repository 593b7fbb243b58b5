"""Unlearning clean images: the first step of RNP and TSBD, which read from it what the backdoor is made of."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from ..data import sample
from ..errors import check_range
from ..state import seeded
from ..train import OnStep
from ..types import ImageSet


def unlearn(
    model: nn.Module,
    clean: ImageSet,
    *,
    lr: float,
    until: float,
    epochs: int,
    batch_size: int = 128,
    largest_gradient: float = math.inf,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> tuple[nn.Module, float]:
    """Train on clean images to *raise* the cross-entropy, until few of them are answered rightly.

    SGD with momentum 0.9 and weight decay 5e-4 in train mode, crops and flips.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        lr: Learning rate, > 0.
        until: Stop after the epoch in which this share of the images or less was answered rightly, in [0, 1].
        epochs: Stop after so many at the latest, >= 1.
        batch_size: Images per batch, >= 1.
        largest_gradient: Longer gradients (l2 norm over all parameters) are shortened to this, > 0.
        on_step: Progress; it may end early.
        generator: Source of all randomness.

    Returns:
        A copy of the network, in train mode, and the share of the last epoch's images that were answered rightly.

    Raises:
        MethodError: An argument is out of range.
    """
    check_range("lr", lr, 0, 1e6)
    check_range("until", until, 0, 1)
    check_range("epochs", epochs, 1, 2**31)
    student = deepcopy(model).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = math.ceil(len(clean) / batch_size)
    device = next(student.parameters()).device
    batches = sample(clean, batch_size, steps * epochs, augment=("crop", "flip"), device=device, generator=generator)
    right = seen = 0
    share = 1.0
    with seeded(generator):
        for step, (x, y) in enumerate(batches, 1):
            logits = student(x)
            optimizer.zero_grad()
            (-F.cross_entropy(logits, y)).backward()
            nn.utils.clip_grad_norm_(student.parameters(), largest_gradient)
            optimizer.step()
            right, seen = right + int((logits.argmax(dim=1) == y).sum()), seen + len(y)
            if on_step is not None:
                on_step(step, steps * epochs)
            if step % steps == 0:
                share, right, seen = right / seen, 0, 0
                if share <= until:
                    break
    return student, share
