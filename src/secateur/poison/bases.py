"""What attackers who know the defence share: a known backdoor underneath, and a second batch beside each training batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import augment
from ..errors import check_choice
from ..types import ImageSet, Poisoning, to_float
from .badnets import badnets
from .blended import blended
from .common import Target
from .sig import sig

Base = Literal["badnets", "blended", "sig"]
BASES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "badnets": (badnets, {}),
    "blended": (blended, {}),
    "sig": (sig, {"clean_label": False}),  # whoever controls the training may as well change labels
}


def poison_with(
    attack: str, data: ImageSet, *, rate: float, target: Target, sources: Sequence[int] | None, generator: torch.Generator
) -> Poisoning:
    """Poison ``data`` with the attack of this name, at its other defaults.

    Raises:
        MethodError: There is no such attack, or an argument is out of range.
    """
    check_choice("attack", attack, BASES)
    function, more = BASES[attack]
    return function(data, rate=rate, target=target, sources=sources, generator=generator, **more)


class Beside:
    """A batch hook that hands the batch on as it is and draws a second one for a penalty to read.

    Attributes:
        x: The second batch, float ``(n, c, h, w)`` in [0, 1], on the device of the first, augmented like it.
        y: Its labels.
        step: The step it belongs to.
    """

    def __init__(self, data: ImageSet, share: float, augmentations: Sequence[str]) -> None:
        """Draw ``share`` as many images as the batch has, at least one, from ``data``, with replacement."""
        self._data, self._share, self._augmentations = data, share, augmentations
        self.x, self.y, self.step = to_float(data.x[:0]), data.y[:0], 0

    def __call__(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch; draw the second one."""
        size = max(1, round(self._share * len(x)))
        chosen = torch.randint(len(self._data), (size,), generator=generator)
        images = augment(self._data.x[chosen].to(x.device), self._augmentations, generator=generator)
        self.x = to_float(images).contiguous(memory_format=torch.channels_last)
        self.y, self.step = self._data.y[chosen].to(y.device), step
        return x, y
