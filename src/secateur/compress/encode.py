"""How small a file a pruned or quantised network fits into: its zeros as a bitmap, its whole numbers as bytes, compressed.

Each tensor is kept in the smaller of two forms: all its values, or a bitmap (one bit a value, 1 where it is not 0) and the
values that are not 0. Values are float32, or, of a quantised layer, int8 with the steps beside them. The whole, a safetensors
file, is then compressed by zlib (RFC 1950, level 9). Nothing is lost: `decode` gives the same tensors back, bit by bit. Zeros
of quantised layers are +0, as `quantise` leaves them; a minus sign that somebody else gave them is not kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ModelError
from ..models import core, quantisation_of
from ..models.quantised import check_grid, whole

LARGEST = 2**32  # bytes that a file may unpack to


def encode(model: nn.Module) -> bytes:
    """Return the state of a network, relative to ``core(model)``, as described above.

    Raises:
        ModelError: The network is quantised, but weights have left their grid.
    """
    quantisation, net = quantisation_of(model), core(model)
    state = {key: value.detach().cpu() for key, value in net.state_dict().items()}
    parts: dict[str, Tensor] = {}
    if quantisation is not None:
        check_grid(net, quantisation)
        for layer, scale in quantisation.weights.items():
            key = f"{layer}.weight"
            parts[f"steps/{key}"] = scale.cpu()
            state[key] = whole(state[key], scale.cpu(), quantisation.weight_bits).to(torch.int8)
    for key, value in state.items():
        parts |= _packed(key, value.contiguous())
    return zlib.compress(safetensors.torch.save({key: value.clone() for key, value in parts.items()}), 9)


def decode(content: bytes) -> dict[str, Tensor]:
    """Return the tensors that `encode` kept, by name.

    Raises:
        ModelError: The content is damaged, or unpacks to more than 4 GiB.
    """
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(content, LARGEST)
        if not unpacker.eof:
            raise ModelError(f"an encoded network must be whole and unpack to at most {LARGEST} bytes")
        parts = safetensors.torch.load(raw)
        return {key[7:]: _unpacked(key[7:], parts) for key in parts if key.startswith("values/")}
    except (zlib.error, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"this is no encoded network: {error}") from error


def _packed(key: str, value: Tensor) -> dict[str, Tensor]:
    kept = value.ne(0) | (
        value.signbit() if value.is_floating_point() else False
    )  # -0.0 is not 0 here: it would come back as 0
    bitmap = torch.from_numpy(np.packbits(kept.numpy().reshape(-1)))
    values = value[kept]
    if bitmap.numel() + values.numel() * value.element_size() >= value.numel() * value.element_size():
        return {f"values/{key}": value}
    shape = torch.tensor(value.shape, dtype=torch.int64)
    return {f"values/{key}": values, f"bitmap/{key}": bitmap, f"shape/{key}": shape}


def _unpacked(key: str, parts: Mapping[str, Tensor]) -> Tensor:
    values = parts[f"values/{key}"]
    if f"bitmap/{key}" in parts:
        if parts[f"bitmap/{key}"].dtype != torch.uint8 or parts[f"shape/{key}"].dtype != torch.int64:
            raise ModelError(f"the bitmap of {key[:60]!a} must be uint8, and its shape int64")
        shape = parts[f"shape/{key}"].tolist()
        count = int(np.prod(shape, dtype=np.int64))
        if count > 8 * parts[f"bitmap/{key}"].numel():
            raise ModelError(f"the bitmap of {key[:60]!a} is too short for {shape}")
        kept = torch.from_numpy(np.unpackbits(parts[f"bitmap/{key}"].numpy(), count=count)).bool()
        if int(kept.sum()) != values.numel():
            raise ModelError(f"the bitmap of {key[:60]!a} must mark {values.numel()} values, got {int(kept.sum())}")
        full = torch.zeros(count, dtype=values.dtype)
        full[kept] = values
        values = full.reshape(shape)
    steps = parts.get(f"steps/{key}")
    if steps is not None and (values.ndim < 2 or steps.shape != values.shape[:1]):
        raise ModelError(f"{key[:60]!a} of shape {tuple(values.shape)} must have a step for each row, got {tuple(steps.shape)}")
    return values if steps is None else values.float() * steps.reshape(-1, *[1] * (values.ndim - 1))
