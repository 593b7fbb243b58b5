"""Reading checkpoints that nobody vouches for, without running what is in them."""

from __future__ import annotations

from .checkpoint import load

__all__ = ["load"]
