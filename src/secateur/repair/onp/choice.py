"""Which cut is made in the end, given a policy that ranks the neurons and the games that were played."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...forward import Incremental
from ...measure import wilson
from ...prune.mask import masked_values, removed
from ...prune.neurons import growing
from ...types import Candidate, HardMask, ImageSet
from .layers import mask_of

if TYPE_CHECKING:
    from .env import Pruning

TOGETHER = 8  # neurons of the ranking that are tried at once, at most
PATIENCE = 16  # neurons of the ranking, one after the other, that cost too much before the rest is left alone
SURE = 1.645  # standard errors: 5 % on one side
LISTED = 32  # cuts that are judged in the end, at most


def choose(
    model: nn.Module, judged: ImageSet, env: Pruning, chances: Sequence[Tensor], *, generator: torch.Generator
) -> tuple[tuple[Candidate, ...], HardMask, Sequence[Tensor]]:
    """Return the affordable cut that is worth most: the lowest signs, and the bonus of what is cut.

    Candidates are the ends of all games, and those of a `walk` along the neurons in the order of how likely each is cut (those
    that are as likely as each other in random order). Of those that are affordable on the images of the game, `LISTED` are
    judged on images that nothing was learned from, the best first, until one is there that does not cost significantly more
    than is allowed; otherwise nothing is cut. (A walk goes up to the tolerance, so half of what it finds would cost a little
    more elsewhere.)

    Returns:
        The cuts that were judged; the one that is taken, and what of each layer it keeps, bool ``(size,)``.
    """
    likely = torch.cat(list(chances))
    drawn = torch.randperm(len(likely), generator=generator)
    order = drawn[likely[drawn].argsort(descending=True, stable=True)]
    ends = [*env.ends, *((env.stand(keeps), keeps) for keeps in walk(env, order))]
    distinct = {torch.cat(keeps).numpy().tobytes(): (standing, keeps) for standing, keeps in ends}
    able = [(standing, keeps) for standing, keeps in distinct.values() if standing.rise <= env.drop]
    able.sort(key=lambda end: end[0].backdoor - env.bonus * end[0].cut)
    nothing = next(end for end in able if end[0].cut == 0)
    evaluator, path = Incremental(model, judged), []
    before = evaluator.correct({})
    for standing, keeps in [*able[:LISTED], nothing]:
        mask = mask_of(model, env.layers, keeps, env.edit)
        right = evaluator.correct(masked_values(model, mask))
        path.append(Candidate(standing.cut, sum(removed(mask).values()), mask, wilson(int(right.sum()), len(right))))
        if not costs_more(before, right, env.drop):
            return tuple(path), mask, keeps
    raise AssertionError("to cut nothing loses nothing")


def costs_more(before: Tensor, after: Tensor, drop: float) -> bool:
    """Return whether accuracy has fallen by significantly more than ``drop`` (paired one-sided z-test at 5 %).

    Args:
        before: Which images were answered rightly, bool ``(n,)``.
        after: Which of the same images are now.
        drop: What it may fall by, in [0, 1].
    """
    change = before.double() - after.double()
    error = change.std(correction=0) / len(change) ** 0.5
    return float(change.mean()) - drop > SURE * float(error) + 1e-9


def walk(env: Pruning, order: Tensor) -> list[tuple[Tensor, ...]]:
    """Go along a ranking and cut each neuron unless accuracy then falls by more than the tolerance.

    Neurons are tried together, twice as many each time, up to `TOGETHER`; where that costs too much half as many, in the end
    one, and one that costs too much alone is left. It ends after half of the neurons, or where `PATIENCE` were left one after
    the other.

    Args:
        env: The game; of it only the clean error is asked.
        order: All neurons, the first to go first, int64 ``(neurons,)``.

    Returns:
        What is kept, bool ``(size,)`` for each layer: at the start, whenever a tenth more was cut, and at the end.
    """
    sizes, half = [layer.size for layer in env.layers], len(order) // 2
    keep = torch.ones(len(order), dtype=torch.bool)
    path, stops = [keep.split(sizes)], set(growing(half))
    gone, at, together, left = 0, 0, 1, 0
    while at < half and left < PATIENCE:
        some = order[at : min(half, at + together)]
        tried = keep.clone()
        tried[some] = False
        if env.rise(tried.split(sizes)) <= env.drop:
            before, keep = gone, tried
            gone, at, together, left = gone + len(some), at + len(some), min(TOGETHER, 2 * len(some)), 0
            if any(count in stops for count in range(before + 1, gone + 1)):
                path.append(keep.split(sizes))
        elif len(some) > 1:
            together = len(some) // 2
        else:
            at, left = at + 1, left + 1
    return path if torch.equal(torch.cat(path[-1]), keep) else [*path, keep.split(sizes)]
