"""Repairs: what ``--method`` names. Each takes a network and clean images, and returns a `Repaired`."""

from .anp import anp
from .clp import clp
from .fine_pruning import fine_pruning
from .fine_tuning import fine_tuning
from .ims import ims
from .norm_pruning import norm_pruning
from .rnp import rnp

__all__ = ["anp", "clp", "fine_pruning", "fine_tuning", "ims", "norm_pruning", "rnp"]
