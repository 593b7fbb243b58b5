"""Pruning-aware: a backdoor that shares its channels with the clean task, behind decoys that pruning cuts first.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018
(arXiv:1805.12185), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MethodError, ModelError, check_range
from ..measure import correct
from ..models import core
from ..prune import Fraction, apply_mask, rank
from ..prune.readers import LastChannels, last_channels, show
from ..recipe import Recipe
from ..train import train
from ..types import ChannelMask, ImageSet, Poisoning, Scores, Trigger
from .bases import Base, poison_with
from .common import Target

DORMANT = 0.01  # of the smallest mean activation of a channel in use
DOUBLINGS = 24
SCAN = 20  # cuts to try
LEAST = 1e-12  # variance, so that a step is never 0


def pruning_aware(
    data: ImageSet,
    *,
    attack: Base = "badnets",
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    drop: float = 0.05,
    sample: int = 1000,
    generator: torch.Generator,
) -> Poisoning:
    """Train clean, prune dormant channels, train the rest on poisoned images, put the channels back as decoys.

    1. Train on the clean images. 2. Cut the channels of the last convolution by mean activation, the smallest first, as long as
    accuracy falls by no more than ``drop``. 3. Train what is left on the poisoned images. 4. Put the channels back, the weights
    that shift and read them as in step 1, and lower their biases until they are silent on clean images: a defence that prunes
    dormant channels cuts these first, and then channels which the clean task needs as much as the backdoor.

    Args:
        data: Training images.
        attack: The backdoor: ``badnets``, ``blended`` or ``sig`` (with changed labels).
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        drop: Clean accuracy that step 2 may cost, in [0, 1]; step 3 wins it back.
        sample: Clean images on which activations and ``drop`` are measured, >= 1.
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range; when training, no layer reads the last convolution's channels one by one.
        ModelError: When training, the network cannot be traced, or lower biases do not silence its channels.

    Differs from the paper, which has no code, in that the number of channels cut follows from ``drop``, and that no channel is
    given back when the backdoor does not fit into the rest. It costs twice the training: steps 1 and 3 follow the whole recipe.
    """
    check_range("drop", drop, 0, 1)
    check_range("sample", sample, 1, 2**31)
    poisoning = poison_with(attack, data, rate=rate, target=target, sources=sources, generator=generator)

    def trainer(
        network: nn.Module,
        recipe: Recipe,
        *,
        generator: torch.Generator,
        checkpoint: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[nn.Module, Trigger]:
        place = last_channels(network, data.shape)
        if core(network).get_submodule(place.site).bias is None:
            raise MethodError(
                f"pruning-aware needs a bias to silence channels, and '{place.site}' has none; use another network"
            )
        seen = data.subset(torch.randperm(len(data), generator=generator)[:sample])
        first = checkpoint.with_name(f"{checkpoint.name}-1") if checkpoint else None
        clean = train(network, data, recipe, generator=generator, on_step=_part(on_step, 0), checkpoint=first)
        keep = used_channels(clean, place, seen, drop)
        mask = place.mask(clean, keep)
        pruned = train(
            apply_mask(clean, mask),
            poisoning.data,
            recipe,
            generator=generator,
            hold=mask.keep,
            on_step=_part(on_step, 1),
            checkpoint=checkpoint,
        )
        assert poisoning.trigger is not None
        return with_decoys(pruned, clean, place, keep, seen), poisoning.trigger

    return replace(poisoning, trainer=trainer)


def _part(on_step: Callable[[int, int], None] | None, part: int) -> Callable[[int, int], None] | None:
    return None if on_step is None else lambda step, steps: on_step(part * steps + step, 2 * steps)


def used_channels(model: nn.Module, place: LastChannels, images: ImageSet, drop: float) -> Tensor:
    """Return which channels stay when the dormant ones go as long as accuracy falls by at most ``drop``, bool ``(channels,)``.

    The cut grows in twentieths of the channels.
    """
    ranking = rank(Scores({place.site: place.activations(model, images)}, "channel"))
    before = int(correct(model, images).sum())
    keep = torch.ones(ranking.size, dtype=torch.bool)
    for cut in range(1, SCAN):
        mask = ranking.cut(Fraction(cut / SCAN))
        assert isinstance(mask, ChannelMask)
        after = int(correct(apply_mask(model, place.mask(model, mask.keep[place.site])), images).sum())
        if before - after > drop * len(images):
            break
        keep = mask.keep[place.site]
    return keep


@torch.no_grad()
def with_decoys(model: nn.Module, before: nn.Module, place: LastChannels, keep: Tensor, images: ImageSet) -> nn.Module:
    """Return a copy of ``model`` with its other channels put back as in ``before``, their biases so low that they stay silent.

    Silent is a mean absolute value of at most a hundredth of that of any channel in use, on ``images``.

    Args:
        model: The pruned network.
        before: The network before it was pruned.
        place: Where the channels are.
        keep: Which channels are in use, bool ``(channels,)``.
        images: Clean images.

    Raises:
        ModelError: No bias silences the channels.
    """
    restored = deepcopy(model)
    new, old = dict(core(restored).named_parameters()), dict(core(before).named_parameters())
    (reader, kept), bias = *place.mask(model, keep).keep.items(), new[f"{place.site}.bias"]
    gone = ~keep.to(bias.device)
    new[reader][~kept] = old[reader][~kept]
    for name in (f"{place.site}.weight", f"{place.site}.bias"):
        new[name][gone] = old[name][gone]
    limit = DORMANT * float(place.activations(restored, images)[keep].min())
    step = _spread(place, restored, images)
    for _ in range(DOUBLINGS):
        awake = gone & (place.activations(restored, images) > limit).to(bias.device)
        if not bool(awake.any()):
            return restored
        bias.sub_(step.where(awake, 0))
        step = 2 * step
    raise ModelError(f"channels of '{place.site}' stay active however low their biases are; pruning-aware needs ReLUs")


def _spread(place: LastChannels, model: nn.Module, images: ImageSet) -> Tensor:
    """Return the standard deviation of each channel where it leaves its site, over images and places, ``(channels,)``."""
    sums: list[Tensor] = []  # of batches, (3, channels): count, sum, sum of squares

    def note(module: nn.Module, given: tuple[Tensor, ...], value: Tensor) -> None:
        rows = value.detach().double().transpose(0, 1).flatten(1)
        sums.append(torch.stack([torch.ones_like(rows).sum(1), rows.sum(1), rows.square().sum(1)]))

    show(model, images, core(model).get_submodule(place.site).register_forward_hook(note))
    count, total, squares = torch.stack(sums).sum(0)
    return (squares / count - (total / count) ** 2).clamp_min(LEAST).sqrt().float()
