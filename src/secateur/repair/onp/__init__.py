"""ONP: a graph network that learns by reinforcement which neurons to cut."""

from .onp import onp

__all__ = ["onp"]
