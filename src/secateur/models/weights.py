"""Weights that come from outside: read without running code, compared by name and shape, and given to a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ModelError
from ..state import evaluating
from .files import one_line, read_bytes
from .registry import COUNTERS, Shapes, shapes_of


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    content = read_bytes(path)
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path} is not a valid safetensors file: {one_line(error)}") from error


def assign(net: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give ``net`` the tensors of ``state``, in place; afterwards they are the network's own.

    Args:
        net: A network, possibly on the meta device.
        state: Tensors by name. Batch-norm counters may be missing; floating types are converted to the network's.
        what: What to call the network in messages.

    Raises:
        ModelError: Names, shapes or types differ, or a value is NaN or infinite.
    """
    own = net.state_dict()
    check_shapes(shapes_of(own), shapes_of(state), what)
    given = {key: value for key, value in state.items() if key in own}
    for key, value in given.items():
        given[key] = value = _cast(key, value, own[key].dtype)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"weights must be finite, but {_quote(key)} holds NaN or infinite values")
    counters = {key: torch.zeros((), dtype=torch.int64) for key in own if key.endswith(COUNTERS)}
    net.load_state_dict(counters | given, assign=True)


def check_shapes(wanted: Shapes, got: Shapes, what: str) -> None:
    """Raise `ModelError` with the first differences unless both have the same names and shapes."""
    problems = [f"{_quote(key)} is missing" for key in wanted if key not in got]
    problems += [f"{_quote(key)} is not part of it" for key in got if key not in wanted]
    problems += [
        f"{_quote(key)} must have shape {shape}, got {got[key]}"
        for key, shape in wanted.items()
        if key in got and got[key] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more differences)" if len(problems) > 3 else ""
        raise ModelError(f"these weights do not fit {what}: {'; '.join(problems[:3])}{more}")


def count_outputs(net: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return how many logits ``net`` gives for one image of this shape, by trying.

    Raises:
        ModelError: The network rejects such images, or does not return ``(batch, classes)``.
    """
    example = next(iter(net.state_dict().values()), torch.zeros(()))
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    try:
        with evaluating(net), torch.no_grad():
            logits = net(torch.zeros(1, *input_shape, device=example.device, dtype=dtype))
    except Exception as error:
        raise ModelError(f"the network does not take images of shape {input_shape}: {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(f"the network must return logits (batch, classes), got {getattr(logits, 'shape', type(logits))}")
    return logits.shape[1]


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value
    if value.is_floating_point() and dtype.is_floating_point:
        return value.to(dtype)
    raise ModelError(f"{_quote(key)} must be of type {dtype}, got {value.dtype}")


def _quote(key: str) -> str:
    """A name from a file may hold anything: escape and shorten it."""
    return ascii(key if len(key) <= 100 else key[:100] + "...")
