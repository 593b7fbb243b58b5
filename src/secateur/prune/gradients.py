"""Scores from gradients on clean images: what the loss loses, in first or second order, when a weight or a channel goes.

All but `gradient` speak of ``dL/da``, the derivative of the loss in a factor ``a = 1`` on a weight or channel: ``w * dL/dw``,
summed, for a channel, over the weight and bias of its site (see `factors`), which are what its mask sets to 0.
Larger = more important; the smallest go first. Images are shown in eval mode, with their true labels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..data import sample
from ..errors import check_choice, check_range
from ..types import Granularity, ImageSet, Scores
from .factors import Factors, differentiating, filter_units, units

Curvature = Literal["fisher", "hutchinson"]
LEAST = 1e-30


def gradient(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    batch_size: int = 128,
    generator: torch.Generator,
) -> Scores:
    """Score by the size of the loss's gradient, ``|dL/dw|``; a filter by the sum over its weights.

    ``L`` is the mean cross-entropy over all of ``clean``; the absolute value is taken after the mean.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: ``weight``: the weights of convolutions and linear layers, no biases or norms. ``channel``: one score per
            filter, keyed by its site.
        batch_size: Images at once, >= 1; it changes nothing but rounding.
        generator: Source of all randomness (only networks that draw use any).

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, cannot be traced (channels only), or its gradient is not finite.
    """
    check_choice("granularity", granularity, get_args(Granularity))
    channels = granularity == "channel"
    chosen = filter_units(model, clean.shape, biases=False) if channels else units(model, clean.shape, granularity)
    factors = Factors(model, chosen, granularity)
    with differentiating(generator):
        slopes = factors.mean_slopes(clean, batch_size, generator=generator)
    return factors.scores(factors.gather({name: slope.abs() for name, slope in slopes.items()}))


def gradient_weight(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    batch_size: int = 128,
    generator: torch.Generator,
) -> Scores:
    """Score by gradient times weight, ``|dL/da| = |w * dL/dw|``: the loss lost when the weight goes, in first order.

    This is the gradient score that GAP (arXiv:2206.07406) is compared with. ``L`` is the mean cross-entropy over all of
    ``clean``; the absolute value is taken after the mean, so what images disagree about cancels (`taylor` takes squares
    before). Arguments and errors as in `gradient`.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: Weights, or channels: then ``|sum of w * dL/dw|`` over weight and bias of the site.
        batch_size: Images at once, >= 1; it changes nothing but rounding.
        generator: Source of all randomness (only networks that draw use any).

    Differs from the code of arXiv:2206.07406, which takes one batch, in train mode, and also scores biases, in these three.
    """
    factors = Factors(model, units(model, clean.shape, granularity), granularity)
    with differentiating(generator):
        slopes = factors.mean_slopes(clean, batch_size, generator=generator)
    return factors.scores({name: value.abs() for name, value in factors.fold(slopes).items()})


def snip(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    images: int = 128,
    generator: torch.Generator,
) -> Scores:
    """Score by connection sensitivity on one batch: the share of each factor's derivative, ``|dL/da_j| / sum_k |dL/da_k|``.

    Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019 (arXiv:1810.02340), (6).
    The ranking is that of `gradient_weight` on the same images; the paper prunes a network before it is trained.
    Arguments and errors as in `gradient`.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: Weights, as in the paper, or channels, whose factor is on weight and bias of the site.
        images: Size of the batch, >= 1; all images when there are fewer. The paper takes 100 to 128.
        generator: Draws the batch.

    Differs from the authors' code in that batch-norms are in eval mode: here networks are trained already.
    """
    check_range("images", images, 1, 2**31)
    factors = Factors(model, units(model, clean.shape, granularity), granularity)
    with differentiating(generator):
        [(x, y)] = sample(clean, images, 1, device=factors.device, generator=generator)
        found = factors.fold(factors.slopes(factors.loss(x, y, len(clean.classes))))
    sizes = {name: value.abs() for name, value in found.items()}
    total = sum(float(value.double().sum()) for value in sizes.values())
    return factors.scores({name: value / max(total, LEAST) for name, value in sizes.items()})


def taylor(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    batch_size: int = 32,
    generator: torch.Generator,
) -> Scores:
    """Score by the squared change of the loss in first order, ``(w * dL/dw)^2``, averaged over batches.

    Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019 (arXiv:1906.10771),
    (8) for weights; for channels its form on batch-norms, ``(gamma * dL/dgamma + beta * dL/dbeta)^2``. ``L`` is a batch's mean
    loss. Arguments and errors as in `gradient`.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: Weights or channels.
        batch_size: Images per batch, >= 1: the smaller, the less what images disagree about cancels.
        generator: Draws the batches.

    Differs from the authors' code in that it scores a network at rest, in eval mode, not over steps of training.
    """
    factors = Factors(model, units(model, clean.shape, granularity), granularity)
    total: dict[str, Tensor] = {}
    with differentiating(generator):
        for x, y in factors.batches(clean, batch_size, generator=generator):
            _add_squares(total, factors, x, y, len(x) / len(clean), len(clean.classes))
    return factors.scores(total)


def obd(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    curvature: Curvature = "fisher",
    images: int = 256,
    draws: int = 10,
    generator: torch.Generator,
) -> Scores:
    """Score by the loss lost in second order, ``h * w^2 / 2``, with ``h`` the diagonal of the Hessian (Optimal Brain Damage).

    LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989. A channel's is ``1/2 d^2L/da^2``, half the second derivative in its
    factor. Two estimates of the diagonal:

    * ``fisher``: the empirical Fisher, the mean over images of ``(dL_i/dw)^2`` with the true labels, as in Theis, Korshunova,
      Tejani, Huszar, arXiv:1801.05787. It needs one gradient per image, no second derivatives, and is never negative. It is the
      Hessian only near a minimum at which the network's probabilities are right. The default, because it is cheap and has no
      noise of its own.
    * ``hutchinson``: the Hessian itself, by ``E[v * Hv]`` over random signs ``v``. No bias; noise falls with ``draws``. It may
      be negative, where the loss bends down, and misses the bend of ReLU at 0.

    Arguments and errors as in `gradient`.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled clean images.
        granularity: Weights or channels.
        curvature: ``fisher`` or ``hutchinson``.
        images: How many of the images are used, >= 1; all when there are fewer.
        draws: Random vectors for ``hutchinson``, >= 1; each costs two backward passes over the images.
        generator: Draws images and vectors.

    Differs from the paper in that its backward pass for second derivatives, which drops some terms, is not used.
    """
    check_choice("curvature", curvature, get_args(Curvature))
    check_range("images", images, 1, 2**31)
    check_range("draws", draws, 1, 2**31)
    factors = Factors(model, units(model, clean.shape, granularity), granularity)
    total: dict[str, Tensor] = {}
    with differentiating(generator):
        [(xs, ys)] = sample(clean, images, 1, device=factors.device, generator=generator)
        if curvature == "fisher":
            for x, y in zip(xs.split(1), ys.split(1), strict=True):
                _add_squares(total, factors, x, y, 0.5 / len(xs), len(clean.classes))
        else:
            for x, y in zip(xs.split(128), ys.split(128), strict=True):
                loss = factors.loss(x, y, len(clean.classes))
                _add_bends(total, factors, loss, draws, 0.5 * len(x) / (draws * len(xs)), generator)
    return factors.scores(total)


def _add_squares(total: dict[str, Tensor], factors: Factors, x: Tensor, y: Tensor, share: float, classes: int) -> None:
    for name, value in factors.fold(factors.slopes(factors.loss(x, y, classes))).items():
        total[name] = value.square().mul_(share) + total.get(name, 0)


def _add_bends(
    total: dict[str, Tensor], factors: Factors, loss: Tensor, draws: int, share: float, draw: torch.Generator
) -> None:
    """Add a share of ``sum over draws of v * (d^2L/da^2 v)``, with random signs ``v``."""
    parameters = list(factors.parameters.values())
    slopes = factors.slopes(loss, graph=True)
    like = factors.gather(factors.zeros())
    for left in reversed(range(draws)):
        signs = {n: (2 * torch.randint(0, 2, v.shape, generator=draw) - 1).to(v) for n, v in like.items()}
        along = torch.stack([(slopes[name] * step).sum() for name, step in factors.spread(signs).items()]).sum()
        bends = torch.autograd.grad(along, parameters, retain_graph=left > 0, allow_unused=True, materialize_grads=True)
        for name, value in factors.fold(dict(zip(factors.parameters, bends, strict=True))).items():
            total[name] = share * signs[name] * value + total.get(name, 0)
