"""The grammar of pruning: scores, order, scope, amount, edit, heal."""

from . import magnitude
from .grammar import Sentence, apply_and_heal, cut_until, first_crossing, follow, prune
from .layers import choose_layers, prunable_layers
from .mask import apply_mask, carry_over, collapsed, parameter_masks, removed
from .select import Below, Compression, Count, Fraction, Outliers, Ranking, Until, rank, select

__all__ = [
    "Below",
    "Compression",
    "Count",
    "Fraction",
    "Outliers",
    "Ranking",
    "Sentence",
    "Until",
    "apply_and_heal",
    "apply_mask",
    "carry_over",
    "choose_layers",
    "collapsed",
    "cut_until",
    "first_crossing",
    "follow",
    "magnitude",
    "parameter_masks",
    "prunable_layers",
    "prune",
    "rank",
    "removed",
    "select",
]
