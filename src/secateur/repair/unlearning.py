"""Unlearning clean images: the first step of RNP and TSBD, which read from it what the backdoor is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..data import count_steps, passes
from ..errors import ModelError, check_range
from ..state import seeded
from ..train import OnStep
from ..types import ImageSet
from .student import student_of


def unlearn(
    model: nn.Module,
    clean: ImageSet,
    *,
    lr: float,
    until: float,
    epochs: int,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> tuple[nn.Module, float]:
    """Train on clean images to *raise* the cross-entropy, until few of them are answered rightly.

    SGD with momentum 0.9 in train mode, crops and flips.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        lr: Learning rate, > 0.
        until: Stop after the epoch in which this share of the images or less was answered rightly, in [0, 1].
        epochs: Stop after so many at the latest, >= 1.
        weight_decay: Of the SGD, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress; it may end early.
        generator: Source of all randomness.

    Returns:
        A copy of the network, in train mode, and the share of the last epoch's images that were answered rightly.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range.
        ModelError: The network's numbers are no longer finite.
    """
    check_range("lr", lr, 1e-12, 1e6)
    check_range("until", until, 0, 1)
    check_range("epochs", epochs, 1, 2**31)
    student = student_of(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    steps = count_steps(len(clean), batch_size)
    device = next(student.parameters()).device
    batches = passes(clean, batch_size, epochs, augment=("crop", "flip"), device=device, generator=generator)
    right = seen = 0
    share = 1.0
    with seeded(generator):
        for step, (x, y) in enumerate(batches, 1):
            logits = student(x)
            optimizer.zero_grad()
            (-F.cross_entropy(logits, y)).backward()
            optimizer.step()
            right, seen = right + int((logits.argmax(dim=1) == y).sum()), seen + len(y)
            if on_step is not None:
                on_step(step, steps * epochs)
            if step % steps == 0:
                share, right, seen = right / seen, 0, 0
                check_finite(student, lr)
                if share <= until:
                    break
    return student, share


def check_finite(student: nn.Module, lr: float) -> None:
    """Raise `ModelError` when unlearning has left numbers that are not finite."""
    if not all(bool(value.isfinite().all()) for value in student.state_dict().values()):
        raise ModelError(f"unlearning diverged: weights or statistics are no longer finite; use a smaller rate than {lr:g}")
