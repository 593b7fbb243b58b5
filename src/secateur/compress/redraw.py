"""A compressor of ours against transfer attacks: cut most of the early layers at random, the rest by size, and fine-tune."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from ..errors import MethodError, check_range
from ..models import core
from ..prune import Compression, Sentence, choose_layers, prunable_layers
from ..prune.mask import removed, zeros
from ..train import OnStep
from ..types import Granularity, ImageSet, Repaired, Scores
from .pruning import Precision, compressed, recovery


def redraw(
    model: nn.Module,
    clean: ImageSet,
    *,
    target: float = 2.0,
    layers: str = "early",
    share: float = 0.9,
    epochs: int = 10,
    lr: float = 0.01,
    precision: Precision = "float32",
    bits: int = 32,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Cut a random ``share`` of the early layers' weights and, elsewhere, the smallest; fine-tune with the zeros held.

    Adversarial images made on a network fool what was made of it as long as both read an image alike. What reads it are the
    early layers, which hold few of the weights and learn again within an epoch or two; drawn anew by chance, they look at other
    things than those of the network before, and of a copy that was made in the same way. The later layers keep what they
    know. The seed is a secret: who has it and the clean images can make the same network. Random pruning of *all* layers costs
    more accuracy for less (``docs/compression.md``). Nothing here makes the network itself harder to attack for who has it.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they heal, and tell the ranges of feature maps.
        target: All parameters over those left, >= 1; the classifier stays whole.
        layers: Which to draw anew: a place or names (see `prune.choose_layers`).
        share: Of the weights of each of them, in [0, 1); what is left is at least one. Those cut before are among them.
        epochs: Of fine-tuning, >= 0. Without it the network is of no use.
        lr: Its learning rate, > 0, constant.
        precision: Of the fine-tuning.
        bits: Of weights and feature maps afterwards (see `quantise`), in [2, 8]; 32 leaves them in floating point.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range, so much cannot be cut, or the target leaves more than is cut at random.
        ModelError: The network cannot be quantised.

    Source: ours. Masks drawn at random for shallow layers *before* training: Luo et al., arXiv:2007.14249.
    """
    check_range("share", share, 0, 1 - 1e-9)
    check_range("target", target, 1, 1e9)
    body, weights = prunable_layers(model)[:-1], dict(core(model).named_parameters())
    early = [name for name in body if name in choose_layers(model, layers)]
    if not early:
        raise MethodError(f"layers='{layers}' are none before the classifier, which stays whole; name others")
    drawn = {name: math.floor(share * weights[f"{name}.weight"].numel()) for name in early}
    total = sum(parameter.numel() for parameter in core(model).parameters())
    wanted, gone = total - round(total / target), removed(zeros(model))
    already = sum(count for name, count in gone.items() if name.removesuffix(".weight") not in drawn)
    chance = sum(max(count, gone.get(f"{name}.weight", 0)) for name, count in drawn.items())
    if chance + already > wanted:
        cut_before = f" and {already:,} weights of others were cut before" if already else ""
        raise MethodError(
            f"share={share:g} of the layers drawn anew is {chance:,} weights{cut_before}, and target={target:g} "
            f"cuts {wanted:,} in all; raise target or lower share"
        )
    sentence = Sentence(partial(_anew, drawn=drawn), Compression(target, total), layers=body, scope="global", order="smallest")
    return compressed(
        model, clean, sentence, recovery(epochs, lr, precision), images=1, bits=bits, on_step=on_step, generator=generator
    )


def _anew(
    model: nn.Module, clean: ImageSet, *, drawn: Mapping[str, int], granularity: Granularity, generator: torch.Generator
) -> Scores:
    """Score by size, but so many weights of some layers, drawn at random, below all others, and the rest of those above.

    Weights that are 0 were cut before, and are drawn first.
    """
    weights = dict(core(model).named_parameters())
    sizes = {name: weights[f"{name}.weight"].detach().abs() for name in prunable_layers(model)}
    above = 1 + max(float(size.max()) for size in sizes.values())
    for name, count in drawn.items():
        order = torch.randperm(sizes[name].numel(), generator=generator).to(sizes[name].device)
        chosen = order[sizes[name].flatten()[order].bool().sort(stable=True).indices][:count]
        sizes[name] = (sizes[name] + above).flatten().index_fill(0, chosen, -1.0).reshape(sizes[name].shape)
    return Scores({f"{name}.weight": size for name, size in sizes.items()}, granularity)
