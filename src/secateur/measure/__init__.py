"""Numbers with intervals: accuracy, attack success, cost."""

from .accuracy import Evaluation, correct, evaluate, predict
from .cost import Cost, cost
from .intervals import paired_p, wilson
from .visibility import Visibility, visibility

__all__ = ["Cost", "Evaluation", "Visibility", "correct", "cost", "evaluate", "paired_p", "predict", "visibility", "wilson"]
