"""Numbers with intervals: accuracy, attack success, robustness and whether to believe it, cost; what attacks and edits do inside."""

from .accuracy import Evaluation, correct, evaluate, predict
from .adversarial import Bound, Crafted, ThreatModel, bind, craft
from .before_after import Grid, WeightShift, image_grid, weight_study
from .cost import Cost, cost
from .intervals import paired_p, wilson
from .layer_study import Histogram, Mean, StageShift, layer_study
from .robustness import Outcomes, Rates, Robustness, robustness, robustness_curve
from .transfer import Comparison, TransferMatrix, compare, transfer_matrix
from .visibility import Visibility, visibility

__all__ = [
    "Bound",
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
    "StageShift",
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
    "layer_study",
    "paired_p",
    "predict",
    "robustness",
    "robustness_curve",
    "transfer_matrix",
    "visibility",
    "weight_study",
    "wilson",
]
