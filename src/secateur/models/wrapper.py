"""The network every stage works on: normalisation inside, so that images live in [0, 1] everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


class Classifier(nn.Module):
    """A network with its normalisation, its class names and the description that rebuilds it.

    Attributes:
        net: The network itself; names of parameters and channels in this project are relative to it.
        mean: Subtracted from the images, ``(c, 1, 1)``; not part of the state dict.
        std: Divides the images, ``(c, 1, 1)``; not part of the state dict.
        classes: Class names, in label order.
        input_shape: Shape of one image, ``(c, h, w)``.
        arch: ``name`` and ``kwargs`` for `registry.build`, or the ``factory`` (``ref``, ``sha256``) of a user's code.
        channels: Site -> original indices of the channels kept, for a network made smaller than ``arch`` says.
        origin: What a record says of the file it came from (path, sha256, format, loader, findings); None when made here.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        classes: Sequence[str],
        input_shape: tuple[int, int, int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        arch: Mapping[str, Any] | None = None,
        channels: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", _per_channel("mean", mean, input_shape[0], 0.0), persistent=False)
        self.register_buffer("std", _per_channel("std", std, input_shape[0], 1.0), persistent=False)
        if not bool((self.std > 0).all()):
            raise ModelError(f"std must be above 0, got {self.std.flatten().tolist()}")
        self.classes = tuple(classes)
        self.input_shape = input_shape
        self.arch = {"name": None, "kwargs": {}, "factory": None} | dict(arch or {})
        self.origin: Mapping[str, Any] | None = None
        self.channels = {site: list(kept) for site, kept in (channels or {}).items()}

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for images ``(batch, c, h, w)``, float in [0, 1]."""
        return self.net((x - self.mean) / self.std)


def core(model: nn.Module) -> nn.Module:
    """Return the network inside a `Classifier`, or the model itself."""
    return model.net if isinstance(model, Classifier) else model


def _per_channel(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    if values is None:
        values = [default] * channels
    if len(values) != channels:
        raise ModelError(f"{name} must have one value per channel ({channels}), got {len(values)}")
    tensor = torch.tensor(values, dtype=torch.float32).reshape(channels, 1, 1)
    if not bool(tensor.isfinite().all()):
        raise ModelError(f"{name} must be finite, got {list(values)}")
    return tensor
