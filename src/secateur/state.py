"""Context managers that leave a network and the random state as they found them.

Every method runs inside these, so that the model that comes in goes out with the same flags per submodule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_SCALE: ContextVar[float] = ContextVar("scale of batch sizes", default=1.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the whole model in eval mode; afterwards each submodule gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Let no parameter collect gradients; afterwards each gets its own ``requires_grad`` back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Draw a seed from ``generator`` for torch calls that take none (initialisation, dropout); restore the RNG after."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with ``count`` intra-op threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def smaller_batches(scale: float) -> Iterator[None]:
    """Scale every batch size that asks `batch_size`, so that a run that needed too much memory can be tried again."""
    token = _SCALE.set(_SCALE.get() * scale)
    try:
        yield
    finally:
        _SCALE.reset(token)


def batch_size(wanted: int) -> int:
    """Return how many images to take at once where ``wanted`` are normal."""
    return max(1, int(wanted * _SCALE.get()))


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator at ``seed``."""
    return torch.Generator().manual_seed(seed)
