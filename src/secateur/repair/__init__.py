"""Repairs: what ``--method`` names. Each takes a network and clean images, and returns a `Repaired`."""

from .clp import clp
from .fine_pruning import fine_pruning
from .fine_tuning import fine_tuning
from .norm_pruning import norm_pruning

__all__ = ["clp", "fine_pruning", "fine_tuning", "norm_pruning"]
