"""What the sanity checks judge: settings, gradients, attacks, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attack import pgd
from ...attack.losses import Loss
from ...attack.network import Forward
from ...types import ImageSet
from ..adversarial import Bound, ThreatModel, answers_of, bind
from ..robustness import Outcomes

WHITE = ("fgsm", "one step", "pgd", "pgd, margin", "pgd, twice the steps")
OURS = (*WHITE, "random noise", "square", "transfer")
FAR = 0.5  # every image lies within it of plain grey


@dataclass(frozen=True, eq=False)
class Settings:
    """How to attack; the arguments of `sanity`."""

    threat: ThreatModel
    steps: int
    step_size: float | None
    queries: int
    forward: Forward | None
    batch_size: int
    features: int
    seed: int

    @property
    def far(self) -> float:
        """A budget with which every image can become plain grey, so that no network can answer better than by chance."""
        return max(self.threat.eps, FAR if self.threat.norm == "linf" else FAR * self.features**0.5)

    def pgd(self, eps: float, *, steps: int | None = None, step_size: float | None = None, **changed: Any) -> Bound:
        """Return PGD with these settings at some budget."""
        steps = steps or self.steps
        wanted = 2.5 * eps / steps if self.step_size is None else self.step_size * eps / self.threat.eps
        common = {"norm": self.threat.norm, "drop_broken": True, "forward": self.forward, "batch_size": self.batch_size}
        return bind(pgd, eps=eps, steps=steps, step_size=step_size or wanted, **(common | changed))


@dataclass(frozen=True, eq=False)
class Slopes:
    """The gradient of a loss in the images as given.

    Attributes:
        missing: None came back: the network detaches.
        unusable: Where it is 0, missing or not finite, bool ``(rows,)``.
        rises: How much the loss rises along the gradient's sign by the gradient, ``(rows,)``.
        measured: The same by a finite difference.
    """

    missing: bool
    unusable: Tensor
    rises: Tensor
    measured: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """One attack, judged.

    Attributes:
        name: What it is called.
        tried: Which images it was run on, bool ``(n,)``.
        broken: Right when clean and wrong as returned, bool ``(n,)``.
        stored: Right when clean and wrong as stored, bool ``(n,)``.
        margin: Largest other logit less the true one, as returned, ``(n,)``; infinite where broken, clean where not tried.
        righted: Wrong when clean and right as returned, bool ``(n,)``.
        distance: Largest distance before rounding.
        outside: Farthest beyond [0, 1] before rounding.
        settings: What `bind` was given; empty for other functions.
        error: Why it could not run; empty if it could.
    """

    name: str
    tried: Tensor
    broken: Tensor
    stored: Tensor
    margin: Tensor
    righted: Tensor
    distance: float = 0.0
    outside: float = 0.0
    settings: Mapping[str, object] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was computed.

    Attributes:
        settings: How.
        data: The images looked at.
        rows: Their places among the images given.
        training: Modules in training mode as the network came in.
        logits: Clean logits ``(n, classes)``.
        margin: Largest other logit less the true one, clean, ``(n,)``.
        spread: Largest difference of logits over five forwards, relative to the largest logit.
        together: The same between images in a batch and images one by one.
        draws: The forward given answers with several draws.
        slopes: Loss -> gradient on images answered rightly.
        runs: Attacks at the budget, by name: ours (`OURS`) and those given.
        sweep: PGD at other budgets.
        given: Names of the attacks that were given.
        budgets: Attack -> its settings in words.
        shared: How many of the images stand among the training images; None if those were not given.
        measured: Answers behind the figure that is judged, on all the images given; None if there is none.
    """

    settings: Settings
    data: ImageSet
    rows: Tensor
    training: int
    logits: Tensor
    margin: Tensor
    spread: float
    together: float
    draws: bool
    slopes: Mapping[Loss, Slopes]
    runs: Mapping[str, Run]
    sweep: Mapping[float, Run]
    given: tuple[str, ...]
    budgets: Mapping[str, str]
    shared: int | None
    measured: Outcomes | None = None

    @property
    def right(self) -> Tensor:
        """Which images are answered rightly, bool ``(n,)``."""
        return answers_of(self.logits) == self.data.y

    @property
    def white(self) -> tuple[Run, ...]:
        """Our attacks that know the network, at the budget."""
        return tuple(self.runs[name] for name in WHITE)

    @property
    def standing(self) -> Tensor:
        """Which images are answered rightly whatever any attack within the budget did, bool ``(n,)``."""
        left, claimed = self._left(self.runs), self.claimed
        return left if claimed is None else left & claimed

    @property
    def ours(self) -> Tensor:
        """The same, of our attacks alone."""
        return self._left(name for name in self.runs if name not in self.given)

    @property
    def claimed(self) -> Tensor | None:
        """Which images the figure that is judged counts as robust; None if there is none."""
        if self.measured is None:
            return None
        answers = torch.stack([self.measured.clean, *self.measured.returned.values()])
        return (answers == self.measured.y).all(dim=0)[self.rows]

    def _left(self, names: Iterable[str]) -> Tensor:
        within = [run for eps, run in self.sweep.items() if eps <= self.settings.threat.eps]
        return self.right & ~torch.stack([run.broken for run in (*map(self.runs.__getitem__, names), *within)]).any(dim=0)
