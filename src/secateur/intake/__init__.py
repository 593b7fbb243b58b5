"""Reading checkpoints that nobody vouches for, without running what is in them.

`read` looks into a file without torch, `load` makes a network of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .reading import Reading as Reading
    from .reading import read as read

_HOMES = {"load": "checkpoint", "Reading": "reading", "read": "reading"}
__all__ = ["Reading", "load", "read"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
