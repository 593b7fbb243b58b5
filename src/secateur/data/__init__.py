"""Images and triggers: reading them, sharing them out, augmenting and writing them.

Everything lives in memory as uint8 tensors. Files are untrusted: whatever they hold, reading them gives a value or a
`SecateurError`, and never runs code from them.
"""

from __future__ import annotations

from ..types import ImageSet
from .arrays import save_npz
from .augment import augment, random_crop, random_flip
from .readers import load_data
from .sampling import count_steps, passes, sample
from .splits import count_shared, holdout, split_clean, stratified
from .triggers import load_trigger, save_trigger

__all__ = [
    "ImageSet",
    "augment",
    "count_shared",
    "count_steps",
    "holdout",
    "load_data",
    "load_trigger",
    "passes",
    "random_crop",
    "random_flip",
    "sample",
    "save_npz",
    "save_trigger",
    "split_clean",
    "stratified",
]
