"""ANP, adversarial neuron pruning: cut the neurons that fail first when all are perturbed against the network.

Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021 (arXiv:2110.14430).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import holdout, sample
from ..errors import check_range
from ..prune.grammar import HELD_OUT
from ..prune.mask import Edit
from ..prune.neurons import Neurons, cut_lowest, learn
from ..train import OnStep
from ..types import ImageSet, Repaired


def anp(
    model: nn.Module,
    clean: ImageSet,
    *,
    eps: float = 0.4,
    trade_off: float = 0.2,
    iterations: int = 2000,
    lr: float = 0.2,
    batch_size: int = 128,
    drop: float = 0.02,
    edit: Edit = "weight",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a factor for each neuron that keeps accuracy also under adversarial noise on the neurons; cut where it is small.

    ``min over m in [0, 1] of a * CE(f(m*w, b)) + (1 - a) * max over d, e in [-eps, eps] of CE(f((m + d)*w, (1 + e)*b))``, where
    ``w`` and ``b`` are the weights and biases of the neurons. The noise starts anew from a uniform draw for each batch and
    takes one step of size ``eps`` along the sign of the gradient, without projection; batch-norms use the batch's statistics.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: three quarters learn the factors, a quarter chooses how much to cut.
        eps: Size of the noise, relative to each weight and bias, >= 0.
        trade_off: ``a``, the share of the loss without noise, in [0, 1].
        iterations: Batches, >= 1.
        lr: Learning rate of the factors (SGD with momentum 0.9), > 0.
        batch_size: Images per batch, >= 1.
        drop: Clean accuracy that the cut may cost, in [0, 1].
        edit: Set the ``weight`` of a cut neuron to 0, or ``weight+bias``.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out.
        MethodError: An argument is out of range.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that neurons are cut by number, in the order of their factors' means over the training
    (last values tie at 0), and the number is chosen on held-out clean images: there a threshold is left to the user, and a
    widely used benchmark picks it by the attack success rate on test images. Networks without batch-norm are treated at the
    layers themselves.
    """
    check_range("eps", eps, 0, 1e6)
    check_range("trade_off", trade_off, 0, 1)
    check_range("iterations", iterations, 1, 2**31)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    neurons = Neurons(model, clean.shape)
    neurons.network.train()
    factors = neurons.filled(1.0)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return loss_under_noise(neurons, factors, x, y, eps=eps, trade_off=trade_off, generator=generator)

    batches = sample(fitted, batch_size, iterations, augment=("crop", "flip"), device=neurons.device, generator=generator)
    watch = None if on_step is None else lambda step: on_step(step, iterations)
    scores = learn(factors, loss, batches, lr=lr, on_step=watch, generator=generator)
    return cut_lowest(model, judged, scores, drop=drop, edit=edit)


def loss_under_noise(
    neurons: Neurons,
    factors: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    trade_off: float,
    generator: torch.Generator,
) -> Tensor:
    """Return ``a`` parts of the loss without noise and ``1 - a`` parts of that under adversarial noise, a scalar."""
    calm = F.cross_entropy(neurons(x, factors), y)
    if eps == 0 or trade_off == 1:
        return calm
    noise = adversarial_noise(neurons, factors, x, y, eps=eps, generator=generator)
    return trade_off * calm + (1 - trade_off) * F.cross_entropy(noise.logits(neurons, factors, x), y)


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise on neurons: what is added to the factor of each weight and of each bias, site -> ``(channels,)``."""

    weight: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]

    def factors(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the factors of weights and of biases when this noise is added to given factors."""
        weight = {site: given[site] + noise for site, noise in self.weight.items()}
        return weight, {site: 1 + noise for site, noise in self.bias.items()}

    def logits(self, neurons: Neurons, given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the answers of a network whose neurons have these factors and this noise."""
        return neurons(x, *self.factors(given))


def adversarial_noise(
    neurons: Neurons, factors: Mapping[str, Tensor], x: Tensor, y: Tensor, *, eps: float, generator: torch.Generator
) -> Noise:
    """Draw noise uniform in [-eps, eps] and take one step of size ``eps`` that raises the loss on ``x`` (not projected)."""
    fixed = {site: factor.detach() for site, factor in factors.items()}
    noise = Noise(*({site: _uniform(factors[site], eps, generator) for site in sites} for sites in (factors, neurons.biased)))
    leaves = [*noise.weight.values(), *noise.bias.values()]
    slopes = torch.autograd.grad(F.cross_entropy(noise.logits(neurons, fixed, x), y), leaves)
    with torch.no_grad():
        for leaf, slope in zip(leaves, slopes, strict=True):
            leaf.add_(eps * slope.sign()).requires_grad_(False)
    return noise


def _uniform(like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator)
    return ((2 * drawn - 1) * eps).to(like).requires_grad_()
