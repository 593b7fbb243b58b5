"""Whole runs: measure before, do something, measure after, and write it all down.

The command line is a thin face over these functions; each returns a typed record that ``report`` renders.
"""

from .attacking import AttackRun, attack
from .compressing import asked, compress
from .records import NetworkRun, check_fit, environment, how_visible, picture, software, tool
from .repairing import repair
from .training import TrainRun, new_network, train

__all__ = [
    "AttackRun",
    "NetworkRun",
    "TrainRun",
    "asked",
    "attack",
    "check_fit",
    "compress",
    "environment",
    "how_visible",
    "new_network",
    "picture",
    "repair",
    "software",
    "tool",
    "train",
]
