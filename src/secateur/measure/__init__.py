"""Numbers with intervals: accuracy, attack success, cost."""

from .accuracy import Evaluation, correct, evaluate, predict
from .cost import Cost, cost
from .intervals import paired_p, wilson

__all__ = ["Cost", "Evaluation", "correct", "cost", "evaluate", "paired_p", "predict", "wilson"]
