"""Repairs: what ``--method`` names. Each takes a network and clean images, and returns a `Repaired`."""

from .anp import anp
from .auto import auto
from .awm import awm
from .bnp import bnp
from .clp import clp
from .cnp import cnp
from .ep import ep
from .fine_pruning import fine_pruning
from .fine_tuning import fine_tuning
from .fmp import fmp
from .ft_sam import ft_sam
from .i_bau import i_bau
from .ims import ims
from .nad import nad
from .neural_cleanse import neural_cleanse
from .norm_pruning import norm_pruning
from .npd import npd
from .onp import onp
from .otbr import otbr
from .rnp import rnp
from .sau import sau
from .tsbd import tsbd

__all__ = [
    "anp",
    "auto",
    "awm",
    "bnp",
    "clp",
    "cnp",
    "ep",
    "fine_pruning",
    "fine_tuning",
    "fmp",
    "ft_sam",
    "i_bau",
    "ims",
    "nad",
    "neural_cleanse",
    "norm_pruning",
    "npd",
    "onp",
    "otbr",
    "rnp",
    "sau",
    "tsbd",
]
