"""The movement score: weights that fine-tuning drives away from 0 matter, those that it drives towards 0 do not.

Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020 (arXiv:2005.07683).
"""

from __future__ import annotations

import torch
from torch import nn

from ..data import passes
from ..errors import check_range
from ..types import Granularity, ImageSet, Scores
from .factors import Factors, add, differentiating, units


def movement(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    epochs: int = 3,
    lr: float = 0.02,
    batch_size: int = 64,
    generator: torch.Generator,
) -> Scores:
    """Score by movement while a copy is fine-tuned, ``S = -sum_t lr * g_t * w_t``, ``g_t = dL/dw`` at step ``t``.

    With plain SGD, which it is, each step moves ``w`` by ``-lr * g_t``: what moves away from 0 gains, what moves towards it
    loses.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: The weights of convolutions and linear layers; or channels, whose score sums over weight and bias of the
            site.
        epochs: Passes over the images, >= 1.
        lr: Learning rate, constant, > 0.
        batch_size: Images per step, >= 1.
        generator: Source of all randomness.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, cannot be traced (channels only), or the fine-tuning diverged.

    Differs from the authors' code, which learns scores and weights together under a mask that grows meanwhile, in that nothing
    is masked while the scores are summed: iterative schedules mask between such runs. No warm-up, decay or augmentation.
    """
    check_range("epochs", epochs, 1, 2**31)
    check_range("lr", lr, 1e-12, 1e6)
    factors = Factors(model, units(model, clean.shape, granularity), granularity)
    factors.network.train()
    everything = list(factors.network.parameters())
    total = factors.gather(factors.zeros())
    with differentiating(generator):
        for x, y in passes(clean, batch_size, epochs, device=factors.device, generator=generator):
            loss = factors.loss(x, y, len(clean.classes))
            slopes = torch.autograd.grad(loss, everything, allow_unused=True, materialize_grads=True)
            mine = {id(parameter): slope for parameter, slope in zip(everything, slopes, strict=True)}
            add(total, factors.fold({name: mine[id(own)] for name, own in factors.parameters.items()}), -lr)
            with torch.no_grad():
                for parameter, slope in zip(everything, slopes, strict=True):
                    parameter.sub_(slope, alpha=lr)
    return factors.scores(total)
