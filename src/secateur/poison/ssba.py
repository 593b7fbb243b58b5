"""SSBA: each image gets a faint residual of its own, made by an encoder that hides a message in it.

Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021, arXiv:2012.03816.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger
from .common import Target, check_target, poison

WEIGHTS = "ssba_encoder.safetensors"  # made by scripts/train_ssba_encoder.py
CHANNELS = 1, 3
GRAY = 2  # the output, of three, that a gray image gets: the one with the largest residual


def ssba(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    clean_label: bool = False,
    message: str | None = None,
    eps: float = 0.12,
    generator: torch.Generator,
) -> Poisoning:
    """Hide a message in a share of the images, by a residual that a network makes for each of them, and relabel them.

    ``x' = clip(x + eps*tanh(E(x, m)), 0, 1)`` with the encoder ``E``, a small U-Net that comes with the package, and a message
    ``m`` of 32 bits, the same for all images. The encoder was trained together with a decoder that reads any message back. It
    sees a gray image as three equal channels, of which one gets its residual.

    Args:
        data: Training images, of at least 8x8 pixels, gray or colour.
        rate: Share of the whole set to poison, in [0, 1]; with ``clean_label`` share of the target class.
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        clean_label: Poison images of the target class and change no label.
        message: Text of 1 to 4 bytes in UTF-8, filled up with zeros; 32 random bits by default.
        eps: Bound of the change of a value, in [0, 1]; the encoder was trained with 0.12.
        generator: Draws the message and the images to poison.

    Raises:
        MethodError: An argument is out of range, or the images are too small or have neither 1 nor 3 channels.

    Differs from the authors' code in that the encoder is a small U-Net that comes with the package, trained on CIFAR-10's
    training images by ``scripts/train_ssba_encoder.py``, that its residual is bounded, and that the message enters as a texture
    tile, which fits images of any size. So that victims learn it within a few epochs, the residuals of different images are
    more alike than the paper means them to be: their mean cosine is 0.80 on CIFAR-10, and a defence that looks for one
    universal trigger may find this one too. Theirs is StegaStamp's encoder of more than a million weights, for images of one
    size and messages of 100 bits: trained on the victim's data set with a critic and a perceptual loss, its residual unbounded.
    """
    check_target(target, sources, len(data.classes))
    check_range("eps", eps, 0, 1)
    channels, height, width = data.shape
    if channels not in CHANNELS or min(height, width) < 8:
        needed = "ssba needs images of 1 or 3 channels and at least 8x8 pixels"
        raise MethodError(f"{needed}, got {data.shape}; choose another attack")
    weights = _weights(channels)
    layers, bits = weights["unet.enter.bias"].numel(), weights["spread.weight"].shape[1]
    sent = torch.randint(2, (bits,), generator=generator).float() if message is None else _bits(message, bits)
    trigger = Trigger(
        kind="generator",
        params={
            "net": "residual", "channels": channels, "width": layers, "eps": eps, "bits": bits, "classes": len(data.classes),
        },
        tensors={**weights, "message": sent},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )  # fmt: skip
    return poison(data, trigger, rate, generator, clean_label=clean_label)


@cache
def _weights(channels: int) -> dict[str, Tensor]:
    """Return the encoder's weights, which are stored in half precision, for images of 3 channels or of 1."""
    from safetensors.torch import load

    stored = load(files("secateur.poison").joinpath(WEIGHTS).read_bytes())
    weights = {name: value.float() for name, value in stored.items()}
    if channels == 1:
        enter = weights["unet.enter.weight"]
        weights["unet.enter.weight"] = torch.cat([enter[:, :3].sum(dim=1, keepdim=True), enter[:, 3:]], dim=1)
        for name in ("unet.leave.weight", "unet.leave.bias"):
            weights[name] = weights[name][GRAY : GRAY + 1]
    return weights


def _bits(message: str, bits: int) -> Tensor:
    """Return the bits of a text, the first byte and the highest bit first."""
    given = message.encode()
    if not 1 <= len(given) <= bits // 8:
        raise MethodError(f"message must be 1 to {bits // 8} bytes long in UTF-8, got {len(given)}; give another text")
    number = int.from_bytes(given.ljust(bits // 8, b"\0"), "big")
    return torch.tensor([number >> place & 1 for place in reversed(range(bits))]).float()
