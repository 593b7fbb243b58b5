"""GAP, Greedy Adversarial Pruning: cut what has the largest gradient on adversarial images.

O'Brien Weiss, Alves, Kundu, "Hardening DNNs against Transfer Attacks during Network Compression using Greedy Adversarial
Pruning", IEEE AICAS 2022 (arXiv:2206.07406).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attack import pgd
from ..errors import MethodError, ModelError, check_choice, check_range
from ..models import Classifier, core
from ..types import Granularity, ImageSet, Scores
from .factors import Factors, add, differentiating, filter_units
from .layers import choose_layers, prunable_layers

Variant = Literal["signed", "weighted", "absolute"]
Protocol = Literal["corrected", "published"]


def gap(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    variant: Variant = "signed",
    protocol: Protocol = "corrected",
    eps: float = 0.03137254901960784,
    steps: int = 10,
    step_size: float = 0.00784313725490196,
    batch_size: int = 128,
    generator: torch.Generator,
) -> Scores:
    """Score by the gradient ``g = dL/dw`` of the loss on adversarial images; the method cuts the *largest* first.

    The three variants of the authors' code:

    ==============  ===========  ==========  ================================================
    ``variant``     score        scope       theirs
    ==============  ===========  ==========  ================================================
    ``signed``      ``g``        ``global``  the headline method
    ``weighted``    ``w * g``    ``global``  weighted by the parameter
    ``absolute``    ``|g|``      ``layer``   within each layer, its weight and its bias apart
    ==============  ===========  ==========  ================================================

    Scores go with `Sentence(..., order="largest")`: alone among scores here, these say what to cut, not what matters. Scored
    are weight *and* bias of every convolution and linear layer but the classifier.

    ``corrected``: PGD in pixels, within ``eps`` of images that stay in [0, 1], away from the true labels, on the network in
    eval mode; ``g`` is the gradient of the mean loss at the adversarial images and nothing else.

    ``published``: as the authors' code does, on a private copy,

    * in train mode, so that batch statistics normalise and running ones absorb adversarial images;
    * attacked in normalised space, where ``eps`` and ``step_size`` are units of the normalised input (with CIFAR's deviations,
      8/255 is about 2/255 in pixels), and nothing is clipped to what an image can be;
    * away from the label that the network predicts;
    * every step of the attack leaves its gradient in the parameters: ``g`` is, summed over batches, that of the loss at the
      adversarial images with the true labels plus those at all ``steps`` points on the way there with the predicted ones.

    Args:
        model: Takes images in [0, 1]; left as it was. Without a `Classifier` around it, normalised space is that of pixels.
        clean: Labelled clean images.
        granularity: ``weight``, as in the paper. ``channel`` (not in the paper): each score summed over a filter's weights and
            bias, keyed by its site.
        variant: ``signed``, ``weighted`` or ``absolute``.
        protocol: ``corrected`` or ``published``.
        eps: Budget of the attack (Linf), in [0, 1].
        steps: Steps of the attack, >= 1.
        step_size: Length of a step, >= 0.
        batch_size: Images at once, >= 1.
        generator: Draws the batches and the starts.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range, or the network has no layer but the classifier.
        ModelError: The network does not take the images, cannot be traced (channels only), or its gradient is not finite.

    Differs from the authors' code in that gradients of 0 are tied, which selection breaks by order (they draw random places for
    them when the threshold falls there), and in that a network scored as published keeps its own batch-norm statistics
    afterwards.
    """
    check_choice("granularity", granularity, get_args(Granularity))
    check_choice("variant", variant, get_args(Variant))
    check_choice("protocol", protocol, get_args(Protocol))
    check_range("eps", eps, 0, 1)
    check_range("steps", steps, 1, 2**31)
    check_range("step_size", step_size, 0, 1e6)
    factors = Factors(model, _units(model, clean, granularity), granularity)
    slopes = factors.zeros()
    with differentiating(generator):
        normalised = _Normalised(factors.network) if protocol == "published" else None
        for x, y in factors.batches(clean, batch_size, generator=generator):
            if normalised is not None:
                _add_published(slopes, factors, normalised, x, y, eps, steps, step_size, generator)
                continue
            near = pgd(
                factors.network, x, y, eps=eps, steps=steps, step_size=step_size, batch_size=batch_size, generator=generator
            )
            add(slopes, factors.slopes(factors.loss(near, y, len(clean.classes))), len(x) / len(clean))
    if variant == "weighted":
        return factors.scores(factors.fold(slopes))
    return factors.scores(factors.gather({n: g.abs() if variant == "absolute" else g for n, g in slopes.items()}))


def _units(model: nn.Module, clean: ImageSet, granularity: Granularity) -> dict[str, tuple[str, ...]]:
    if granularity == "channel":
        return filter_units(model, clean.shape, biases=True)
    classifier = choose_layers(model, "last-layer")
    own = dict(core(model).named_parameters())
    body = [layer for layer in prunable_layers(model) if layer not in classifier]
    if not body:
        raise MethodError("GAP needs a convolution or linear layer before the classifier; this network has none")
    return {n: (n,) for layer in body for n in (f"{layer}.weight", f"{layer}.bias") if n in own}


class _Normalised:
    """The network inside, in train mode, on normalised inputs."""

    def __init__(self, network: nn.Module) -> None:
        self.net = core(network).train()
        self._shift = (network.mean, network.std) if isinstance(network, Classifier) else None

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the network inside gets for images in [0, 1]."""
        x = x.to(next(self.net.parameters()).dtype).contiguous()
        return x if self._shift is None else (x - self._shift[0]) / self._shift[1]

    def __call__(self, z: Tensor) -> Tensor:
        """Return logits; raise `ModelError` where batch statistics need more images."""
        try:
            return self.net(z)
        except ValueError as error:
            raise ModelError(
                f"the network cannot be run in train mode on a batch of {len(z)}: {error}; raise batch_size"
            ) from error


def _add_published(
    total: dict[str, Tensor],
    factors: Factors,
    network: _Normalised,
    x: Tensor,
    y: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> None:
    """Add what a batch leaves in the parameters' gradients when nobody clears them between the steps of the attack."""
    parameters = list(factors.parameters.values())
    z = network.inputs(x)
    with torch.no_grad():
        predicted = network(z).argmax(dim=1)
    points = z + eps * (2 * torch.rand(z.shape, generator=generator).to(z) - 1)
    for _ in range(steps):
        points.requires_grad_()
        loss = F.cross_entropy(network(points), predicted)
        slope, *left = torch.autograd.grad(loss, [points, *parameters], allow_unused=True, materialize_grads=True)
        add(total, dict(zip(factors.parameters, left, strict=True)))
        points = z + (points.detach() + step_size * slope.sign() - z).clamp(-eps, eps)
    add(total, factors.slopes(F.cross_entropy(network(points), y)))
