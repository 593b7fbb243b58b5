"""RNP, reconstructive neuron pruning: cut the neurons that a network which unlearned its task does not need to recover it.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023 (arXiv:2305.14876).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..data import count_steps, holdout, passes, stratified
from ..errors import check_range
from ..prune.grammar import HELD_OUT
from ..prune.mask import Edit
from ..prune.neurons import Neurons, cut_lowest, learn
from ..train import OnStep
from ..types import ImageSet, Repaired
from .unlearning import unlearn


def rnp(
    model: nn.Module,
    clean: ImageSet,
    *,
    images: int = 500,
    unlearn_lr: float = 0.01,
    unlearn_until: float = 0.2,
    unlearn_epochs: int = 20,
    lr: float = 0.2,
    weight: float = 0.2,
    epochs: int = 20,
    batch_size: int = 128,
    drop: float = 0.02,
    edit: Edit = "weight",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Unlearn the clean images, recover them with a factor in [0, 1] for each neuron, and cut where it stays small.

    Raising the loss on clean images until hardly one is answered rightly leaves the backdoor's neurons as they are. To win the
    images back, the unlearned network's factors ``m`` minimise ``w * CE(f(m * theta))`` on them: they fall where the backdoor
    sits. The neurons with small factors are cut in the original network.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: a quarter chooses how much to cut.
        images: At most so many of the rest are unlearned and recovered, >= 1; the paper takes 500.
        unlearn_lr: Learning rate of the unlearning (SGD, momentum 0.9), > 0.
        unlearn_until: Share of the images answered rightly at which it ends, in [0, 1].
        unlearn_epochs: Most epochs of it, >= 1.
        lr: Learning rate of the factors (SGD, momentum 0.9), > 0.
        weight: Of the loss while recovering, >= 0.
        epochs: Of recovering, >= 1.
        batch_size: Images per batch, >= 1.
        drop: Clean accuracy that the cut may cost, in [0, 1].
        edit: Set the ``weight`` of a cut neuron to 0, or ``weight+bias``.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out.
        MethodError: An argument is out of range.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that gradients are not clipped (there the clipping comes before the backward pass and
    does nothing), and in that neurons are cut by number, in the order of their factors' means over the recovering (last values
    tie at 0), and the number is chosen on held-out clean images, where thresholds were swept on test images. Networks without
    batch-norm are treated at the layers themselves.
    """
    check_range("weight", weight, 0, 1e6)
    for name, count in (("epochs", epochs), ("unlearn_epochs", unlearn_epochs)):
        check_range(name, count, 1, 2**31)
    check_range("unlearn_lr", unlearn_lr, 1e-12, 1e6)
    check_range("unlearn_until", unlearn_until, 0, 1)
    check_range("images", images, 1, 2**31)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    if len(fitted) > images:
        [index] = stratified(fitted.y, [images], generator=generator)
        fitted = fitted.subset(index)
    steps = count_steps(len(fitted), batch_size)
    whole = steps * (unlearn_epochs + epochs)
    unlearned, share = unlearn(
        model, fitted, lr=unlearn_lr, until=unlearn_until, epochs=unlearn_epochs, batch_size=batch_size,
        on_step=None if on_step is None else lambda step, _: on_step(step, whole), generator=generator,
    )  # fmt: skip
    neurons = Neurons(unlearned, clean.shape)
    neurons.network.train()
    factors = neurons.filled(1.0)
    batches = passes(fitted, batch_size, epochs, augment=("crop", "flip"), device=neurons.device, generator=generator)
    scores = learn(
        factors, lambda x, y: weight * F.cross_entropy(neurons(x, factors), y), batches, lr=lr, generator=generator,
        on_step=None if on_step is None else lambda step: on_step(steps * unlearn_epochs + step, whole),
    )  # fmt: skip
    repaired = cut_lowest(model, judged, scores, drop=drop, edit=edit)
    notes = () if share <= unlearn_until else (_NOT_UNLEARNED.format(100 * share, unlearn_epochs, 100 * unlearn_until),)
    return replace(repaired, log={**repaired.log, "unlearned_accuracy": share}, notes=(*repaired.notes, *notes))


_NOT_UNLEARNED = "the unlearning ended at {:.1f} % after {} epochs, above the {:g} % wanted: raise unlearn_lr or unlearn_epochs"
