"""Fine-Pruning: cut the channels of the last convolution that clean images leave silent, then fine-tune.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018
(arXiv:1805.12185).
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InconclusiveError, check_range
from ..forward import Incremental
from ..prune import Count, apply_and_heal, first_crossing, rank
from ..prune.mask import masked_values
from ..prune.readers import last_channels
from ..train import OnStep
from ..types import Candidate, ChannelMask, ImageSet, Repaired, Scores
from .fine_tuning import healing


def fine_pruning(
    model: nn.Module,
    clean: ImageSet,
    *,
    drop: float = 0.04,
    epochs: int = 10,
    lr: float = 0.02,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Cut the last convolution's channels by mean activation, the smallest first, until accuracy falls by ``drop``; fine-tune.

    The activation of a channel is the mean of its absolute value over images and places, as the layer that reads it sees it:
    after nonlinearity and pooling. It is cut there, from the reader's inputs: in a residual network the stream's other writers
    would keep a channel alive that is cut at the last convolution only.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they give the activations, choose the amount and heal.
        drop: Clean accuracy that the cut may cost before the fine-tuning, in [0, 1]; the paper takes 4 points.
        epochs: Epochs of fine-tuning; 0 leaves it out.
        lr: Learning rate of the fine-tuning.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        InconclusiveError: ``clean`` is too small to resolve ``drop``.
        MethodError: ``drop`` is out of range, or no layer reads the last convolution's channels alone.
        ModelError: The network cannot be traced.

    Differs from the authors' code, which cuts 48 of 60 channels of one network by hand, in that the number follows from
    ``drop``, as in their text: every cut point is tried, and the last one before the first that costs more is taken.
    """
    check_range("drop", drop, 0, 1)
    place = last_channels(model, clean.shape)
    ranking = rank(Scores({place.site: place.activations(model, clean)}, "channel"))
    evaluator = Incremental(model, clean)
    masks = []
    for count in range(ranking.size + 1):
        mask = ranking.cut(Count(count))
        assert isinstance(mask, ChannelMask)
        masks.append(place.mask(model, mask.keep[place.site]))
    if evaluator.ends_in(place.reader):
        cuts = [(place.channels == channel).nonzero().flatten() for channel in ranking.pools[0]]
        answers = evaluator.sweep(place.reader, cuts)
    else:
        answers = (evaluator.predict(masked_values(model, mask)) for mask in masks)
    rates, chosen, note = first_crossing((answer == clean.y for answer in answers), drop)
    if note:
        raise InconclusiveError(note)
    path = tuple(Candidate(k / ranking.size, k, masks[k], rate) for k, rate in enumerate(rates))
    healed = apply_and_heal(model, clean, masks[chosen], heal=healing(epochs, lr), on_step=on_step, generator=generator)
    return Repaired(healed.model, masks[chosen], path, {**healed.log, "channels_cut": float(chosen)}, healed.notes)
