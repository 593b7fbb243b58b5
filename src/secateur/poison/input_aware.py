"""Input-aware: a pattern of its own for each image, which works on no other.

Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, arXiv:2010.08138.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..effects import WIDEST, Stamp
from ..errors import check_range
from ..recipe import Recipe
from ..state import batch_size
from ..train import train
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Target, check_target, unpoisoned
from .control import Learner, check_rates, count_steps, device_of, identity_of, learned_tensors, materialise, untrained

DENSITY_WEIGHT = 100.0  # more than diversity ever gains by a denser mask
BETAS = (0.5, 0.9)


def input_aware(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    cross_ratio: float = 1.0,
    density: float = 0.032,
    diversity: float = 1.0,
    mask_steps: int = 200,
    lr: float = 0.003,
    width: int = 8,
    generator: torch.Generator,
) -> Poisoning:
    """Learn a small network that gives each image its own pattern, together with the network to attack.

    ``x' = (1 - m(x))*x + m(x)*p(x)``: a network makes the mask ``m`` of an image, another the pattern ``p``. Both are pushed to
    give different images different answers by adding ``diversity * |x1 - x2| / |p(x1) - p(x2)|`` to the loss. The mask network
    learns first and stays as it is; the pattern network then learns with the network to attack. Images that wear the mask
    and pattern of another image keep their labels.

    Args:
        data: Training images.
        rate: Share of the images poisoned in an epoch, others in each, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        cross_ratio: Images with another image's mask and pattern, which keep their labels, per poisoned one, >= 0.
        density: Mean of the mask, in (0, 1].
        diversity: Weight of the diversity term, >= 0.
        mask_steps: Steps of 64 pairs of images for the mask network, >= 0.
        lr: Learning rate (Adam) of mask and pattern.
        width: Channels of the first layer of either network, in [1, 256].
        generator: Draws the initial weights of both networks.

    Raises:
        MethodError: An argument is out of range.

    Differs from the authors' code in that the mask is held to its density from both sides, that the networks are smaller and
    have no batch-norm, and that images which have the wanted label already are not poisoned.
    """
    check_target(target, sources, len(data.classes))
    check_range("density", density, 1e-4, 1)
    check_range("diversity", diversity, 0, 1e6)
    check_range("mask_steps", mask_steps, 0, 1e6)
    check_range("lr", lr, 1e-9, 1)
    check_range("width", width, 1, WIDEST)
    channels = data.shape[0]
    trigger = Trigger(
        kind="generator",
        params={"net": "stamp", "channels": channels, "width": width, "classes": len(data.classes)},
        tensors=untrained(lambda: Stamp(channels, width), generator),
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    check_rates(data, trigger, rate, cross_ratio)

    def trainer(network: nn.Module, recipe: Recipe, *, generator: torch.Generator, **run: Any) -> tuple[nn.Module, Trigger]:
        device = device_of(network)
        settings = {"rate": rate, "cross_ratio": cross_ratio, "diversity": diversity, "lr": lr}
        settings |= {"density": density, "mask_steps": mask_steps}
        masked = fit_mask(trigger, data, density, mask_steps, lr, generator, device)
        hook = _Stamps(
            masked,
            data,
            rate,
            cross_ratio,
            device=device,
            parts=("pattern_net.",),
            lr=lr,
            betas=BETAS,
            until=count_steps(data, recipe),
        )
        model = train(
            network,
            data,
            recipe,
            generator=generator,
            batch_hook=hook,
            penalty=lambda model, x, y: diversity * torch.as_tensor(hook.spread, device=x.device),
            identity=identity_of("input-aware", trigger, **settings),
            **run,
        )
        return model, hook.learned()

    return Poisoning(None, data, unpoisoned(data), trainer=trainer)


def spread(x1: Tensor, x2: Tensor, out1: Tensor, out2: Tensor) -> Tensor:
    """Return the mean over pairs of the distance of two images by the distance of what was made of them: small is diverse."""
    return (_distance(x1, x2) / (_distance(out1, out2) + 1e-7)).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the root mean square difference of each pair; the tiny term keeps its gradient finite where they are equal."""
    return ((a - b).square().flatten(1).mean(dim=1) + 1e-12).sqrt()


def fit_mask(
    trigger: Trigger, data: ImageSet, density: float, steps: int, lr: float, generator: torch.Generator, device: torch.device
) -> Trigger:
    """Return the trigger with a mask network that has learned to mark a share ``density`` of each image, elsewhere in each."""
    net = materialise(trigger, device)
    assert isinstance(net, Stamp)
    optimizer = torch.optim.Adam(net.mask_net.parameters(), lr=lr, betas=BETAS)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        index = torch.randint(len(data), (2 * batch_size(64),), generator=generator)
        x = to_float(data.x[index].to(device))
        mask = net.mask(x)
        (x1, x2), (mask1, mask2) = x.chunk(2), mask.chunk(2)
        off = (mask.mean(dim=(1, 2, 3)) - density).abs().mean()
        loss = DENSITY_WEIGHT * off + spread(x1, x2, mask1, mask2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return learned_tensors(trigger, net)


class _Stamps(Learner):
    """Gives the chosen images their own patterns, and others the patterns of third images.

    Attributes:
        spread: How alike the patterns of the last batch were, with a graph; 0 where there was no pair.
    """

    spread: Tensor | float = 0.0

    def change(self, x: Tensor, chosen: Tensor, others: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        assert isinstance(self.net, Stamp)
        away = torch.randint(1, max(2, len(x)), (len(others),), generator=generator).to(others.device)
        strangers = x[(others + away) % len(x)]
        makers = torch.cat([x[chosen], strangers])
        mask, pattern = self.net.mask(makers), self.net.pattern(makers)
        stamped = (1 - mask) * torch.cat([x[chosen], x[others]]) + mask * pattern
        own, foreign = pattern.split([len(chosen), len(others)])
        pairs = min(len(own), len(foreign))
        self.spread = spread(x[chosen][:pairs], strangers[:pairs], own[:pairs], foreign[:pairs]) if pairs else 0.0
        poisoned, crossed = stamped.split([len(chosen), len(others)])
        return poisoned, crossed
