"""Looking for a backdoor with clean images alone."""

from .inversion import Inverted, Kind, Precision, Suspicion, invert, strengthen, suspected

__all__ = ["Inverted", "Kind", "Precision", "Suspicion", "invert", "strengthen", "suspected"]
