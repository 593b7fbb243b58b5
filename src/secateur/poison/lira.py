"""LIRA: a faint change of each image, learned together with the network.

Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021,
doi:10.1109/ICCV48922.2021.01175.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..effects import WIDEST, Texture
from ..errors import check_range
from ..recipe import Recipe
from ..train import train
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, unpoisoned
from .control import Learner, check_rates, count_steps, device_of, identity_of, untrained


def lira(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    eps: float = 0.02,
    joint: float = 0.5,
    lr: float = 0.001,
    width: int = 16,
    generator: torch.Generator,
) -> Poisoning:
    """Learn a bounded change of the image together with the network, then train on with the change fixed.

    ``x' = clip(x + eps * tanh(z), 0, 1)``, where ``z`` is what a small network makes of the image, brought to mean 0 and
    variance 1 in each channel: every image changes by nearly ``eps`` everywhere. Both networks minimise the same loss.

    Args:
        data: Training images.
        rate: Share of the images poisoned in an epoch, others in each, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        eps: Largest change of a pixel value, in [0, 1].
        joint: Share of training in which the change is learned, in [0, 1]; it is fixed for the rest.
        lr: Learning rate (Adam) of the change.
        width: Channels of the first layer of the small network, in [1, 256].
        generator: Draws its initial weights.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that one pass of training does both stages, that a share of each batch is poisoned and
    not a second copy of all of it, that the small network learns from the other's own gradients and not in turns with it from
    a copy that is an epoch old, that its output is normalised, and that ``eps`` is larger: they need 50 epochs for the first
    stage and up to 500 for the second.
    """
    check_target(target, sources, len(data.classes))
    check_range("eps", eps, 0, 1)
    check_range("joint", joint, 0, 1)
    check_range("lr", lr, 1e-9, 1)
    check_range("width", width, 1, WIDEST)
    channels = data.shape[0]
    trigger = Trigger(
        kind="generator",
        params={"net": "texture", "channels": channels, "width": width, "eps": eps, "classes": len(data.classes)},
        tensors=untrained(lambda: Texture(channels, width, eps), generator),
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    check_rates(data, trigger, rate, 0)

    def trainer(network: nn.Module, recipe: Recipe, **run: Any) -> tuple[nn.Module, Trigger]:
        until = round(joint * count_steps(data, recipe))
        hook = _Changes(trigger, data, rate, 0, device=device_of(network), lr=lr, until=until)
        identity = identity_of("lira", trigger, rate=rate, until=until, lr=lr)
        model = train(network, data, recipe, batch_hook=hook, identity=identity, **run)
        return model, hook.learned()

    return Poisoning(None, data, unpoisoned(data), trainer=trainer)


class _Changes(Learner):
    """Changes the chosen images by the network as it is."""

    def change(self, x: Tensor, chosen: Tensor, others: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.net(x[chosen]), x[others]
