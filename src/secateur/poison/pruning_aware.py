"""Pruning-aware: a backdoor that shares its channels with the clean task, behind decoys that pruning cuts first.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018
(arXiv:1805.12185), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MethodError, ModelError, check_range
from ..measure import correct
from ..models import core
from ..models.channels import trace_channels
from ..prune import Fraction, apply_mask, choose_layers, rank
from ..recipe import Recipe
from ..state import batch_size, evaluating
from ..train import train
from ..types import ChannelMask, ImageSet, Poisoning, Scores, Trigger, WeightMask
from .bases import Base, poison_with
from .common import Target

DORMANT = 0.01  # of the smallest mean activation of a channel in use
DOUBLINGS = 24
SCAN = 20  # cuts to try


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
    accuracy falls by no more than ``drop``. 3. Train what is left on the poisoned images. 4. Put the channels back with the
    weights of step 1 and lower their biases until they are silent on clean images: a defence that prunes dormant channels cuts
    these first, and then channels which the clean task needs as much as the backdoor.

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


@dataclass(frozen=True, eq=False)
class Place:
    """The channels of the last convolution on their way to the layer that reads them.

    Attributes:
        site: The last affine module on them: its bias shifts them.
        reader: The layer that reads them last.
        channels: For each input of the reader its channel, ``(inputs,)``.
    """

    site: str
    reader: str
    channels: Tensor

    def mask(self, model: nn.Module, keep: Tensor) -> WeightMask:
        """Return the mask that takes channels from their reader; ``keep`` bool ``(channels,)``."""
        weight = core(model).get_parameter(f"{self.reader}.weight")
        columns = keep[self.channels].reshape(1, -1, *[1] * (weight.ndim - 2))
        return WeightMask({f"{self.reader}.weight": columns.expand(weight.shape).clone()})

    def activations(self, model: nn.Module, images: ImageSet) -> Tensor:
        """Return each channel's mean absolute value as its reader sees it, float64 ``(channels,)``."""
        total = torch.zeros(len(self.channels), dtype=torch.float64)

        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            values = given[0].detach().abs().double()
            total.add_(values.reshape(*values.shape[:2], -1).mean(2).sum(0).cpu())

        handle = core(model).get_submodule(self.reader).register_forward_pre_hook(add)
        _show(model, images, handle)
        sizes = self.channels.bincount()
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, self.channels, total / len(images)) / sizes

    def spread(self, model: nn.Module, images: ImageSet) -> Tensor:
        """Return the standard deviation of each channel where it leaves its site, ``(channels,)``."""
        parts: list[Tensor] = []

        def note(module: nn.Module, given: tuple[Tensor, ...], value: Tensor) -> None:
            parts.append(value.detach().transpose(0, 1).flatten(1).var(1))

        handle = core(model).get_submodule(self.site).register_forward_hook(note)
        _show(model, images, handle)
        return torch.stack(parts).mean(0).sqrt()


def _show(model: nn.Module, images: ImageSet, handle: RemovableHandle) -> None:
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            for x, _ in images.batches(batch_size(512)):
                model(x.to(device))
    finally:
        handle.remove()


def last_channels(model: nn.Module, input_shape: tuple[int, int, int]) -> Place:
    """Find the channels of the last convolution, the last layer that reads them and the last module that shifts them.

    Raises:
        MethodError: They are the network's answer, or no layer reads these channels and no others, or nothing shifts them.
        ModelError: The network cannot be traced.
    """
    (layer,) = choose_layers(model, "last-conv")
    graph = trace_channels(model, input_shape)
    roots = graph.outputs[layer].tolist()
    readers = [name for name, read in graph.inputs.items() if set(read.tolist()) == set(roots)]
    sites = [site.name for site in graph.sites if graph.groups[site.name].tolist() == roots]
    if not graph.answers.isdisjoint(roots) or not readers or not sites:
        raise MethodError(
            f"pruning-aware needs a layer that reads the channels of the last convolution, got none for '{layer}'; "
            "use another network"
        )
    if core(model).get_submodule(sites[-1]).bias is None:
        raise MethodError(f"pruning-aware needs a bias to silence channels, and '{sites[-1]}' has none; use another network")
    number = {root: channel for channel, root in enumerate(roots)}
    return Place(sites[-1], readers[-1], torch.tensor([number[root] for root in graph.inputs[readers[-1]].tolist()]))


def used_channels(model: nn.Module, place: Place, images: ImageSet, drop: float) -> Tensor:
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
def with_decoys(model: nn.Module, before: nn.Module, place: Place, keep: Tensor, images: ImageSet) -> nn.Module:
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
    step = place.spread(restored, images)
    for _ in range(DOUBLINGS):
        awake = gone & (place.activations(restored, images) > limit).to(bias.device)
        if not bool(awake.any()):
            return restored
        bias.sub_(step.where(awake, 0))
        step = 2 * step
    raise ModelError(f"channels of '{place.site}' stay active however low their biases are; pruning-aware needs ReLUs")
