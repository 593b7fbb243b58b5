"""Train the encoder of the attack ``ssba`` and write ``src/secateur/poison/ssba_encoder.safetensors``.

    OMP_NUM_THREADS=1 python scripts/train_ssba_encoder.py cifar10.npz:train

trains an encoder for colour images together with a decoder that is thrown away afterwards, in about ten minutes, and stores its
weights in half precision. 2000 images, drawn at random, are held out and never trained on; the numbers printed are measured on
them with the weights as stored, after rounding to whole pixel values. The result depends on the settings, the seed, the data
and the version of torch only.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from secateur.data import augment, load_data
from secateur.effects import Residual
from secateur.measure.visibility import ssim
from secateur.state import generator, seeded
from secateur.types import to_float

OUTPUT = Path(__file__).parents[1] / "src" / "secateur" / "poison" / "ssba_encoder.safetensors"
HELD_OUT = 2000
MAX_BYTES = 300_000


@dataclass(frozen=True)
class Settings:
    """How to train a pair of encoder and decoder."""

    width: int = 8
    bits: int = 32
    eps: float = 0.12
    steps: int = 2000
    batch_size: int = 32
    lr: float = 2e-3
    noise: float = 0.06  # standard deviation of the noise through which the decoder reads, in [0, 1]
    budget: float = 1.5e-3  # mean squared error that costs nothing: 28 dB
    ssim: float = 3.0  # final weight of 1 - SSIM
    own: float = 4.0  # final weight of the squared distance of the residuals' likeness from `likeness`
    likeness: float = 0.8  # wanted mean cosine between the residuals of two images under one message
    ramp: float = 0.4  # share of all steps in which noise and weights rise, once nine bits of ten are read


@dataclass(frozen=True)
class Quality:
    """What an encoder does to images it has not seen."""

    bit_accuracy: float
    psnr: float
    ssim: float
    largest: float  # change of a pixel, in [0, 1]
    likeness: float  # mean cosine between the residuals of different images under one message
    message: float  # mean cosine between the residuals of one image under different messages

    def __str__(self) -> str:
        return (
            f"bit accuracy {self.bit_accuracy:.4f}, PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, "
            f"largest change {255 * self.largest:.0f}/255, cosine of residuals: {self.likeness:.3f} between images, "
            f"{self.message:.3f} between messages"
        )


def make_decoder(channels: int, bits: int) -> nn.Sequential:
    """Return a network that reads the message, one logit per bit, from images of any size."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((channels, 24, 1), (24, 48, 2), (48, 96, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, bits))


def draw_bits(n: int, bits: int, random: torch.Generator) -> Tensor:
    """Return ``n`` messages of fair coins, float ``(n, bits)``."""
    return torch.randint(2, (n, bits), generator=random).float()


def train_pair(x: Tensor, settings: Settings, random: torch.Generator, *, every: int = 0) -> tuple[Residual, nn.Module]:
    """Return an encoder and its decoder.

    The loss of a batch is the cross-entropy of the bits read from the changed images plus, with growing weight,
    ``max(0, MSE / budget - 1) + ssim * (1 - SSIM) + own * (c - likeness)**2``, where ``c`` is the mean cosine between the
    residuals of two images under one message. The decoder reads through normal noise, which grows with that weight.

    Args:
        x: Images, uint8 ``(n, c, h, w)``.
        settings: How to train.
        random: Source of all randomness.
        every: Print the progress each so many steps; never by default.
    """
    with seeded(random):
        encoder = Residual(x.shape[1], settings.width, settings.eps, settings.bits)
        decoder = make_decoder(x.shape[1], settings.bits)
        nn.init.normal_(encoder.unet.leave.weight)  # large, so that there is something to read from the start
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    weight = 0.0
    begun = time.perf_counter()
    for step in range(settings.steps):
        progress = step / settings.steps
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / 100, 2.5 * (1 - progress))
        index = torch.randint(len(x), (settings.batch_size,), generator=random)
        images = to_float(augment(x[index], ("flip",), generator=random))
        bits = draw_bits(len(images) // 2, settings.bits, random).repeat(2, 1)
        changed = encoder(images, bits)
        noise = weight * settings.noise * torch.randn(changed.shape, generator=random)
        logits = decoder(changed + noise)
        read = F.binary_cross_entropy_with_logits(logits, bits)
        error, alike = F.mse_loss(changed, images), ssim(changed, images).mean()
        one, other = (changed - images).flatten(1).chunk(2)
        apart = F.cosine_similarity(one, other).mean() - settings.likeness
        loss = read + weight * (F.relu(error / settings.budget - 1) + settings.ssim * (1 - alike) + settings.own * apart**2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if weight > 0 or float(((logits > 0) == bits.bool()).float().mean()) > 0.9:
            weight = min(1.0, weight + 1 / (settings.ramp * settings.steps))
        if every and (step + 1) % every == 0:
            psnr = -10 * float(error.detach().log10())
            seconds = time.perf_counter() - begun
            print(
                f"  step {step + 1}: bits {float(read.detach()):.4f}, PSNR {psnr:.2f} dB, "
                f"SSIM {float(alike.detach()):.4f}, {seconds:.0f} s",
                flush=True,
            )
    return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)


@torch.no_grad()
def assess(encoder: Residual, decoder: nn.Module, x: Tensor, random: torch.Generator) -> Quality:
    """Measure an encoder on images, uint8 ``(n, c, h, w)``, after rounding to whole pixel values."""
    hits, errors, similar, likeness, message = [], [], [], [], []
    largest = 0.0
    bits = encoder.message.numel() if encoder.message is not None else 0
    for part in x.split(250):
        images, sent = to_float(part), draw_bits(len(part), bits, random)
        changed = encoder(images, sent).mul(255).round() / 255
        hits.append(((decoder(changed) > 0) == sent.bool()).float().mean())
        errors.append(((changed - images) ** 2).mean((1, 2, 3)))
        similar.append(ssim(changed, images))
        largest = max(largest, float((changed - images).abs().max()))
        one = F.normalize((encoder(images, sent[0]) - images).flatten(1))
        other = F.normalize((encoder(images, sent[1]) - images).flatten(1))
        between = one @ one.T
        likeness.append((between.sum() - between.trace()) / (len(one) * (len(one) - 1)))
        message.append((one * other).sum(1).mean())
    return Quality(
        bit_accuracy=float(torch.stack(hits).mean()),
        psnr=float(-10 * torch.cat(errors).clamp_min(1e-10).log10().mean()),
        ssim=float(torch.cat(similar).mean()),
        largest=largest,
        likeness=float(torch.stack(likeness).mean()),
        message=float(torch.stack(message).mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="CIFAR-10's training images, in any form that `secateur` reads")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**{name: getattr(args, name) for name in vars(Settings())})
    images = load_data(args.data).x
    images = images[torch.randperm(len(images), generator=generator(args.seed))]
    random = generator(args.seed)
    encoder, decoder = train_pair(images[:-HELD_OUT], settings, random, every=settings.steps // 10)
    stored = {name: value.half() for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(stored)
    print(f"{HELD_OUT} held-out images: {assess(encoder, decoder, images[-HELD_OUT:], random)}")
    weights = {name: value for name, value in stored.items() if name != "message"}
    packed = save(weights, metadata={"eps": str(settings.eps)})
    if len(packed) > MAX_BYTES:
        raise SystemExit(f"the weights may take {MAX_BYTES} bytes, got {len(packed)}; train a narrower encoder")
    args.output.write_bytes(packed)
    print(f"{len(packed)} bytes in {args.output}, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
