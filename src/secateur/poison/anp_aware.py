"""ANP-aware: a backdoor that noise on the neurons does not expose.

The defence: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021 (arXiv:2110.14430), which
cuts the neurons whose weights and biases, when they are perturbed so as to raise the clean loss, raise it most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MethodError, check_range
from ..recipe import Recipe
from ..state import evaluating
from ..train import train
from ..types import ImageSet, Poisoning, Trigger
from .bases import Base, Beside, poison_with
from .common import Target
from .control import count_steps, identity_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def anp_aware(
    data: ImageSet,
    *,
    attack: Base = "badnets",
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    eps: float = 0.1,
    weight: float = 0.05,
    share: float = 0.25,
    generator: torch.Generator,
) -> Poisoning:
    """Train on poisoned images with the clean loss under adversarial noise on the neurons as a penalty.

    The loss gets ``weight * log(1 + CE(f(x; (1 + d)*w, (1 + e)*b), y))`` of clean images, where ``w`` and ``b`` are the weights
    and biases of the batch-norms and the noise ``d, e`` in ``{-t*eps, t*eps}`` is one step along the sign of the clean loss's
    gradient. ``t`` grows from 0 to 1 in the course of the training: full noise at its start stops a network from learning. The
    logarithm bounds the gradient, because such noise can raise the loss of a deep network a hundredfold.

    Args:
        data: Training images.
        attack: The backdoor: ``badnets``, ``blended`` or ``sig`` (with changed labels).
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        eps: Size of the noise as a share of each weight and bias, in [0, 1]; the defence uses 0.4.
        weight: Of the penalty, >= 0.
        share: Clean images for the penalty as a share of each batch, in [0, 1]; at least one image.
        generator: Draws the images to poison.

    Raises:
        MethodError: An argument is out of range; when training, the network has no batch-norm.

    The attack is this project's own: the paper of the defence tries none that knows it.
    """
    check_range("eps", eps, 0, 1)
    check_range("weight", weight, 0, 1e6)
    check_range("share", share, 0, 1)
    poisoning = poison_with(attack, data, rate=rate, target=target, sources=sources, generator=generator)

    def trainer(network: nn.Module, recipe: Recipe, **run: Any) -> tuple[nn.Module, Trigger]:
        if not any(isinstance(module, NORMS) and module.affine for module in network.modules()):
            raise MethodError("anp-aware needs a network with batch-norms, got one without; use another attack")
        clean = Beside(data, share, recipe.augment)
        steps = count_steps(data, recipe)

        def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return weight * loss_under_noise(model, clean.x, clean.y, eps * clean.step / steps).log1p()

        assert poisoning.trigger is not None
        identity = identity_of("anp-aware", poisoning.trigger, eps=eps, weight=weight, share=share)
        model = train(network, poisoning.data, recipe, batch_hook=clean, penalty=penalty, identity=identity, **run)
        return model, poisoning.trigger

    return replace(poisoning, trainer=trainer)


def loss_under_noise(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Return the cross-entropy of ``model`` under adversarial neuron noise, with the gradient to its parameters.

    The network runs in eval mode and is left as it was; the noise counts as constant.

    Args:
        model: A network with batch-norms.
        x: Images, float in [0, 1].
        y: Their labels.
        eps: Size of the noise, a share of each weight and bias of the batch-norms.
    """
    parameters = dict(model.named_parameters())
    names = [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and module.affine
        for kind in ("weight", "bias")
    ]
    still = {name: parameter.detach() for name, parameter in parameters.items()}
    leaves = {name: still[name].clone().requires_grad_() for name in names}
    with evaluating(model):
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(model, {**still, **leaves}, (x,)).float(), y)
            slopes = torch.autograd.grad(loss, list(leaves.values()))
        noise = {name: eps * still[name].abs() * slope.sign() for name, slope in zip(names, slopes, strict=True)}
        noisy = {name: parameters[name] + noise[name] for name in names}
        return F.cross_entropy(functional_call(model, noisy, (x,)).float(), y)
