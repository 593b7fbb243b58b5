"""Numbers with intervals: accuracy, attack success, cost; and what attacks and edits do inside a network."""

from .accuracy import Evaluation, correct, evaluate, predict
from .before_after import Grid, WeightShift, image_grid, weight_study
from .cost import Cost, cost
from .intervals import paired_p, wilson
from .layer_study import Histogram, Mean, StageShift, layer_study
from .visibility import Visibility, visibility

__all__ = [
    "Cost",
    "Evaluation",
    "Grid",
    "Histogram",
    "Mean",
    "StageShift",
    "Visibility",
    "WeightShift",
    "correct",
    "cost",
    "evaluate",
    "image_grid",
    "layer_study",
    "paired_p",
    "predict",
    "visibility",
    "weight_study",
    "wilson",
]
