"""MI-, DI- and TI-FGSM: examples that also fool networks other than the one whose gradient made them.

* MI: Dong, Liao, Pang, Su, Zhu, Hu, Li, "Boosting Adversarial Attacks with Momentum", CVPR 2018 (arXiv:1710.06081).
* DI: Xie, Zhang, Zhou, Bai, Wang, Ren, Yuille, "Improving Transferability of Adversarial Examples with Input Diversity",
  CVPR 2019 (arXiv:1803.06978).
* TI: Dong, Pang, Su, Zhu, "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks", CVPR 2019
  (arXiv:1904.02884).

One loop serves all three, because each adds one thing to the one before it; `ti_fgsm` has the settings of all. The last points
come back, as in the papers: the first ones that fool the surrogate are those that fool another network least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MethodError, check_range
from .ball import Ball, Norm, unit
from .common import attack, check_numbers, climb
from .losses import Aim, Loss
from .network import Forward, Network

REACH = 3.0  # standard deviations from the middle of the kernel to its border


def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Take steps along the sign of a running sum of gradients, so that no single step's peculiarity decides.

    ``g_{t+1} = mu * g_t + dL/dx / |dL/dx|_1``, ``x_{t+1} = P(x_t + a * sign(g_{t+1}))`` (L2: ``g / |g|_2``), from ``x_0 = x``.

    Args:
        model: The surrogate; takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        steps: Steps, >= 1.
        step_size: Length ``a`` of a step, >= 0; by default ``eps / steps``.
        decay: ``mu``, the share of the sum that each step keeps, >= 0; 0 is iterative FGSM.
        loss: What to climb: ``cross-entropy``, ``dlr`` (from 4 classes on) or ``margin``.
        targeted: Move to the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`, `eot`).
        generator: Source of all randomness (only networks that draw use any).

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.
    """
    return _momentum(
        model, x, y, eps=eps, norm=norm, steps=steps, step_size=step_size, decay=decay, diversity=0.0, smallest=1.0, kernel=1,
        loss=loss, targeted=targeted, batch_size=batch_size, forward=forward, generator=generator,
    )  # fmt: skip


def di_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    diversity: float = 0.5,
    smallest: float = 0.9,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """MI-FGSM whose gradient is taken at images that were shrunk and put on black at random, with a probability each step.

    ``dL/dx`` of ``L(f(T(x_t)), y)``, where ``T`` resizes an image, with probability ``p``, to a side drawn between
    ``smallest * h`` and ``h`` and pads it with zeros to ``h`` at a random place. Size and place are drawn for each step,
    whether at all for each image.

    Args:
        model: The surrogate; takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        steps: Steps, >= 1.
        step_size: Length ``a`` of a step, >= 0; by default ``eps / steps``.
        decay: ``mu``, the share of the sum that each step keeps, >= 0; 0 is the paper's attack without momentum.
        diversity: ``p``, the probability that an image is resized at a step, in [0, 1].
        smallest: Least side of a resized image, as a share of the whole, in (0, 1].
        loss: What to climb: ``cross-entropy``, ``dlr`` (from 4 classes on) or ``margin``.
        targeted: Move to the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`, `eot`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.

    Differs from the authors' code in that images shrink and keep their outer size (there they grow from 299 to 330 pixels,
    which only networks for any size take), and in that each image, not the batch, is resized or not.
    """
    return _momentum(
        model, x, y, eps=eps, norm=norm, steps=steps, step_size=step_size, decay=decay, diversity=diversity,
        smallest=smallest, kernel=1, loss=loss, targeted=targeted, batch_size=batch_size, forward=forward,
        generator=generator,
    )  # fmt: skip


def ti_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    kernel: int = 15,
    diversity: float = 0.0,
    smallest: float = 0.9,
    loss: Loss = "cross-entropy",
    targeted: bool = False,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """MI-FGSM on gradients that were blurred: nearly the gradient over all small translations of the image.

    ``g_{t+1} = mu * g_t + W * dL/dx / |W * dL/dx|_1``, where ``W *`` is a convolution of each channel with a Gaussian kernel.
    With ``diversity`` it is TI-DI-MI-FGSM.

    Args:
        model: The surrogate; takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1] with any number of channels, or uint8.
        y: True labels, or wanted ones if ``targeted``, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        steps: Steps, >= 1.
        step_size: Length ``a`` of a step, >= 0; by default ``eps / steps``.
        decay: ``mu``, the share of the sum that each step keeps, >= 0.
        kernel: Side of the kernel in pixels, odd, >= 1; its border is three standard deviations from its middle.
        diversity: Probability that an image is resized at a step, in [0, 1] (see `di_fgsm`).
        smallest: Least side of a resized image, as a share of the whole, in (0, 1].
        loss: What to climb: ``cross-entropy``, ``dlr`` (from 4 classes on) or ``margin``.
        targeted: Move to the labels given, not away from them.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`, `eot`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.
    """
    return _momentum(
        model, x, y, eps=eps, norm=norm, steps=steps, step_size=step_size, decay=decay, diversity=diversity,
        smallest=smallest, kernel=kernel, loss=loss, targeted=targeted, batch_size=batch_size, forward=forward,
        generator=generator,
    )  # fmt: skip


def _momentum(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm,
    steps: int,
    step_size: float | None,
    decay: float,
    diversity: float,
    smallest: float,
    kernel: int,
    loss: Loss,
    targeted: bool,
    batch_size: int,
    forward: Forward | None,
    generator: torch.Generator,
) -> Tensor:
    check_numbers(steps=steps, step_size=step_size)
    check_range("decay", decay, 0, 1e6)
    check_range("diversity", diversity, 0, 1)
    check_range("smallest", smallest, 1e-6, 1)
    window, aim, size = gaussian(kernel), Aim(loss, targeted), eps / steps if step_size is None else step_size

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        total = torch.zeros_like(ball.x)

        def step(ball: Ball, points: Tensor, slope: Tensor) -> Tensor:
            slope = blur(slope, window) if kernel > 1 else slope
            total.mul_(decay).add_(even(slope))
            return ball.step(points, total, size)

        return climb(network, ball, y, ball.x, steps=steps, aim=aim, move=step, keep=False)[0]

    def diverse(model: nn.Module, x: Tensor) -> Tensor:
        x = resized(x, diversity, smallest, generator)
        return model(x) if forward is None else forward(model, x)

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=steps, batch_size=batch_size, forward=diverse if diversity else forward,
        generator=generator,
    )  # fmt: skip


def even(slope: Tensor) -> Tensor:
    """Return each image's slope divided by its mean absolute value, so that all steps count alike; 0 stays 0."""
    slope = unit(slope)
    return slope / slope.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)


def gaussian(side: int) -> Tensor:
    """Return one side of a Gaussian kernel ``(side,)`` with sum 1.

    Raises:
        MethodError: The side is not odd, or below 1.
    """
    check_range("kernel", side, 1, 2**15)
    if side % 2 == 0:
        raise MethodError(f"kernel must be odd, got {side}; use {side - 1} or {side + 1}")
    places = torch.linspace(-REACH, REACH, side) if side > 1 else torch.zeros(1)
    weights = torch.exp(-(places**2) / 2)
    return weights / weights.sum()


def blur(slope: Tensor, window: Tensor) -> Tensor:
    """Return the slope with each channel convolved with the kernel ``window x window``, zeros beyond the border."""
    channels, reach = slope.shape[1], len(window) // 2
    row = window.to(slope).expand(channels, 1, 1, -1)
    across = F.conv2d(slope, row, padding=(0, reach), groups=channels)
    return F.conv2d(across, row.transpose(2, 3), padding=(reach, 0), groups=channels)


def resized(x: Tensor, probability: float, smallest: float, generator: torch.Generator) -> Tensor:
    """Return images of which some were shrunk by one drawn factor and padded with zeros at one drawn place."""
    height, width = x.shape[2:]
    share, top, left = torch.rand(3, generator=generator, device=generator.device).tolist()
    share = smallest + (1 - smallest) * share
    h, w = max(1, round(share * height)), max(1, round(share * width))
    above, before = round(top * (height - h)), round(left * (width - w))
    small = F.interpolate(x, size=(h, w), mode="nearest")
    small = F.pad(small, (before, width - w - before, above, height - h - above))
    chosen = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < probability
    return torch.where(chosen[:, None, None, None], small, x)
