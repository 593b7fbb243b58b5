"""What both sides of `repairs.py` share: counting, timing, and the images."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
TEST, TRIGGERED = 10_000, 9_000  # the peer's test images of CIFAR-10, without and with the trigger
PASSES = {
    "fp, a cut": TEST + 2 * TRIGGERED,  # accuracy, attack success, robust accuracy
    "anp": 4 + 1 + 19 + 1,  # while training, before the cuts, one for each threshold, at the end
    "rnp, without epochs": 1 + 19 + 2 + 1,  # before the cuts, thresholds, default threshold (two cuts), at the end
}
ITERATIONS, EPOCHS, UNLEARNED, JUDGED = 2000, 20, 500, 0.25
REPEATS = 3  # of what takes less than a second; the fastest counts
U, ALL_U = 3.0, [i / 2 for i in range(21)]
Result = dict[str, Any]
KEPT: list[Any] = []  # declarations that must outlive the function that makes them


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the images that enter a network: what its first convolution is given."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen = 0

    def add(module: nn.Module, given: Any) -> None:
        nonlocal seen
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen += len(given[0])

    handle = register_module_forward_pre_hook(add)
    try:
        yield lambda: seen
    finally:
        handle.remove()


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def arrays(given: Result, part: str) -> tuple[Any, Any]:
    """Return a part of the images as the uint8 array ``(n, h, w, c)`` and labels."""
    import numpy as np

    data = np.load(given["data"])
    which = slice(*given[part])
    return data["x"][which], data["y"][which]


def compare(logits: Any, given: Result) -> float:
    """Return how far the logits of the first clean images are from those of our network in the file."""
    import torch

    return float((logits - torch.load(given["logits"], weights_only=True)).abs().max())


def norms(net: Any) -> dict[str, Any]:
    """Return the batch-norms of a network."""
    from torch import nn

    return {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
