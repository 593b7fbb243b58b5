"""How a check decides without failing sound networks by chance.

Tests compare outcomes of the same images, each at `SIGNIFICANCE`. An audit makes a dozen of them, and two more for each attack
given, so that a network for which every hypothesis only just holds fails in about 1 of 100 audits, whatever the tests have to
do with one another (Bonferroni).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...binomial import tail
from ...types import Rate
from ..intervals import paired_p, wilson
from .evidence import Evidence, Run
from .values import Verdict

SIGNIFICANCE = 5e-4
SAME = 1e-6  # of the largest logit: what the order of additions makes
POINT = 0.01  # of accuracy: what two honest attacks may differ by


class Skip(Exception):
    """A check has nothing to judge; the message says why."""


def run_of(e: Evidence, *names: str) -> list[Run]:
    """Return runs; raise `Skip` where one is missing, could not run or had nothing to attack."""
    if not bool(e.right.any()):
        raise Skip("no image is answered rightly, so there is nothing to attack")
    for name in names:
        if name not in e.runs:
            raise Skip("needs a surrogate" if name == "transfer" else f"{name} was not run")
        usable(e.runs[name])
    return [e.runs[name] for name in names]


def usable(run: Run) -> Run:
    """Return a run; raise `Skip` if it could not run."""
    if run.error:
        raise Skip(f"{run.name} could not run")
    return run


def percent(where: Tensor) -> float:
    """Return the share that is true; 0 of nothing."""
    return float(where.double().mean()) if len(where) else 0.0


def images(e: Evidence, where: Tensor) -> tuple[int, ...]:
    """Return which of the images given these are."""
    return tuple(sorted(e.rows[where].tolist()))


def standing(e: Evidence) -> Rate:
    """Return the share of images that no attack broke."""
    return wilson(int(e.standing.sum()), len(e.data))


def exceeds(hits: int, n: int, level: float) -> bool:
    """Return whether so many hits say that the rate is above a level."""
    return hits > level * n and tail(hits, n, level) <= SIGNIFICANCE


def not_stronger(e: Evidence, weak: Run, strong: Run, *, margin: float = POINT) -> Verdict:
    """Judge that one attack does not break more images than another that should be at least as strong.

    ``WARN`` beyond a point of accuracy, ``FAIL`` where it lies beyond ``margin`` and is no accident by the paired test.
    """
    usable(weak)
    usable(strong)
    ahead, behind = int((weak.broken & ~strong.broken).sum()), int((strong.broken & ~weak.broken).sum())
    value = (ahead - behind) / len(e.data)
    told = (
        f"{weak.name} breaks {int(weak.broken.sum())} images, {strong.name} {int(strong.broken.sum())} "
        f"({ahead} by the first alone, {behind} by the second alone)"
    )
    where = images(e, weak.broken & ~strong.broken) if value > 0 else ()
    accident = paired_p(ahead, behind) > SIGNIFICANCE
    status = "PASS" if value <= POINT else "WARN" if value <= margin or accident else "FAIL"
    return Verdict(status, value, told, where)


def worst(verdicts: list[Verdict]) -> Verdict:
    """Return the verdict that matters most: the worst status, then the largest number."""
    order = ("SKIPPED", "PASS", "WARN", "FAIL")
    return max(verdicts, key=lambda verdict: (order.index(verdict.status), verdict.value or 0.0))


def wins(first: Tensor, second: Tensor) -> tuple[int, int]:
    """Return how many images are higher in the one and in the other, of margins ``(n,)``; equal ones count for neither."""
    return int(torch.gt(first, second).sum()), int(torch.gt(second, first).sum())
