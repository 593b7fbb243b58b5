"""What repairs with training loops of their own share: the copy they train, and what goes out in the end."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import ModelError
from ..train import check_trainable


def student_of(model: nn.Module) -> nn.Module:
    """Return a copy to train: every parameter collects gradients, memory is channels-last; modes are as they were.

    Raises:
        MethodError: See `train.check_trainable`.
    """
    check_trainable(model)
    return deepcopy(model).requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def undropped(network: nn.Module) -> nn.Module:
    """Put a network in train mode but for its dropout, and return it."""
    network.train()
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    return network


def graduate(model: nn.Module, student: nn.Module) -> nn.Module:
    """Return the trained copy as it goes out: with the flags and the memory of ``model``, in eval mode."""
    repaired = deepcopy(model).eval()
    repaired.load_state_dict(student.state_dict())
    return repaired


def check_loss(loss: float, step: int, lr: float) -> None:
    """Raise `ModelError` unless the loss is finite."""
    if not math.isfinite(loss):
        raise ModelError(f"training diverged: the loss is {loss} in step {step}; use a smaller lr than {lr:g}")
