"""Norm pruning with fine-tuning: cut the weights or filters of small norm, in later layers above all, then heal.

Mishra, Varshney, Yadav, IC3 2023, doi:10.1145/3607947.3608057 (source 1 of this project).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ..errors import MethodError, check_choice
from ..prune import Fraction, Sentence, Until, magnitude, prune
from ..prune.select import Amount, Order, Scope
from ..train import OnStep
from ..types import Granularity, ImageSet, Repaired
from .fine_tuning import healing

SCORES = {"l1": magnitude.l1, "l2": magnitude.l2, "random": magnitude.random}


def norm_pruning(
    model: nn.Module,
    clean: ImageSet,
    *,
    norm: Literal["l1", "l2", "random"] = "l1",
    granularity: Granularity = "channel",
    layers: str | Sequence[str] = "late",
    scope: Scope = "layer",
    order: Order = "smallest",
    fraction: float | None = None,
    drop: float | None = None,
    epochs: int = 10,
    lr: float = 0.02,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Set the weights or filters of smallest norm to zero, then fine-tune with the zeros held.

    Filter ``k`` is scored ``||W_k||_1`` or ``||W_k||_2``, a single weight ``|w|`` (for which both norms rank alike).

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they choose the amount (with ``drop``) and heal.
        norm: ``l1``, ``l2``, or ``random`` for the control that ranks by chance.
        granularity: ``channel`` cuts whole filters with their norm's weight and bias, ``weight`` single weights.
        layers: ``all``, ``early``, ``middle``, ``late``, ``last-conv``, ``last-layer``, or layer names separated by commas.
        scope: One ranking per ``layer``, or one ``global`` over the chosen layers.
        order: Cut the ``smallest`` or the ``largest`` first.
        fraction: Share to cut, in [0, 1]; or
        drop: cut until clean accuracy has fallen by this much, in [0, 1],
            *before* the fine-tuning (0.1 when neither is given).
        epochs: Epochs of fine-tuning; 0 leaves it out.
        lr: Learning rate of the fine-tuning.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        InconclusiveError: ``clean`` is too small to resolve ``drop``.
        MethodError: An argument is out of range, or nothing can be cut in ``layers``.

    Differs from the authors' code: none is public. The abstract gives neither amount, layers, data nor epochs; here every
    one is an argument. The default place follows the abstract ("later layers"); on the victims of ``results/norm-pruning``
    the middle third did better.
    """
    check_choice("norm", norm, SCORES)
    sentence = Sentence(SCORES[norm], _amount(fraction, drop), granularity, layers, scope, order)
    return prune(model, clean, sentence, heal=healing(epochs, lr), on_step=on_step, generator=generator)


def _amount(fraction: float | None, drop: float | None) -> Amount:
    if fraction is not None and drop is not None:
        raise MethodError(f"give fraction or drop, not both (got fraction={fraction:g} and drop={drop:g})")
    if fraction is not None:
        return Fraction(fraction)
    return Until(0.1 if drop is None else drop)
