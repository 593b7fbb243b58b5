"""Secateur: audit, repair by pruning, compress and prove, for networks somebody else trained.

The public names load on first use, so that importing the package costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data import load_data as load_data
    from .data import load_trigger as load_trigger
    from .intake import load as load
    from .intake.inspect import inspect as inspect
    from .measure import evaluate as evaluate
    from .models import Classifier as Classifier
    from .models import save as save
    from .train import Recipe as Recipe
    from .types import ImageSet as ImageSet
    from .types import Task as Task

_HOMES = {
    "Classifier": "models",
    "inspect": "intake.inspect",
    "load": "intake",
    "save": "models",
    "load_data": "data",
    "load_trigger": "data",
    "evaluate": "measure",
    "Recipe": "train",
    "ImageSet": "types",
    "Task": "types",
}
__all__ = [
    "Classifier",
    "ImageSet",
    "Recipe",
    "Task",
    "__version__",
    "evaluate",
    "inspect",
    "load",
    "load_data",
    "load_trigger",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
