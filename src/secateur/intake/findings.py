"""What the door notices in a file: findings with stable rule ids, and what becomes of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "low", "medium", "high", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "low", "medium", "high", "critical")


@dataclass(frozen=True)
class Rule:
    """One kind of finding; ids never change their meaning."""

    severity: Severity
    title: str
    remedy: str


RULES: Mapping[str, Rule] = {
    "LOD-001": Rule(
        "critical",
        "The pickle calls something that can run code, or hides what it calls",
        "do not load this file with anything that executes pickles; --force takes the weights alone, running nothing",
    ),
    "LOD-002": Rule(
        "medium",
        "The pickle names an object that is on no list",
        "it was read as plain data and not imported; ask the author what it is for",
    ),
    "LOD-003": Rule("info", "The pickle names a known harmless object besides tensors", "it was read as plain data"),
    "LOD-004": Rule(
        "critical",
        "The file is a program: reading it means running it",
        "--sandbox takes its weights in a sandbox, --trust-code runs it here; better, ask for a safetensors file",
    ),
    "LOD-005": Rule("low", "The file's name says another format than its content", "the content decided"),
    "LOD-006": Rule("medium", "The folder holds code", "it was not run"),
    "LOD-007": Rule(
        "high",
        "A checksum does not match: the file is damaged, was altered, or was written without checksums",
        "fetch it again; --force reads it as it is",
    ),
    "LOD-008": Rule("high", "Weights are NaN or infinite", "the network cannot be used as it is"),
    "LOD-009": Rule("high", "The file points at a file outside its own folder", "it was not followed"),
    "LOD-010": Rule("low", "A tensor is of a kind that is not read", "quantised, sparse and foreign tensors are left out"),
    "LOD-011": Rule(
        "low",
        "The network answers probabilities instead of logits",
        "return logits from the factory: fine-tuning and gradients suffer from a softmax inside",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing noticed.

    Attributes:
        rule: Key of `RULES`.
        message: What, in one printable line.
        where: Part of the file (an entry of an archive, a key), or an empty text.
    """

    rule: str
    message: str
    where: str = ""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return RULES[self.rule].severity

    @property
    def rank(self) -> int:
        """Severity as a number, to sort by."""
        return SEVERITIES.index(self.severity)

    def record(self) -> dict[str, str]:
        """Return the entry for a record."""
        return {"rule": self.rule, "severity": self.severity, "message": self.message, "where": self.where}


def at_least(severity: Severity, threshold: Severity) -> bool:
    """Return whether ``severity`` is ``threshold`` or worse."""
    return SEVERITIES.index(severity) >= SEVERITIES.index(threshold)
