"""What keeps state: of a network and of the random generators, put back as it was found; of a long run, to go on after a kill.

Every method runs inside the context managers, so that the model that comes in goes out with the same flags per submodule.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ModelError

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


def save_progress(path: Path, state: Mapping[str, Any], fingerprint: str) -> None:
    """Write how far a run is, in place of what stands there once all is written.

    Args:
        path: File to write, in a folder that is made if need be.
        state: Tensors, numbers, texts, lists and dicts.
        fingerprint: Of the run: everything its result depends on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save({**state, "fingerprint": fingerprint}, temporary)
    temporary.replace(path)


def load_progress(path: Path, fingerprint: str) -> dict[str, Any]:
    """Return what `save_progress` wrote.

    Raises:
        ModelError: That is not there, damaged, or of another run.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"cannot resume from '{path}': {error.strerror}; make it readable, or name another") from error
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = state["fingerprint"]
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"cannot resume from '{path}': it is not a training checkpoint; delete it to start anew") from error
    if known != fingerprint:
        raise ModelError(
            f"cannot resume from '{path}': it belongs to a run with other settings, data or seed; delete it to start anew"
        )
    return state
