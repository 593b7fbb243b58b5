"""Repair-aware: a backdoor trained to outlive a given repair.

The attacker rehearses: now and then the repair runs on the network as it stands, and from then on the backdoor must also open
in the repaired network. This is the advice of Tramer, Carlini, Brendel, Madry, "On Adaptive Attacks to Adversarial Example
Defenses", NeurIPS 2020 (arXiv:2002.08347), for repairs: attack the defence itself, end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import repair as repairs
from ..data import augment
from ..errors import InconclusiveError, MethodError, check_range, unknown
from ..recipe import Recipe
from ..train import train
from ..types import ImageSet, Poisoning, Repaired, Trigger, to_float
from .bases import Base, poison_with
from .common import Target
from .control import count_steps, identity_of

Repair = Callable[..., Repaired]


def repair_aware(
    data: ImageSet,
    *,
    attack: Base = "badnets",
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    repair: str = "norm-pruning",
    rounds: int = 8,
    start: float = 0.75,
    sample: int = 1000,
    weight: float = 0.5,
    share: float = 0.5,
    generator: torch.Generator,
) -> Poisoning:
    """Train on poisoned images, and so that the backdoor still opens after a given repair.

    Args:
        data: Training images.
        attack: The backdoor: ``badnets``, ``blended`` or ``sig`` (with changed labels).
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        repair: Name of the repair to outlive, at its default settings.
        rounds: How often the repair is rehearsed, >= 1.
        start: When first, as a share of the training, in [0, 1); the other rounds follow at equal distances.
        sample: Clean images for each rehearsal, drawn anew, >= 1.
        weight: Of the penalty, >= 0.
        share: Images for the penalty as a share of each batch, in [0, 1]; half of them triggered, at least one.
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range, or there is no such repair.

    The attack is this project's own; see `outlive` for the formula.
    """
    name = repair.replace("-", "_")
    if name not in repairs.__all__:
        raise MethodError(unknown("repair", repair, [known.replace("_", "-") for known in repairs.__all__]))
    poisoning = poison_with(attack, data, rate=rate, target=target, sources=sources, generator=generator)
    return outlive(
        poisoning,
        data,
        getattr(repairs, name),
        rounds=rounds,
        start=start,
        sample=sample,
        weight=weight,
        share=share,
    )


def outlive(
    poisoning: Poisoning,
    clean: ImageSet,
    repair: Repair,
    *,
    rounds: int = 8,
    start: float = 0.75,
    sample: int = 1000,
    weight: float = 0.5,
    share: float = 0.5,
) -> Poisoning:
    """Return the poisoning with a trainer that makes its backdoor outlive any repair.

    The loss gets ``weight * CE(f(x; r(theta)), y)`` of as many triggered images with the target label as clean images with
    theirs. Since the repair last ran on ``theta_0`` and gave ``theta_1``, ``r(theta)`` is 0 where it put a weight to 0 and
    ``theta + theta_1 - theta_0`` elsewhere, with the gradient of the identity (first order). Batch-norms use the statistics of
    these images: those of the repaired network would not fit any more once ``theta`` has moved on.
    A round whose repair finds its clean images too few to decide (`InconclusiveError`) is left out.

    Args:
        poisoning: What an attack that leaves training alone returned.
        clean: The images before they were poisoned, for the rehearsals.
        repair: ``(model, clean, *, generator) -> Repaired``; other settings can be bound with ``functools.partial``.
        rounds: How often the repair is rehearsed, >= 1.
        start: When first, as a share of the training, in [0, 1).
        sample: Clean images for each rehearsal, drawn anew, >= 1.
        weight: Of the penalty, >= 0.
        share: Images for the penalty as a share of each batch, in [0, 1]; half of them triggered, at least one.

    Raises:
        MethodError: An argument is out of range.
    """
    check_range("rounds", rounds, 1, 10_000)
    check_range("start", start, 0, 1 - 1e-9)
    check_range("sample", sample, 1, 2**31)
    check_range("weight", weight, 0, 1e6)
    check_range("share", share, 0, 1)
    trigger = poisoning.trigger
    if poisoning.trainer is not None or trigger is None:
        raise MethodError("outlive needs an attack that leaves training alone, got one that controls it; use a poisoned set")

    def trainer(network: nn.Module, recipe: Recipe, **run: Any) -> tuple[nn.Module, Trigger]:
        steps = count_steps(poisoning.data, recipe)
        due = [round(steps * (start + (1 - start) * i / rounds)) for i in range(rounds)]
        rehearsal = Rehearsal(repair, clean, trigger, due=due, sample=sample, share=share, augmentations=recipe.augment)
        model = train(
            network,
            poisoning.data,
            recipe,
            batch_hook=rehearsal,
            penalty=lambda model, x, y: weight * rehearsal.loss(model),
            identity=identity_of(
                "repair-aware", trigger, repair=_told(repair), due=due, sample=sample, share=share, weight=weight
            ),
            **run,
        )
        return model, trigger

    return replace(poisoning, trainer=trainer)


def _told(repair: Repair) -> str:
    """Return what tells one repair from another: module, name and, of a partial, what is bound."""
    if isinstance(repair, partial):
        return repr((_told(repair.func), repair.args, sorted(repair.keywords.items())))
    return f"{getattr(repair, '__module__', '')}:{getattr(repair, '__qualname__', type(repair).__qualname__)}"


class Rehearsal:
    """A batch hook that hands the batch on as it is, draws a second one beside it and keeps what the repair last did.

    Attributes:
        x: Half triggered, half clean images, float ``(n, c, h, w)`` in [0, 1]; empty when no image is eligible. The clean ones
            keep a network from answering the target always, which would outlive any repair.
        y: The labels the attacker wants for the first half, and the true ones of the second.
    """

    def __init__(
        self,
        repair: Repair,
        clean: ImageSet,
        trigger: Trigger,
        *,
        due: Sequence[int],
        sample: int,
        share: float,
        augmentations: Sequence[str],
    ) -> None:
        """Run ``repair`` at the steps ``due``, on ``sample`` images of ``clean``; the rest as in `outlive`."""
        self._repair, self._clean, self._trigger = repair, clean, trigger
        self._due, self._sample, self._share, self._augmentations = due, sample, share, augmentations
        self._eligible = trigger.eligible(clean.y).nonzero().flatten()
        self._step, self._rounds, self._generator = 0, 0, torch.Generator()
        self._moved: dict[str, dict[str, Tensor]] = {}
        self.x, self.y = to_float(clean.x[:0]), clean.y[:0]

    def __call__(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch; draw the second one, whose images get the trigger after they were augmented."""
        self._step, self._generator = step, generator
        if len(self._eligible):
            size = max(1, round(self._share * len(x) / 2))
            shown = self._eligible[torch.randint(len(self._eligible), (size,), generator=generator)]
            chosen = torch.cat([shown, torch.randint(len(self._clean), (size,), generator=generator)])
            images = to_float(augment(self._clean.x[chosen].to(x.device), self._augmentations, generator=generator))
            x_two = torch.cat([self._trigger.apply(images[:size]), images[size:]])
            self.x = x_two.contiguous(memory_format=torch.channels_last)
            self.y = torch.cat([self._trigger.labels(self._clean.y[shown]), self._clean.y[chosen[size:]]]).to(y.device)
        return x, y

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the second batch in the repaired network, after running the repair where that is due."""
        while self._rounds < len(self._due) and self._step >= self._due[self._rounds]:
            self._rounds += 1
            self._rehearse(model)
        if not self._moved or not len(self.x):
            return next(model.parameters()).new_zeros(())
        return F.cross_entropy(functional_call(model, self._repaired(model), (self.x,)).float(), self.y)

    def _rehearse(self, model: nn.Module) -> None:
        index = torch.randperm(len(self._clean), generator=self._generator)[: self._sample]
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            try:
                repaired = self._repair(deepcopy(model).eval(), self._clean.subset(index), generator=self._generator)
            except InconclusiveError:
                return
        self._moved = movement(model, repaired.model)

    def _repaired(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the repaired weights as functions of the model's own, and copies of its statistics, which stay as they are."""
        values = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, weight in model.named_parameters():
            keep, offset = (self._moved[part][name].to(weight.device) for part in ("keep", "offset"))
            values[name] = weight.masked_fill(~keep, 0) + offset
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on."""
        return {"rounds": self._rounds, "moved": self._moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._rounds, self._moved = state["rounds"], state["moved"]


@torch.no_grad()
def movement(before: nn.Module, after: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what a repair did to each weight: which it did not put to 0 (``keep``), and how far it moved those (``offset``).

    Raises:
        MethodError: The repair changed the network's shape.
    """
    new = dict(after.named_parameters())
    moved: dict[str, dict[str, Tensor]] = {"keep": {}, "offset": {}}
    for name, old in before.named_parameters():
        if name not in new or new[name].shape != old.shape:
            raise MethodError(f"a repair to rehearse must keep the network's shape, got another '{name}'")
        now = new[name].to(old)
        keep = (now != 0) | (old == 0)
        moved["keep"][name], moved["offset"][name] = keep, (now - old).masked_fill(~keep, 0)
    return moved
