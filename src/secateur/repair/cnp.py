"""CNP, contrastive neuron pruning: cut the neurons by which a reversed trigger sets images apart from clean ones.

Feng, Ma, Liu, Zhang, Cai, Xia, "Contrastive Neuron Pruning for Backdoor Defense", IEEE Transactions on Image Processing 34,
2025 (doi:10.1109/TIP.2025.3539466).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import holdout, sample
from ..detect import invert
from ..errors import MethodError, check_range
from ..prune.grammar import HELD_OUT
from ..prune.mask import Edit
from ..prune.neurons import Neurons, cut_lowest, learn
from ..train import OnStep
from ..types import ImageSet, Repaired, Trigger
from .anp import adversarial_noise


def cnp(
    model: nn.Module,
    clean: ImageSet,
    *,
    eps: float = 0.4,
    temperature: float = 0.3,
    inversion_steps: int = 200,
    iterations: int = 1200,
    lr: float = 0.2,
    batch_size: int = 128,
    drop: float = 0.02,
    edit: Edit = "weight",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a factor for each neuron that draws images with a reversed trigger to clean ones in feature space; cut by it.

    The target is the class that gains most answers when the neurons are perturbed against the network (as in ANP), and a patch
    is inverted for it. With ``c`` clean and ``p`` triggered features (what the last layer reads), of the network with factors,
    with factors and noise ``n``, or the original ``o``, the loss is the mean over the positive pairs ``(c, o_c)``,
    ``(p, o_c)``, ``(n_c, o_c)`` of ``-log softmax`` of their cosines over ``temperature``, against the negative pairs
    ``(n_c, o_p)``, ``(c, o_p)``, ``(p, o_p)``.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Clean images; the network's own answers stand for their labels but for a quarter, which chooses how much to cut.
        eps: Size of the noise on neurons, relative to each weight and bias, >= 0.
        temperature: Of the softmax, > 0.
        inversion_steps: Batches of the inversion, >= 1.
        iterations: Batches that learn the factors, >= 1.
        lr: Learning rate of the factors (SGD with momentum 0.9), > 0.
        batch_size: Images per batch, >= 1.
        drop: Clean accuracy that the cut may cost, in [0, 1].
        edit: Set the ``weight`` of a cut neuron to 0, or ``weight+bias``.
        on_step: Progress of the factors.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out.
        MethodError: An argument is out of range, or the network does not end in a linear layer.
        ModelError: The network cannot be traced.

    Differs from the authors' code in the inversion (see `secateur.detect.invert`), in a constant learning rate (theirs falls by
    accuracy on triggered images), and in that the number of neurons to cut is chosen on held-out clean images and not at
    most 5 % by the user.
    """
    check_range("eps", eps, 0, 1e6)
    check_range("temperature", temperature, 1e-6, 1e6)
    check_range("iterations", iterations, 1, 2**31)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    neurons = Neurons(model, clean.shape)
    features = Features(neurons)
    ones, factors = neurons.filled(1.0), neurons.filled(1.0)
    target = gaining_class(neurons, fitted, eps=eps, generator=generator)
    [found] = invert(model, fitted, [target], kind="patch", steps=inversion_steps, generator=generator)
    neurons.network.train()

    def loss(x: Tensor, _: Tensor) -> Tensor:
        return contrast(features, ones, factors, x, found.trigger, eps=eps, temperature=temperature, generator=generator)

    batches = sample(fitted, batch_size, iterations, augment=("flip",), device=neurons.device, generator=generator)
    watch = None if on_step is None else lambda step: on_step(step, iterations)
    scores = learn(factors, loss, batches, lr=lr, on_step=watch, generator=generator)
    repaired = cut_lowest(model, judged, scores, drop=drop, edit=edit)
    log = {**repaired.log, "suspect": float(target), "inverted_success": found.success.value}
    return replace(repaired, log=log)


class Features:
    """What the last layer of a network reads, beside its answers."""

    def __init__(self, neurons: Neurons) -> None:
        """Look on from now on; the copy that ``neurons`` holds gets a hook.

        Raises:
            MethodError: The network does not end in a linear layer.
        """
        self.neurons = neurons
        self._seen: list[Tensor] = []
        [last] = neurons.answering or [neurons.network]
        if not isinstance(last, nn.Linear):
            raise MethodError(f"cnp compares what a last linear layer reads; this network ends in {type(last).__name__}")
        last.register_forward_pre_hook(lambda _, given: self._seen.append(given[0].flatten(1)))

    def __call__(self, x: Tensor, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the features of images, ``(b, features)``, under factors."""
        self._seen.clear()
        self.neurons(x, weight, bias)
        return self._seen.pop()


def gaining_class(neurons: Neurons, images: ImageSet, *, eps: float, generator: torch.Generator) -> int:
    """Return the class that gains most answers when noise on the neurons (see `secateur.repair.anp`) drives them away."""
    ones = neurons.filled(1.0)
    neurons.network.eval()
    gained = torch.zeros(len(images.classes))
    for x, _ in images.batches(128):
        x = x.to(neurons.device)
        with torch.no_grad():
            own = neurons(x, ones).argmax(dim=1)
        noise = adversarial_noise(neurons, ones, x, own, eps=eps, generator=generator)
        with torch.no_grad():
            driven = noise.logits(neurons, ones, x).argmax(dim=1)
        for answers, sign in ((driven, 1), (own, -1)):
            gained += sign * answers.cpu().bincount(minlength=len(gained))[: len(gained)]
    return int(gained.argmax())


def contrast(
    features: Features,
    ones: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    x: Tensor,
    trigger: Trigger,
    *,
    eps: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the contrastive loss of factors on a batch of clean images, a scalar (see `cnp`)."""
    shown = trigger.apply(x)
    with torch.no_grad():
        own = features.neurons(x, factors).argmax(dim=1)
        clean, poisoned = features(x, ones), features(shown, ones)
    noise = adversarial_noise(features.neurons, factors, x, own, eps=eps, generator=generator)
    weight, bias = noise.factors(factors)
    driven, calm, triggered = features(x, weight, bias), features(x, factors), features(shown, factors)
    pairs = ((calm, clean), (triggered, clean), (driven, clean), (driven, poisoned), (calm, poisoned), (triggered, poisoned))
    cosines = torch.stack([F.cosine_similarity(one, other, dim=1) for one, other in pairs], dim=1)
    return -(cosines / temperature).log_softmax(dim=1)[:, :3].mean()
