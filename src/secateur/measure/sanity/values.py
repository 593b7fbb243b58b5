"""What the sanity checks return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...types import Rate
from ..adversarial import ThreatModel

Status = Literal["PASS", "WARN", "FAIL", "SKIPPED"]


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        status: ``FAIL`` says that no number measured so may be quoted, ``WARN`` that somebody should look.
        value: Its number, in the unit that the message names; None where there is none.
        message: What was found, in words.
        where: Images concerned, as indices into the images given.
    """

    status: Status
    value: float | None
    message: str
    where: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check(Verdict):
    """A verdict with the check that came to it.

    Attributes:
        id: Stable id.
        name: What it is called.
        means: What a failure means.
        remedy: What to do about one.
    """

    id: str = ""
    name: str = ""
    means: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Sanity:
    """Whether a robustness figure of this network, measured by these attacks, would mean something.

    Attributes:
        checks: All checks, in the order of their ids.
        established: No check failed.
        threat: The threat model.
        clean_accuracy: Of the images looked at.
        upper_bound: Share of the images that none of the attacks broke: robust accuracy is at most this, established or not.
        budgets: Attack -> its settings in words.
        seed: Where all random numbers began.
    """

    checks: tuple[Check, ...]
    established: bool
    threat: ThreatModel
    clean_accuracy: Rate
    upper_bound: Rate
    budgets: Mapping[str, str]
    seed: int

    def __getitem__(self, name: str) -> Check:
        """Return the check of this id or name."""
        return next(check for check in self.checks if name in (check.id, check.name))

    def failed(self) -> tuple[Check, ...]:
        """Return the checks that failed."""
        return tuple(check for check in self.checks if check.status == "FAIL")

    def __str__(self) -> str:
        if self.established:
            return f"robust accuracy at most {self.upper_bound}; {self.threat}; seed {self.seed}"
        names = ", ".join(f"{check.id} {check.name}" for check in self.failed())
        return f"robustness not established ({names}); at most {self.upper_bound}; {self.threat}; seed {self.seed}"
