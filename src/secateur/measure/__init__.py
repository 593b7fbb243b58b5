"""Numbers with intervals: accuracy, attack success, robustness and whether to believe it, cost; and what edits do inside."""

from .accuracy import Evaluation, correct, evaluate, predict
from .adversarial import Bound, Crafted, ThreatModel, bind, craft
from .before_after import Grid, StageWeights, WeightShift, image_grid, stage_weights, weight_study
from .cost import Cost, cost, latencies_ms, latency_ms
from .intervals import paired_p, wilson
from .layer_study import Histogram, Mean, StageShift, layer_study
from .robustness import Outcomes, Rates, Robustness, robustness, robustness_curve
from .sanity import Check, Sanity, sanity
from .transfer import Comparison, TransferMatrix, compare, transfer_matrix
from .visibility import Visibility, visibility

__all__ = [
    "Bound",
    "Check",
    "Comparison",
    "Cost",
    "Crafted",
    "Evaluation",
    "Grid",
    "Histogram",
    "Mean",
    "Outcomes",
    "Rates",
    "Robustness",
    "Sanity",
    "StageShift",
    "StageWeights",
    "ThreatModel",
    "TransferMatrix",
    "Visibility",
    "WeightShift",
    "bind",
    "compare",
    "correct",
    "cost",
    "craft",
    "evaluate",
    "image_grid",
    "latencies_ms",
    "latency_ms",
    "layer_study",
    "paired_p",
    "predict",
    "robustness",
    "robustness_curve",
    "sanity",
    "stage_weights",
    "transfer_matrix",
    "visibility",
    "weight_study",
    "wilson",
]
