"""The grammar of pruning: scores, order, scope, amount, edit, heal."""

from . import magnitude
from .activations import clamp_activations, clean_bounds, edit_activations, round_activations
from .edits import Edited, Resampled, adaptive, adaptives, clamp, noise, small_entries, sparsify
from .grammar import Sentence, apply_and_heal, cut_until, first_crossing, follow, prune
from .layers import choose_layers, prunable_layers
from .mask import apply_mask, carry_over, collapsed, parameter_masks, removed
from .schedule import amount_at, prune_in_rounds, rewound
from .select import Below, Compression, Count, Fraction, Outliers, Ranking, Until, rank, select

__all__ = [
    "Below",
    "Compression",
    "Count",
    "Edited",
    "Fraction",
    "Outliers",
    "Ranking",
    "Resampled",
    "Sentence",
    "Until",
    "adaptive",
    "adaptives",
    "amount_at",
    "apply_and_heal",
    "apply_mask",
    "carry_over",
    "choose_layers",
    "clamp",
    "clamp_activations",
    "clean_bounds",
    "collapsed",
    "cut_until",
    "edit_activations",
    "first_crossing",
    "follow",
    "magnitude",
    "noise",
    "parameter_masks",
    "prunable_layers",
    "prune",
    "prune_in_rounds",
    "rank",
    "removed",
    "rewound",
    "round_activations",
    "select",
    "small_entries",
    "sparsify",
]
