"""One sentence of the grammar of pruning: score, layers, scope, order, amount, edit, heal.

Every pruning method of the project is a call of `prune` with its own score and arguments, or a function that returns a mask for
`apply_and_heal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data import holdout
from ..errors import InconclusiveError, MethodError, check_range
from ..forward import Incremental
from ..measure import correct, paired_p, wilson
from ..models.channels import trace_channels
from ..train import OnStep, Recipe, train
from ..types import Candidate, Granularity, HardMask, ImageSet, Rate, Repaired, Scores, WeightMask
from . import magnitude
from .layers import choose_layers, layer_of_site
from .lipschitz import lipschitz
from .mask import Edit, apply_mask, collapsed, edited, joined, masked_values, parameter_masks, removed, zeros
from .select import Amount, Fraction, Order, Ranking, Scope, Until, rank, restrict

SIGNIFICANCE = 0.05
HELD_OUT = 0.25  # share of the clean images that chooses how much to cut, where a score or factors were fitted to the others
BLIND: tuple[object, ...] = (magnitude.l1, magnitude.l2, magnitude.random, lipschitz)  # scores that read no images


class Score(Protocol):
    """A score: larger = more important."""

    def __call__(self, model: nn.Module, clean: ImageSet, *, granularity: Granularity, generator: torch.Generator) -> Scores:
        """Return the scores of ``model``."""
        ...


@dataclass(frozen=True)
class Sentence:
    """What to cut, in the words of the grammar.

    Attributes:
        score: How much each weight or channel matters.
        amount: How much to cut.
        granularity: Cut single weights or whole channels.
        layers: Where: a place (see `choose_layers`) or layer names.
        scope: One ranking per layer, or one over all of them.
        order: Which end goes first.
        edit: What happens to a cut channel's site.
    """

    score: Score
    amount: Amount
    granularity: Granularity = "weight"
    layers: str | Sequence[str] = "all"
    scope: Scope = "layer"
    order: Order = "smallest"
    edit: Edit = "weight+bias"


def prune(
    model: nn.Module,
    clean: ImageSet,
    sentence: Sentence,
    *,
    heal: Recipe | None = None,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Score, select, apply and, if asked, fine-tune with the mask held.

    `Until` is judged on images that the score has not read: on all of ``clean`` for magnitudes and chance, which read none, and
    for any other score on a quarter that is held out from it. The fine-tuning comes after and has them all.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        sentence: What to cut.
        heal: Recipe of the fine-tuning on ``clean``; None leaves it out.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        InconclusiveError: The clean images cannot resolve the accuracy drop that `Until` asks for.
        MethodError: An argument is out of range, or the layers chosen hold nothing to cut.
        ModelError: The network cannot be traced (channels only).
    """
    shown, judged = clean, clean
    if isinstance(sentence.amount, Until) and getattr(sentence.score, "func", sentence.score) not in BLIND:
        shown, judged = holdout(clean, HELD_OUT, generator=generator)
    scores = _scores_in(model, shown, sentence, generator)
    ranking = rank(scores, order=sentence.order, scope=sentence.scope)
    path: tuple[Candidate, ...] = ()
    if isinstance(sentence.amount, Until):
        path, mask = cut_until(model, judged, ranking, sentence.amount, edit=sentence.edit)
    else:
        mask = edited(model, ranking.cut(sentence.amount), sentence.edit)
    healed = apply_and_heal(model, clean, mask, heal=heal, on_step=on_step, generator=generator)
    return Repaired(healed.model, mask, path or healed.path, healed.log, healed.notes)


def _scores_in(model: nn.Module, clean: ImageSet, sentence: Sentence, generator: torch.Generator) -> Scores:
    chosen = choose_layers(model, sentence.layers)
    scores = sentence.score(model, clean, granularity=sentence.granularity, generator=generator)
    if sentence.granularity == "weight":
        layers = {name: name.rpartition(".")[0] for name in scores.values}
    else:
        layers = layer_of_site(trace_channels(model, clean.shape))
    kept = restrict(scores, layers, chosen)
    if not kept.values:
        raise MethodError(
            f"no {sentence.granularity}s can be cut in layers '{sentence.layers}': a filter of the last layer is a class; "
            "cut weights there, or choose other layers"
        )
    return kept


def cut_until(
    model: nn.Module, clean: ImageSet, ranking: Ranking, until: Until, *, edit: Edit = "weight+bias"
) -> tuple[tuple[Candidate, ...], HardMask]:
    """Cut along a ranking until clean accuracy has fallen by ``until.drop``.

    The scan stops at the first share at which the accuracy on ``clean`` is more than ``drop`` below that of ``model``;
    the share before it is the answer; see `first_crossing`.

    Returns:
        The candidates in order, from nothing cut to the one that crossed, and the mask chosen.

    Raises:
        InconclusiveError: The crossing is not significant.
        MethodError: ``drop`` or ``step`` is out of range.
    """
    shares = (0.0, *_shares(until.step))
    cuts = {share: edited(model, ranking.cut(Fraction(share)), edit) for share in shares}
    path, mask, note = follow(model, clean, cuts, until.drop)
    if note:
        raise InconclusiveError(note)
    return path, mask


def follow(
    model: nn.Module, clean: ImageSet, cuts: Mapping[float, HardMask], drop: float
) -> tuple[tuple[Candidate, ...], HardMask, str]:
    """Try ever larger cuts until clean accuracy has fallen by ``drop``.

    Args:
        model: The network before any cut.
        clean: Images to judge on.
        cuts: Amount -> mask, the smallest first; the accuracy before is that of the first of them.
        drop: Accuracy that may be lost, in [0, 1].

    Returns:
        The candidates up to the one that crossed, the mask chosen, and a note where the crossing may be chance (otherwise
        empty); see `first_crossing`.
    """
    evaluator = Incremental(model, clean)
    crossing = first_crossing((evaluator.correct(masked_values(model, mask)) for mask in cuts.values()), drop)
    tried = zip(cuts.items(), crossing.rates, strict=False)
    path = tuple(Candidate(amount, sum(removed(mask).values()), mask, rate) for (amount, mask), rate in tried)
    return path, list(cuts.values())[crossing.chosen], crossing.note


class Crossing(NamedTuple):
    """Where a series of ever larger cuts costs too much.

    Attributes:
        rates: The accuracy at each step up to the one that crossed.
        chosen: The number of the last step before it (of the last step, when none crossed).
        note: Why the crossing may be chance; empty when it is significant.
    """

    rates: list[Rate]
    chosen: int
    note: str = ""


def first_crossing(answers: Iterable[Tensor], drop: float) -> Crossing:
    """Follow a series of ever larger cuts until accuracy has fallen by ``drop``.

    An exact McNemar test (one-sided, 5 %) says whether more images are lost than gained, or the set is too small to tell any
    drop from chance.

    Args:
        answers: Which images are answered rightly, bool ``(n,)``, before any cut and after each; read up to the crossing.
        drop: Accuracy that may be lost, in [0, 1].

    Raises:
        MethodError: ``drop`` is out of range.
    """
    check_range("drop", drop, 0, 1)
    before, rates = None, []
    for after in answers:
        before = after if before is None else before
        rates.append(wilson(int(after.sum()), len(after)))
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        if lost - gained > drop * len(after) + 1e-9:
            note = (
                f"a drop of {drop:g} cannot be resolved on {len(after)} clean images: {lost} lost against "
                f"{gained} gained may be chance; give more images, a larger drop, or a fixed amount"
            )
            return Crossing(rates, len(rates) - 2, note if paired_p(lost, gained) > SIGNIFICANCE else "")
    return Crossing(rates, len(rates) - 1)


def _shares(step: float) -> Iterator[float]:
    if not 0 < step <= 1:
        raise MethodError(f"step must lie in (0, 1], got {step:g}")
    return (i * step for i in range(1, int(1 / step + 1e-9) + 1))


def apply_and_heal(
    model: nn.Module,
    clean: ImageSet,
    mask: HardMask,
    *,
    before: WeightMask | None = None,
    heal: Recipe | None,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Put a mask on a copy of ``model`` and, if asked, fine-tune it on ``clean`` with the mask held, and what was cut before.

    That is what is 0 in ``model`` (`mask.zeros`), unless ``before`` says otherwise.
    """
    repaired = apply_mask(model, mask).eval()
    counts = removed(mask)
    at_cut = wilson(int(correct(repaired, clean).sum()), len(clean))
    size = sum(keep.numel() for keep in mask.keep.values())
    share = sum(counts.values()) / max(size, 1)
    log = {"removed": float(sum(counts.values())), "removed_share": share, "clean_accuracy_at_cut": at_cut.value}
    notes = [f"layer collapse: nothing is left of '{name}'" for name in collapsed(mask)]
    if heal is not None and heal.epochs > 0:
        hold = parameter_masks(model, joined(model, mask, zeros(model) if before is None else before) or mask)
        repaired = train(repaired, clean, heal, hold=hold, on_step=on_step, on_note=notes.append, generator=generator)
    candidate = Candidate(share, sum(counts.values()), mask, at_cut)
    return Repaired(repaired, mask, (candidate,), log, tuple(notes))
