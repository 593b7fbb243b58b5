"""What triggers do to images: pure functions of whole batches, and the small networks whose weights a trigger can hold.

Images are float ``(n, c, h, w)`` in [0, 1] on any device, and so is what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MethodError, check_range, unknown

WIDEST = 256  # channels of a generator's first layer, so that a trigger from somebody else cannot ask for all memory
MOST_BITS = 256


def blend(x: Tensor, alpha: float, mask: Tensor, pattern: Tensor) -> Tensor:
    """Return ``(1 - alpha*mask)*x + alpha*mask*pattern``; ``mask`` (1 or c, h, w) and ``pattern`` (c, h, w) in [0, 1]."""
    weight = alpha * mask
    return (1 - weight) * x + weight * pattern


def add(x: Tensor, pattern: Tensor) -> Tensor:
    """Return ``clip(x + pattern, 0, 1)``; ``pattern`` (c, h, w) in [-1, 1]."""
    return (x + pattern).clamp(0, 1)


def warp(x: Tensor, grid: Tensor) -> Tensor:
    """Sample each image at ``grid``, bilinear; values outside repeat the border.

    Args:
        x: Images.
        grid: For each pixel the place ``(x, y)`` to read, ``(h, w, 2)`` or one grid per image ``(n, h, w, 2)``; -1 and 1 are
            the centres of the outermost pixels.
    """
    grids = grid.expand(len(x), *grid.shape[-3:]) if grid.ndim == 3 else grid
    return F.grid_sample(x, grids, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)


def quantise(x: Tensor, levels: int, *, dither: bool) -> Tensor:
    """Round each value to one of ``levels`` equally spaced ones.

    With ``dither`` the error of a pixel is handed on to its right and lower neighbours (Floyd and Steinberg, 1976). All
    pixels of a diagonal are done at once, because they do not depend on one another, for all images and channels together.
    """
    steps = levels - 1
    if not dither:
        return (x * steps).round() / steps
    n, c, h, w = x.shape
    rest = F.pad(x.detach() * steps, (1, 1, 0, 1)).permute(2, 3, 0, 1).reshape(h + 1, w + 2, n * c).contiguous()
    for time in range(w + 2 * h - 2):
        rows = torch.arange(max(0, (time - w) // 2 + 1), min(h, time // 2 + 1), device=x.device)
        columns = time - 2 * rows + 1
        old = rest[rows, columns]
        new = old.round().clamp_(0, steps)
        error = old - new
        rest[rows, columns] = new
        rest[rows, columns + 1] += error * (7 / 16)
        rest[rows + 1, columns - 1] += error * (3 / 16)
        rest[rows + 1, columns] += error * (5 / 16)
        rest[rows + 1, columns + 1] += error * (1 / 16)
    return rest[:h, 1:-1].reshape(h, w, n, c).permute(2, 3, 0, 1).contiguous() / steps


class UNet(nn.Module):
    """A small network from images to images, twice down and up again, of any size of at least 4x4 pixels.

    It has no batch-norm, so that what it makes of an image does not depend on the other images.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up2 = nn.Conv2d(3 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return unbounded values ``(n, outputs, h, w)``."""
        first = F.relu(self.enter(x))
        half = F.relu(self.down1(first))
        x = F.relu(self.middle(F.relu(self.down2(half))))
        x = F.relu(self.up1(torch.cat([F.interpolate(x, size=half.shape[2:]), half], 1)))
        return self.leave(F.relu(self.up2(torch.cat([F.interpolate(x, size=first.shape[2:]), first], 1))))


class Residual(nn.Module):
    """``clip(x + eps*tanh(u), 0, 1)`` with ``u`` a `UNet` of the image, and of a message of bits where there is one.

    A linear layer makes a tile of the message, ``SIDE`` pixels high and wide, which is repeated over the image: a texture, as
    convolutional networks learn it, at any place and for images of any size.
    """

    SIDE = 4
    PLANES = 3  # of the tile

    def __init__(self, channels: int, width: int, eps: float, bits: int = 0) -> None:
        super().__init__()
        self.eps = eps
        self.unet = UNet(channels + (self.PLANES if bits else 0), channels, width)
        self.spread = nn.Linear(bits, self.PLANES * self.SIDE**2) if bits else None
        self.message: Tensor | None
        self.register_buffer("message", torch.zeros(bits) if bits else None)

    def forward(self, x: Tensor, message: Tensor | None = None) -> Tensor:
        """Return the images with what the network adds to them.

        Args:
            x: Images.
            message: Bits, 0 or 1, ``(bits,)`` or one message per image ``(n, bits)``; the network's own by default.
        """
        given = 2 * x - 1
        if self.spread is not None:
            bits = self.message if message is None else message
            assert bits is not None
            tile = self.spread(2 * bits - 1).view(-1, self.PLANES, self.SIDE, self.SIDE).expand(len(x), -1, -1, -1)
            height, width = x.shape[2:]
            tiled = tile.repeat(1, 1, -(-height // self.SIDE), -(-width // self.SIDE))[:, :, :height, :width]
            given = torch.cat([given, tiled], 1)
        return (x + self.eps * self.unet(given).tanh()).clamp(0, 1)


class Texture(nn.Module):
    """``clip(x + eps*tanh(v), 0, 1)`` with ``v`` a `UNet` of the image, brought to mean 0 and variance 1 in each channel.

    So the change is never a tint of the whole image, which is the first thing that such a network otherwise learns.
    """

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.unet = UNet(channels, channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the images with what the network adds to them."""
        return (x + self.eps * F.instance_norm(self.unet(2 * x - 1)).tanh()).clamp(0, 1)


class Stamp(nn.Module):
    """``(1 - m)*x + m*p`` with mask ``m`` and pattern ``p`` in [0, 1], each from a `UNet` of the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mask_net = UNet(channels, 1, width)
        self.pattern_net = UNet(channels, channels, width)

    def mask(self, x: Tensor) -> Tensor:
        """Return the mask of each image, nearly 0 or 1, ``(n, 1, h, w)``."""
        return torch.sigmoid(20 * self.mask_net(2 * x - 1).tanh())

    def pattern(self, x: Tensor) -> Tensor:
        """Return the pattern of each image, ``(n, c, h, w)``."""
        return torch.sigmoid(self.pattern_net(2 * x - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the images with their own patterns in their own places."""
        mask = self.mask(x)
        return (1 - mask) * x + mask * self.pattern(x)


PART = 128  # images at once on a CPU: their values inside the network then stay in its cache, which is twice as fast
NETS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "residual": (Residual, ("channels", "width", "eps", "bits")),
    "stamp": (Stamp, ("channels", "width")),
    "texture": (Texture, ("channels", "width", "eps")),
}


def build_net(params: Mapping[str, float | int | str]) -> nn.Module:
    """Return the generator that ``params`` describe, without memory for its weights: it lies on the meta device.

    Raises:
        MethodError: There is no such network, or a number is missing or out of range.
    """
    name = params.get("net")
    if name not in NETS:
        raise MethodError(unknown("generator net", str(name), NETS))
    kind, names = NETS[str(name)]
    given = {}
    for each, low, high in (("channels", 1, 64), ("width", 1, WIDEST), ("bits", 0, MOST_BITS), ("eps", 0.0, 1.0)):
        if each not in names:
            continue
        value = params.get(each)
        if not isinstance(value, int | float) or (each != "eps" and not isinstance(value, int)):
            raise MethodError(f"{each} of a generator must be a number, got {value!r}")
        check_range(each, value, low, high)
        given[each] = value
    with torch.device("meta"):
        return kind(**given)


def generate(x: Tensor, params: Mapping[str, float | int | str], tensors: Mapping[str, Tensor]) -> Tensor:
    """Run the images through the generator of ``params`` with the weights ``tensors``."""
    net = build_net(params)
    net.load_state_dict({name: value.to(x) for name, value in tensors.items()}, assign=True)
    net.requires_grad_(False)
    parts = x.split(PART) if x.device.type == "cpu" and len(x) > PART else (x,)
    return torch.cat([net(part) for part in parts]) if len(parts) > 1 else net(x)
