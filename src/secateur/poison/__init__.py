"""Backdoor attacks: one paper, one file. Each returns a `Poisoning`: the trigger, and the training set with it put in."""

from .badnets import badnets
from .blended import blended

__all__ = ["badnets", "blended"]
