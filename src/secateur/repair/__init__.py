"""Repairs: what ``--method`` names. Each takes a network and clean images, and returns a `Repaired`."""

from .fine_tuning import fine_tuning
from .norm_pruning import norm_pruning

__all__ = ["fine_tuning", "norm_pruning"]
