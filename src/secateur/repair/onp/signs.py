"""What a mask is judged by, and what each neuron has to do with it: clean accuracy, and signs of a backdoor without a trigger.

Each sign is a share of images that a network answers in a certain way, with the mask on: the network itself on images that
bear inverted triggers, a copy with noise on its neurons, a copy that has unlearned the clean images. One evaluator per sign
computes a mask from the first layer it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import sample
from ...errors import DataError, MethodError
from ...forward import Incremental
from ...measure import predict
from ...models import core
from ...prune.mask import masked_values
from ...prune.neurons import Neurons
from ...state import batch_size
from ...types import HardMask, ImageSet, Trigger, to_float
from ..anp import adversarial_noise
from ..unlearning import unlearn

NOISE = 0.4  # ANP's
SLOPES = 512  # images that a slope is taken over, at most


class Sign:
    """A share of images, of a network with a mask on.

    Attributes:
        name: What it tells.
        base: The network that the mask is put on.
        images: What it is shown; their labels are what the network ought to answer.
        hits: The answers that count; where None, any but the label.
    """

    def __init__(
        self, name: str, base: nn.Module, images: ImageSet, hits: Tensor | None = None, *, memory: int = 2**28
    ) -> None:
        """Take what is to be shown.

        Raises:
            DataError: That is nothing.
        """
        if len(images) == 0:
            raise DataError(f"no image is left for the sign '{name}': all are of the class in question; give more images")
        self.name, self.base, self.images, self.hits = name, base, images, hits
        self._evaluator = Incremental(base, images, memory=memory)

    def __call__(self, mask: HardMask) -> float:
        """Return the share under a mask, in [0, 1]; computed once for each."""
        answers = self._evaluator.predict(masked_values(self.base, mask))
        counted = answers != self.images.y if self.hits is None else answers == self.hits
        return float(counted.double().mean())

    @property
    def forwards(self) -> int:
        """How many batches were computed, in part at least."""
        return self._evaluator.forwards

    @cached_property
    def slopes(self) -> Mapping[str, Tensor]:
        """Site -> ``(channels,)``: how the cross-entropy to the labels rises with a factor on each neuron, to first order.

        Where it is positive, less of the neuron brings the images back to their labels.
        """
        neurons = Neurons(self.base, self.images.shape)
        neurons.network.eval()
        factors = {site: factor.requires_grad_() for site, factor in neurons.filled(1.0).items()}
        total = {site: torch.zeros(len(factor)) for site, factor in factors.items()}
        step = max(1, len(self.images) // SLOPES)
        x, y = self.images.x[::step], self.images.y[::step]
        for some, labels in zip(x.split(batch_size(128)), y.split(batch_size(128)), strict=True):
            loss = F.cross_entropy(
                neurons(to_float(some).to(neurons.device), factors), labels.to(neurons.device), reduction="sum"
            )
            for site, slope in zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True):
                total[site] += slope.cpu() / len(y)
        return total


def clean_errors(model: nn.Module, images: ImageSet) -> Sign:
    """Return the share of clean images answered wrongly."""
    return Sign("error", model, images)


def triggered(model: nn.Module, images: ImageSet, triggers: Sequence[Trigger]) -> Sign:
    """Return the share of images of other classes that triggers send to their targets; the images are dealt out to them.

    Raises:
        MethodError: There is no trigger, or one that has no single target.
    """
    if not triggers:
        raise MethodError("this sign needs at least one trigger, got none")
    stamped, labels, hits = [], [], []
    for number, trigger in enumerate(triggers):
        if not isinstance(trigger.target, int):
            raise MethodError("this sign needs triggers with one target each")
        others = images.subset(images.y != trigger.target)
        others = others.subset(torch.arange(number, len(others), len(triggers)))
        stamped.append((trigger.apply(to_float(others.x)) * 255).round().clamp(0, 255).to(torch.uint8))
        labels.append(others.y)
        hits.append(torch.full_like(others.y, trigger.target))
    shown = replace(images, x=torch.cat(stamped), y=torch.cat(labels))
    return Sign("trigger", model, shown, torch.cat(hits))


def noisy(model: nn.Module, images: ImageSet, *, generator: torch.Generator) -> Sign:
    """Return the share of images of other classes that a copy with adversarial noise on its neurons sends to its favourite.

    The noise is ANP's; the favourite is the class that gets most of them before anything is cut.
    """
    neurons = Neurons(model, images.shape)
    neurons.network.train()
    [(x, y)] = sample(images, min(256, len(images)), 1, device=neurons.device, generator=generator)
    ones = neurons.filled(1.0)
    noise = adversarial_noise(neurons, ones, x, y, eps=NOISE, generator=generator)
    base = deepcopy(model)
    parameters = dict(core(base).named_parameters())
    with torch.no_grad():
        for kind, factors in zip(("weight", "bias"), noise.factors(ones), strict=True):
            for site, factor in factors.items():
                value = parameters.get(f"{site}.{kind}")
                if value is not None:
                    value.mul_(factor.reshape(-1, *[1] * (value.ndim - 1)).to(value))
    return _to_favourite("noise", settled(base, images), images)


def unlearned(model: nn.Module, images: ImageSet, *, epochs: int = 20, generator: torch.Generator) -> Sign:
    """Return the share of images of other classes that a copy which has unlearned them sends to its favourite (RNP's copy).

    Raises:
        ModelError: Unlearning diverged.
    """
    copy, _ = unlearn(model, images, lr=0.01, until=0.2, epochs=epochs, generator=generator)
    base = deepcopy(model)
    base.load_state_dict(copy.state_dict())
    return _to_favourite("unlearned", settled(base, images), images)


def _to_favourite(name: str, base: nn.Module, images: ImageSet) -> Sign:
    """Return the share of images of other classes that a network sends to the class to which it sends most of them."""
    answers = predict(base, images)
    favourite = int(answers[answers != images.y].bincount(minlength=len(images.classes)).argmax())
    others = images.subset(images.y != favourite)
    return Sign(name, base, others, torch.full_like(others.y, favourite))


def settled(network: nn.Module, images: ImageSet) -> nn.Module:
    """Give a network's batch-norms the statistics that they have on images, in place, and return it in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.eval()
    for norm in norms:
        norm.train()
    device = next(network.parameters()).device
    with torch.no_grad():
        for x, _ in images.batches(batch_size(256)):
            network(x.to(device).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return network.eval()
