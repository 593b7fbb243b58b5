"""When to cut: at once, or in rounds with healing between them; and what to go back to once the mask is found.

Han, Pool, Tran, Dally, arXiv:1506.02626 (rounds); Zhu, Gupta, arXiv:1710.01878 (cubic); Frankle, Carbin, ICLR 2019,
arXiv:1803.03635, and Frankle, Dziugaite, Roy, Carbin, arXiv:1903.01611 (weights go back); Renda, Frankle, Carbin, ICLR 2020,
arXiv:2003.02389 (the learning rate goes back).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import MethodError, check_choice, check_range
from ..models import core
from ..models.weights import check_shapes, shapes_of
from ..train import OnStep, Recipe
from ..types import Candidate, Granularity, HardMask, ImageSet, Repaired, Scores, WeightMask
from .grammar import Score, Sentence, apply_and_heal, prune
from .mask import removed, zeros
from .select import Amount, Compression, Count, FixedAmount, Fraction

Pace = Literal["geometric", "cubic", "linear"]


def amount_at(final: Amount, part: float, pace: Pace) -> FixedAmount:
    """Return how much is cut when ``part`` of a schedule is over.

    With ``s`` the share cut in the end (of the whole model for `Compression`) and ``p`` the part, the share cut is

    * ``geometric``: ``1 - (1 - s)^p``, so that each round keeps the same share of what is left: ``compression^p``;
    * ``cubic``: ``s * (1 - (1 - p)^3)``, much early and little late;
    * ``linear``: ``s * p``.

    Args:
        final: Where it ends: `Compression`, `Fraction`, or `Count` (not geometric).
        part: In (0, 1]; at 1 it is ``final`` itself.
        pace: ``geometric``, ``cubic`` or ``linear``.

    Raises:
        MethodError: The amount is no such, or an argument is out of range.
    """
    check_choice("pace", pace, get_args(Pace))
    if not 0 < part <= 1:
        raise MethodError(f"part must lie in (0, 1], got {part:g}")
    if not isinstance(final, Count | Fraction | Compression):
        raise MethodError(f"a schedule needs a Count, Fraction or Compression, got {type(final).__name__}; cut that at once")
    if part == 1:
        return final
    if isinstance(final, Count):
        if pace == "geometric":
            raise MethodError("a geometric pace keeps a share of what is left; give a Fraction or Compression, or another pace")
        return Count(round(final.count * _share(1.0, part, pace)))
    if isinstance(final, Fraction):
        check_range("fraction", final.fraction, 0, 1)
        if pace == "geometric" and final.fraction == 1:
            raise MethodError("a geometric pace never cuts everything; give a fraction below 1, or another pace")
        return Fraction(_share(final.fraction, part, pace))
    check_range("compression", final.compression, 1, final.total)
    return replace(final, compression=1 / (1 - _share(1 - 1 / final.compression, part, pace)))


def _share(end: float, part: float, pace: Pace) -> float:
    if pace == "geometric":
        return 1 - (1 - end) ** part
    return end * (1 - (1 - part) ** 3) if pace == "cubic" else end * part


def prune_in_rounds(
    model: nn.Module,
    clean: ImageSet,
    sentence: Sentence,
    *,
    rounds: int = 5,
    pace: Pace = "geometric",
    heal: Recipe | None = None,
    rewind: nn.Module | Mapping[str, Tensor] | None = None,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Cut in rounds: score the network as it is now, cut some more, fine-tune with the mask held, and again.

    What is cut stays cut: in every round it ranks before all else, whatever its score, and so does what is 0 already in the
    network given (`mask.zeros`), which counts towards a `Compression`. The last round ends with exactly the amount of the
    sentence. One round is one-shot pruning.

    To *rewind* is to go back, once a round's mask is found, and train again from there:

    * the weights (lottery tickets): ``rewind`` is the network, or its state, as it was early in its training (with its
      batch-norm statistics), and ``heal`` the recipe it was trained with, or what is left of it, `rewound`;
    * the learning rate alone: ``rewind=None`` and ``heal=rewound(recipe, epoch=...)`` of the recipe of its training.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: they score and heal.
        sentence: What to cut in all; its amount is a `Count`, `Fraction` or `Compression`.
        rounds: How many, >= 1.
        pace: How much is cut after each round, see `amount_at`.
        heal: Recipe of the fine-tuning after each round; None leaves it out.
        rewind: What the weights go back to: a network of the same shape, or a state dict of one; None leaves them.
        on_step: Progress over all rounds.
        generator: Source of all randomness.

    Returns:
        The network after the last round; ``path`` has one candidate per round, its accuracy that on ``clean`` right after the
        cut, before the fine-tuning.

    Raises:
        MethodError: An argument is out of range; rounds rewind to weights that nothing trains again; or as for `prune`.
        ModelError: ``rewind`` is of another shape, or as for `prune`.
    """
    check_range("rounds", rounds, 1, 10_000)
    if rewind is not None and rounds > 1 and heal is None:
        raise MethodError("rounds that rewind need a recipe to train again with; give heal, or one round")
    before, amount = zeros(model), sentence.amount
    if isinstance(amount, Compression):
        amount = replace(amount, before=removed(before))
    amounts = [amount_at(amount, (i + 1) / rounds, pace) for i in range(rounds)]
    early = None if rewind is None else _rewound(model, rewind)
    path: list[Candidate] = []
    sentence = replace(sentence, score=_after(sentence, before)) if before.keep else sentence
    healed = Repaired(model, None)
    for i, amount in enumerate(amounts):
        score = sentence.score if healed.mask is None else _after(sentence, _hard(healed.mask))
        found = prune(healed.model, clean, replace(sentence, score=score, amount=amount), generator=generator)
        start, told = healed.model if early is None else early, _progress(on_step, i, rounds)
        healed = apply_and_heal(start, clean, _hard(found.mask), before=before, heal=heal, on_step=told, generator=generator)
        path += healed.path
    return Repaired(healed.model, healed.mask, tuple(path), {**healed.log, "rounds": float(rounds)}, healed.notes)


@dataclass(frozen=True)
class _Rest(Recipe):
    """The rest of a recipe, from a part of its schedule on."""

    start: float = 0.0

    def factor(self, progress: float) -> float:
        """Return the share of ``lr`` in force after ``progress`` of what is left."""
        return super().factor(self.start + (1 - self.start) * progress)


def rewound(recipe: Recipe, *, epoch: int) -> Recipe:
    """Return the rest of a recipe after ``epoch``: as many epochs as were left, at the learning rates that they had.

    Args:
        recipe: How the network was trained.
        epoch: Where to go back to, in [0, epochs]; 0 is the whole recipe.

    Raises:
        MethodError: ``epoch`` is out of range.
    """
    check_range("epoch", epoch, 0, recipe.epochs)
    fields = asdict(recipe)
    done = fields.pop("start", 0.0)
    left = fields.pop("epochs")
    return _Rest(epochs=left - epoch, start=done + (1 - done) * epoch / left if left else done, **fields)


def _after(sentence: Sentence, mask: HardMask) -> Score:
    """Return the sentence's score with what a mask has cut at the end that goes first."""
    first = float("-inf") if sentence.order == "smallest" else float("inf")

    def score(model: nn.Module, clean: ImageSet, *, granularity: Granularity, generator: torch.Generator) -> Scores:
        scores = sentence.score(model, clean, granularity=granularity, generator=generator)
        return Scores(
            {n: values.masked_fill(_gone(mask, n, values), first) for n, values in scores.values.items()}, granularity
        )

    return score


def _gone(mask: HardMask, name: str, values: Tensor) -> Tensor:
    keep = mask.keep.get(name)
    if keep is None and isinstance(mask, WeightMask):  # channels of which the weight alone goes
        keep = mask.keep.get(f"{name}.weight")
        keep = None if keep is None else keep.reshape(len(keep), -1).any(dim=1)
    return torch.zeros_like(values, dtype=torch.bool) if keep is None else ~keep.to(values.device)


def _hard(mask: object) -> HardMask:
    assert isinstance(mask, HardMask)
    return mask


def _progress(on_step: OnStep | None, done: int, rounds: int) -> OnStep | None:
    if on_step is None:
        return None

    def told(step: int, steps: int) -> None:
        on_step(done * steps + step, rounds * steps)

    return told


def _rewound(model: nn.Module, earlier: nn.Module | Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with the parameters and buffers of an earlier state of it."""
    copy = deepcopy(model)
    state = core(earlier).state_dict() if isinstance(earlier, nn.Module) else earlier
    whole = copy if isinstance(earlier, Mapping) and set(state) == set(copy.state_dict()) else core(copy)
    check_shapes(shapes_of(whole.state_dict()), shapes_of(state), "the network that is rewound")
    whole.load_state_dict(dict(state))
    return copy
