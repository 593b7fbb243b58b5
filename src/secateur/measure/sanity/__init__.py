"""Whether a robustness figure would mean something: the known ways to fool oneself, each as a check with a number."""

from .audit import sanity
from .table import RULES
from .values import Check, Sanity, Status, Verdict

__all__ = ["RULES", "Check", "Sanity", "Status", "Verdict", "sanity"]
