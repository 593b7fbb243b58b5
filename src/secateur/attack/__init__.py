"""Evasion attacks: small changes of images, within a budget, that make a network answer wrongly. One paper, one file.

Each takes a network, images in [0, 1] and labels, and returns images; none changes the network. See ``docs/evasion.md``.
"""

from .adaptive import bpda, eot, through_quantisation, through_rounding, through_wrappers
from .diva import diva
from .ensemble import apgd, autoattack
from .fgsm import fgsm
from .noise import random_noise
from .pgd import pgd
from .square import square
from .transfer import di_fgsm, mi_fgsm, ti_fgsm

__all__ = [
    "apgd",
    "autoattack",
    "bpda",
    "di_fgsm",
    "diva",
    "eot",
    "fgsm",
    "mi_fgsm",
    "pgd",
    "random_noise",
    "square",
    "through_quantisation",
    "through_rounding",
    "through_wrappers",
    "ti_fgsm",
]
