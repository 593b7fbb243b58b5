"""Compressors that cut single weights: by any score, or as GAP does, and round what is left if asked.

Whole-model compression as in O'Brien Weiss, Alves, Kundu, IEEE AICAS 2022 (arXiv:2206.07406): all parameters over those
that are left; the classifier stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from ..errors import MethodError, check_choice, check_range
from ..models import Classifier, core, quantisation_of
from ..models.flow import trace
from ..prune import Compression, Sentence, activity, gradients, magnitude, movement, prunable_layers, prune_in_rounds
from ..prune import gap as gaps
from ..prune.grammar import Score
from ..prune.mask import SEEN, compression, hard, joined, zeros
from ..prune.schedule import Pace
from ..prune.select import Order, Scope
from ..recipe import Recipe
from ..train import OnStep, check_trainable
from ..types import Granularity, ImageSet, Repaired, Scores
from .quantise import Observer, qat, quantise

Precision = Literal["float32", "bfloat16"]
SCORES: Mapping[str, Score] = {
    "activation": activity.activation,
    "gradient": gradients.gradient,
    "gradient-weight": gradients.gradient_weight,
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "movement": movement.movement,
    "obd": gradients.obd,
    "random": magnitude.random,
    "snip": gradients.snip,
    "taylor": gradients.taylor,
}
FLOAT = 32
CALIBRATED = 512  # clean images that tell the ranges of feature maps


def pruning(
    model: nn.Module,
    clean: ImageSet,
    *,
    target: float = 4.0,
    score: str = "l1",
    scope: Scope = "global",
    order: Order = "smallest",
    rounds: int = 1,
    pace: Pace = "geometric",
    images: int = 1024,
    epochs: int = 10,
    lr: float = 0.01,
    precision: Precision = "float32",
    bits: int = 32,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Cut single weights until the whole network has ``1 / target`` of its parameters left, then fine-tune with the zeros held.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they score (where the score reads images), heal, and tell the ranges of feature maps.
        target: All parameters over those left, >= 1. Only weights before the classifier can go.
        score: What ranks the weights: ``activation``, ``gradient``, ``gradient-weight``, ``l1``, ``l2``, ``movement``, ``obd``,
            ``random``, ``snip`` or ``taylor`` (``secateur list scores``), with their defaults.
        scope: One ranking per ``layer``, or one ``global``.
        order: Cut the ``smallest`` or the ``largest`` first.
        rounds: Cuts, with a fine-tuning after each, >= 1.
        pace: How much each round cuts: ``geometric``, ``cubic`` or ``linear``.
        images: Clean images that the score sees in each round, drawn anew, >= 1.
        epochs: Of fine-tuning after each round, >= 0.
        lr: Its learning rate, > 0, constant.
        precision: Of the fine-tuning.
        bits: Of weights and feature maps afterwards (see `quantise`), in [2, 8]; 32 leaves them in floating point.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range, or so much cannot be cut.
        ModelError: The network cannot be quantised, or the score cannot read it.
    """
    check_choice("score", score, SCORES)
    total = sum(parameter.numel() for parameter in core(model).parameters())
    body = prunable_layers(model)[:-1]
    if not body:
        raise MethodError("the network has no layer before the classifier to prune")
    sentence = Sentence(SCORES[score], Compression(target, total), layers=body, scope=scope, order=order)
    heal = recovery(epochs, lr, precision)
    return compressed(
        model, clean, sentence, heal, rounds=rounds, pace=pace, images=images, bits=bits, on_step=on_step, generator=generator
    )


def gap(
    model: nn.Module,
    clean: ImageSet,
    *,
    target: float = 4.0,
    variant: gaps.Variant = "signed",
    protocol: gaps.Protocol = "corrected",
    eps: float = 0.03137254901960784,
    steps: int = 10,
    step_size: float = 0.00784313725490196,
    rounds: int = 1,
    pace: Pace = "geometric",
    images: int = 1024,
    epochs: int = 40,
    lr: float = 0.001,
    precision: Precision = "float32",
    bits: int = 32,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Cut the weights and biases with the *largest* gradient on adversarial images, then fine-tune with the zeros held.

    Greedy Adversarial Pruning, whose authors say that it hardens a network against attacks made on the one before. See
    ``docs/compression.md``.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they are attacked, heal, and tell the ranges of feature maps.
        target: All parameters over those left, >= 1; the classifier stays whole.
        variant: ``signed`` and ``weighted`` rank globally, ``absolute`` within each layer (see `prune.gap`).
        protocol: ``corrected``, or ``published`` with the faults of the authors' code.
        eps: Budget of the attack (Linf), in [0, 1].
        steps: Steps of the attack, >= 1.
        step_size: Length of a step, >= 0.
        rounds: Cuts, with a fine-tuning after each, >= 1; 1 in the paper.
        pace: How much each round cuts: ``geometric``, ``cubic`` or ``linear``.
        images: Clean images that are attacked in each round, drawn anew, >= 1.
        epochs: Of fine-tuning after each round, >= 0; 40 in the paper.
        lr: Its learning rate, > 0, constant.
        precision: Of the fine-tuning.
        bits: Of weights and feature maps afterwards, in [2, 8]; 32 leaves them in floating point.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range, or so much cannot be cut.
        ModelError: The network cannot be attacked or quantised.
    """
    total = sum(parameter.numel() for parameter in core(model).parameters())
    score = partial(gaps.gap, variant=variant, protocol=protocol, eps=eps, steps=steps, step_size=step_size)
    scope: Scope = "layer" if variant == "absolute" else "global"
    sentence = Sentence(score, Compression(target, total), layers=prunable_layers(model), scope=scope, order="largest")
    heal = recovery(epochs, lr, precision)
    return compressed(
        model, clean, sentence, heal, rounds=rounds, pace=pace, images=images, bits=bits, on_step=on_step, generator=generator
    )


def quantisation(
    model: nn.Module,
    clean: ImageSet,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    observer: Observer = "minmax",
    percentile: float = 99.99,
    epochs: int = 0,
    lr: float = 0.001,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Round weights and feature maps to few bits, and train the rounded network if asked.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: up to 512 tell the ranges of feature maps, all train.
        bits: Of feature maps, and of weights unless ``weight_bits`` says otherwise; in [2, 8].
        weight_bits: Of weights, in [2, 8].
        observer: ``minmax`` or ``percentile``.
        percentile: Of values within the range, in [50, 100].
        epochs: Of training as a rounded network (QAT), >= 0; 0 rounds only (PTQ). What is 0 already stays 0.
        lr: Its learning rate, > 0, constant.
        on_step: Progress of the training.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range.
        ModelError: The network cannot be quantised.

    Source: Jacob et al., CVPR 2018 (arXiv:1712.05877); see `quantise` and `qat`.
    """
    network, seen = _classifier(model), _drawn(clean, CALIBRATED, generator)
    if epochs == 0:
        return Repaired(
            quantise(network, seen, bits=bits, weight_bits=weight_bits, observer=observer, percentile=percentile), None
        )
    done = qat(
        network, clean, recovery(epochs, lr), calibration=seen, bits=bits, weight_bits=weight_bits, observer=observer,
        percentile=percentile, mask=zeros(network), on_step=on_step, generator=generator,
    )  # fmt: skip
    return Repaired(done, None)


def recovery(epochs: int, lr: float, precision: Precision = "float32") -> Recipe:
    """Return the recipe of the fine-tuning: GAP's, SGD at a constant rate."""
    return Recipe(epochs=epochs, lr=lr, schedule="constant", weight_decay=1e-4, augment=("crop", "flip"), precision=precision)


def compressed(
    model: nn.Module,
    clean: ImageSet,
    sentence: Sentence,
    heal: Recipe,
    *,
    rounds: int = 1,
    pace: Pace = "geometric",
    images: int,
    bits: int,
    on_step: OnStep | None,
    generator: torch.Generator,
) -> Repaired:
    """Cut what a sentence says in rounds, fine-tune after each, and round what is left if asked: what compressors share.

    Args:
        model: The network; not changed.
        clean: The clean images.
        sentence: What to cut.
        heal: Of the fine-tuning; none where it has no epochs.
        rounds: See `prune_in_rounds`.
        pace: Likewise.
        images: Clean images that the score sees in each round.
        bits: See `pruning`.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    What is 0 already was cut before: it stays 0, goes first and counts.

    Raises:
        MethodError: An argument is out of range, or so much cannot be cut.
        ModelError: The network cannot be quantised.
    """
    check_range("images", images, 1, 2**31)
    if heal.epochs:
        check_trainable(model)
    if bits != FLOAT:
        if not 2 <= bits <= 8:
            raise MethodError(f"bits must lie in [2, 8], or be {FLOAT} for floating point, got {bits}")
        if quantisation_of(_classifier(model)) is not None:
            raise MethodError("the network is quantised already; take that off first (models.dequantised)")
        trace(_classifier(model).net, clean.shape)  # refuses now what would be refused after minutes
    before = zeros(model)
    assert isinstance(sentence.amount, Compression)
    check_targets(model, [sentence.amount.compression])
    few = replace(sentence, score=_seeing(sentence.score, images))
    done = prune_in_rounds(
        model, clean, few, rounds=rounds, pace=pace, heal=heal if heal.epochs else None, on_step=on_step, generator=generator
    )
    mask = joined(model, hard(done.mask), before)
    done = replace(done, mask=mask, log={**done.log, "compression": compression(model, mask)})
    if bits == FLOAT:
        return done
    return replace(done, model=quantise(_classifier(done.model), _drawn(clean, CALIBRATED, generator), bits=bits))


def check_targets(model: nn.Module, targets: Iterable[float]) -> None:
    """Raise `MethodError` unless each target is more than what was cut before; a few stray zeros do not count."""
    already = compression(model, zeros(model))
    for target in targets:
        if target <= already >= SEEN:
            raise MethodError(f"target must be above {already:.4g}, which the network has already, got {target:g}")


def _seeing(score: Score, images: int) -> Score:
    """Return a score that sees some of the clean images only."""

    def few(model: nn.Module, clean: ImageSet, *, granularity: Granularity, generator: torch.Generator) -> Scores:
        return score(model, _drawn(clean, images, generator), granularity=granularity, generator=generator)

    return few


def _classifier(model: nn.Module) -> Classifier:
    if not isinstance(model, Classifier):
        raise MethodError("quantisation needs a Classifier, which says how images are normalised: secateur.load makes one")
    return model


def _drawn(clean: ImageSet, count: int, generator: torch.Generator) -> ImageSet:
    return clean.subset(torch.randperm(len(clean), generator=generator)[:count])
