"""Networks that a user's own Python file builds: ``file.py:make``. Run only when the user names the file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from ..errors import ModelError
from .files import one_line, read_bytes


def import_factory(reference: str) -> tuple[Callable[[], nn.Module], str]:
    """Run the file that ``reference`` names and return its function and the file's sha256."""
    file, _, name = reference.rpartition(":")
    path = Path(file)
    digest = hashlib.sha256(read_bytes(path)).hexdigest()
    spec = importlib.util.spec_from_file_location(f"secateur_factory_{digest[:16]}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{path} failed while it was imported: {one_line(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ModelError(f"{path} must define a function '{name}'")
    return cast(Callable[[], nn.Module], factory), digest


def call_factory(factory: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that ``factory`` builds."""
    try:
        net = factory()
    except Exception as error:
        raise ModelError(f"the factory must build a network without arguments: {one_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"the factory must return a torch.nn.Module, got {type(net).__name__}")
    return net
