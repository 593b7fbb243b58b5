"""Backdoor attacks: one paper, one file. Each returns a `Poisoning`: the trigger, and the training set with it put in."""

from .adaptive import adaptive_blend, adaptive_patch
from .badnets import badnets
from .blended import blended
from .bpp import bpp
from .input_aware import input_aware
from .label_consistent import label_consistent
from .lira import lira
from .low_frequency import low_frequency
from .sig import sig
from .ssba import ssba
from .trojannn import trojannn
from .victim import train_victim
from .wanet import wanet

__all__ = [
    "adaptive_blend",
    "adaptive_patch",
    "badnets",
    "blended",
    "bpp",
    "input_aware",
    "label_consistent",
    "lira",
    "low_frequency",
    "sig",
    "ssba",
    "train_victim",
    "trojannn",
    "wanet",
]
