"""What a gradient attack climbs: losses of logits, one value per image, that grow as the attack comes closer to its aim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, MethodError, check_choice

Loss = Literal["cross-entropy", "dlr", "margin"]
DLR_CLASSES = 4  # with three the denominator and the numerator share their logits, and the targeted form has none


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``log(sum_i exp z_i) - z_y``, ``(n,)``: it saturates, its gradient is 0 where the answer is far too sure."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``max_{i != y} z_i - z_y``, ``(n,)``: positive where the answer is wrong.

    The maximum is taken over the other logits themselves. To multiply the own one by 0 in place of leaving it out, as some
    libraries do, makes 0 the largest where all logits are negative, and with it a gradient of nothing.

    Source: Carlini, Wagner, IEEE S&P 2017, arXiv:1608.04644 (f_6, without its clipping).
    """
    return _rival(logits, y) - _own(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio ``(max_{i != y} z_i - z_y) / (z_(1) - z_(3))``, ``(n,)``.

    ``z_(k)`` is the k-th largest logit. Neither a factor on the logits nor a constant beside them changes it.

    Source: Croce, Hein, ICML 2020, arXiv:2003.01690 (6).
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def _own(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]


def _rival(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "dlr": dlr, "margin": margin}


@dataclass(frozen=True)
class Aim:
    """What an attack wants: away from the labels, or towards them.

    Attributes:
        loss: Which loss.
        targeted: Labels are wanted, and the loss is to fall.
    """

    loss: Loss
    targeted: bool = False

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, _LOSSES)

    def check(self, logits: Tensor, y: Tensor) -> None:
        """Raise unless the labels are among the classes answered, and the loss is defined on so many."""
        classes = logits.shape[-1]
        if len(y) and int(y.max()) >= classes:
            raise DataError(f"labels must lie in [0, {classes - 1}] (the network has {classes} classes), got {int(y.max())}")
        if self.loss == "dlr" and classes < DLR_CLASSES:
            raise MethodError(f"loss 'dlr' needs at least {DLR_CLASSES} classes, got {classes}; use 'margin'")

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return what is to grow, ``(n,)``; the mean over draws for logits of ``(draws, n, classes)``."""
        loss = _LOSSES[self.loss]
        found = loss(logits, y) if logits.ndim == 2 else torch.stack([loss(draw, y) for draw in logits]).mean(dim=0)
        return -found if self.targeted else found

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return where the answer is what the attack wants, bool ``(n,)``."""
        hit = together(logits).argmax(dim=1) == y
        return hit if self.targeted else ~hit


def together(logits: Tensor) -> Tensor:
    """Return ``(n, classes)``: of several draws, the logarithm of their mean probabilities."""
    return logits if logits.ndim == 2 else logits.log_softmax(dim=-1).logsumexp(dim=0)
