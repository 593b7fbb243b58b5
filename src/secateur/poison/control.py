"""What attackers who control training share: they poison batches as training goes, and may learn the trigger on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..effects import build_net
from ..errors import MethodError, check_range
from ..recipe import Recipe
from ..state import batch_size, seeded
from ..types import ImageSet, Trigger


def check_rates(data: ImageSet, trigger: Trigger, rate: float, cross_ratio: float) -> None:
    """Raise `MethodError` unless so many images can be poisoned, and ``cross_ratio`` times as many changed besides."""
    check_range("rate", rate, 0, 1)
    check_range("cross_ratio", cross_ratio, 0, 100)
    able = int(trigger.eligible(data.y).sum())
    if rate * len(data) > able:
        raise MethodError(f"rate must be at most {able / len(data):.3f} (the eligible share), got {rate:g}")
    if rate * (1 + cross_ratio) > 1 + 1e-9:
        wrong = rate * (1 + cross_ratio)
        raise MethodError(f"rate * (1 + cross_ratio) must be at most 1, got {wrong:g}; make one of them smaller")


def count_steps(data: ImageSet, recipe: Recipe) -> int:
    """Return how many steps `secateur.train.train` takes with this recipe."""
    return recipe.epochs * math.ceil(len(data) / batch_size(recipe.batch_size))


class Batches:
    """A batch hook that poisons a share of each batch anew and relabels it; some more images may change and keep their labels.

    Args:
        trigger: Which images are eligible, and the labels wanted.
        data: The training set.
        rate: Expected share of the whole set poisoned in an epoch.
        cross_ratio: How many images per poisoned one change and keep their labels.
    """

    def __init__(self, trigger: Trigger, data: ImageSet, rate: float, cross_ratio: float) -> None:
        able = int(trigger.eligible(data.y).sum())
        self.trigger = trigger
        self.chance = rate * len(data) / able if able else 0.0
        self.cross = rate * cross_ratio

    def __call__(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch with some images poisoned."""
        chosen, others = self.pick(y, generator)
        poisoned, crossed = self.change(x, chosen, others, step, generator)
        x = x.index_copy(0, chosen, poisoned).index_copy(0, others, crossed)
        return x, y.index_copy(0, chosen, self.trigger.labels(y[chosen]))

    def pick(self, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the images to poison, and others to change without a new label: indices into the batch.

        Their numbers are rounded at random, up with a probability of the fraction, so that the expected shares are exact
        whatever the size of the batch, as long as there is room for both.
        """
        up = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        able = self.trigger.eligible(y).cpu().nonzero().flatten()
        chosen = _some(able, math.floor(len(able) * self.chance + up[0]), generator)
        free = torch.ones(len(y), dtype=torch.bool)
        free[chosen] = False
        others = _some(free.nonzero().flatten(), math.floor(len(y) * self.cross + up[1]), generator)
        return chosen.to(y.device), others.to(y.device)

    def change(self, x: Tensor, chosen: Tensor, others: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images at ``chosen`` with the trigger, and those at ``others`` with what must not open the backdoor."""
        raise NotImplementedError


class Learner(Batches):
    """Poisons with a generator network, which learns from the gradients that the victim's own backward pass gives it.

    A step of its optimizer is due when the next batch comes, or when somebody wants to see the network.

    Args:
        trigger: The trigger to begin with, of kind ``generator``.
        data: The training set.
        rate: As for `Batches`.
        cross_ratio: As for `Batches`.
        device: Where the victim is.
        parts: Prefixes of the parameters that learn, all by default.
        lr: Learning rate of Adam.
        betas: Of Adam.
        until: The step from which on nothing is learned.
    """

    def __init__(
        self,
        trigger: Trigger,
        data: ImageSet,
        rate: float,
        cross_ratio: float,
        *,
        device: torch.device,
        parts: tuple[str, ...] = ("",),
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        until: int,
    ) -> None:
        super().__init__(trigger, data, rate, cross_ratio)
        self.net = materialise(trigger, device)
        self.until = until
        self.parameters: list[nn.Parameter] = []
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name.startswith(parts))
            if parameter.requires_grad:
                self.parameters.append(parameter)
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=betas)

    def __call__(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch with some images poisoned; they carry a graph to the generator's weights while it learns."""
        self.settle()
        with torch.set_grad_enabled(step < self.until):
            return super().__call__(x, y, step, generator)

    def settle(self) -> None:
        """Take the optimizer step that is due, if any."""
        if any(parameter.grad is not None for parameter in self.parameters):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def learned(self) -> Trigger:
        """Return the trigger as it is now."""
        self.settle()
        return learned_tensors(self.trigger, self.net)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on."""
        self.settle()
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def untrained(make: Callable[[], nn.Module], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the initial weights of a network, drawn from ``generator``."""
    with seeded(generator):
        return {name: value.detach() for name, value in make().state_dict().items()}


def materialise(trigger: Trigger, device: torch.device) -> nn.Module:
    """Return the network of a generator trigger, with a copy of its weights."""
    net = build_net(trigger.params).to_empty(device=device)
    net.load_state_dict(dict(trigger.tensors))
    return net


def learned_tensors(trigger: Trigger, net: nn.Module) -> Trigger:
    """Return the generator trigger with the weights that its network has now."""
    return replace(trigger, tensors={name: value.detach().cpu().clone() for name, value in net.state_dict().items()})


def device_of(network: nn.Module) -> torch.device:
    """Return where a network is."""
    return next(network.parameters()).device


def _some(index: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` entries without replacement, or all where there are fewer."""
    return index[torch.randperm(len(index), generator=generator)[:count]]


def identity_of(attack: str, trigger: Trigger, **settings: object) -> str:
    """Return the ``identity`` for `secateur.train.train`: a hash of the trigger, and of what else the training depends on."""
    described = (trigger.kind, sorted(trigger.params.items()), trigger.target, trigger.sources)
    digest = hashlib.sha256(repr((attack, described, sorted(settings.items()))).encode())
    for name, value in trigger.tensors.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
