"""NPD, neural polarizer: put a small linear filter into a frozen network and train only that.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features",
NeurIPS 2023 (arXiv:2306.16697).
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data import count_steps, passes
from ..errors import MethodError, check_range, unknown
from ..models import core
from ..models.channels import trace_channels
from ..train import OnStep, check_trainable
from ..types import ImageSet, Repaired
from .student import check_loss

STEP = 0.1  # signed step of the perturbation
ENOUGH = 0.6  # share of images that reach their target at which the perturbation is left as it is
LARGEST = 80.0  # cross-entropy
ROUNDING = 1e-4  # keeps log(1 - p) finite


def npd(
    model: nn.Module,
    clean: ImageSet,
    *,
    layer: str | None = None,
    epochs: int = 50,
    lr: float = 0.01,
    eps: float = 3.0,
    steps: int = 2,
    adversarial: float = 0.4,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a matrix that mixes the channels a layer reads, so that perturbed features are filtered out; all else is frozen.

    The matrix ``A`` starts as the identity and stands as a 1x1 convolution before ``layer``; the layer's weight becomes
    ``W A``, which is the same network exactly, so that none is added. For each batch a perturbation per image (at most ``eps``
    long, signed steps) seeks the likeliest wrong class ``t``; then a step of SGD (momentum 0.9, weight decay 5e-4) descends
    ``CE(f(x), y) + adversarial * (CE(f(x'), f(x)) - log(1 - p_k(x')) - log(1 - p_t(x')))`` for perturbed ``x'``, where ``k`` is
    the likeliest wrong class of ``x'``.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        layer: Convolution (not grouped) or linear layer before which the matrix stands; None is the last convolution but one
            on the way of the data, the last where only the first layer comes before it, or so with linear layers.
        epochs: Passes over the images, >= 0.
        lr: Learning rate, > 0.
        eps: Length of the perturbation (l2), >= 0; the paper's is for 32x32 colour images.
        steps: Of the perturbation, >= 0.
        adversarial: Weight of each of the three losses on perturbed images, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: There are no clean images.
        MethodError: An argument is out of range, or there is no such layer; or see `train.check_trainable`.
        ModelError: The network cannot be traced, or training diverged.

    Differs from the authors' code in that the filter has no batch-norm, and so no warm-up for its statistics: a scale is part
    of the matrix, but a shift before a convolution that pads with zeros could not be made part of the network. The place is
    found by following the data; there it is a name in one network.
    """
    _check(epochs=epochs, lr=lr, eps=eps, steps=steps, adversarial=adversarial, batch_size=batch_size)
    check_trainable(model)
    plugged = Polarizer(model, clean.shape, layer)
    optimizer = torch.optim.SGD([plugged.matrix], lr=lr, momentum=0.9, weight_decay=5e-4)
    total = epochs * count_steps(len(clean), batch_size)
    log: dict[str, float] = {}
    batches = passes(clean, batch_size, epochs, device=plugged.matrix.device, generator=generator)
    for step, (x, y) in enumerate(batches):
        perturbed, own, target = perturb(plugged, x, y, eps=eps, steps=steps)
        logits = plugged(torch.cat([x, perturbed]))
        loss = polarizing_loss(logits[: len(x)], logits[len(x) :], y, own, target, adversarial=adversarial)
        value = float(loss.detach())
        check_loss(value, step + 1, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log = {"loss": value, "matrix_moved": float((plugged.matrix.detach() - plugged.identity).norm())}
        if on_step is not None:
            on_step(step + 1, total)
    repaired = deepcopy(model).eval()
    with torch.no_grad():
        core(repaired).get_parameter(f"{plugged.layer}.weight").copy_(plugged.folded())
    moved = log.get("matrix_moved", 0.0) > 0
    return Repaired(repaired, None, log=log, notes=(f"the filter is part of '{plugged.layer}'",) * moved)


class Polarizer:
    """A frozen copy of a network with a matrix on the channels that one layer reads.

    Attributes:
        layer: The layer, relative to ``core(model)``.
        identity: What the matrix starts as, ``(channels, channels)``.
        matrix: The matrix; it collects gradients.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int], layer: str | None = None) -> None:
        """Copy ``model`` and find the layer.

        Raises:
            MethodError: There is no such layer.
            ModelError: The network cannot be traced.
        """
        self.layer = _choose(model, input_shape, layer)
        self._network = deepcopy(model).requires_grad_(False).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._name = self.layer + ".weight" if core(model) is model else f"net.{self.layer}.weight"
        self._weight = self._network.get_parameter(self._name)
        self.identity = torch.eye(self._weight.shape[1], device=self._weight.device, dtype=self._weight.dtype)
        self.matrix = self.identity.clone().requires_grad_()

    def folded(self) -> Tensor:
        """Return the layer's weight with the matrix in it."""
        return torch.einsum("oi...,ij->oj...", self._weight, self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits of images in [0, 1]."""
        return functional_call(self._network, {self._name: self.folded()}, (x,))


def perturb(plugged: Polarizer, x: Tensor, y: Tensor, *, eps: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Perturb each image towards its likeliest wrong class.

    Returns:
        The perturbed images, in [0, 1]; the answers before; and the classes sought.
    """
    noise = torch.zeros_like(x)
    with torch.no_grad():
        logits = plugged(x)
    own, target = logits.argmax(dim=1), _likeliest_wrong(logits, y)
    for step in range(steps):
        noise.requires_grad_()
        logits = plugged((x + noise).clamp(0, 1))
        if step and float((logits.argmax(dim=1) == target).float().mean()) > ENOUGH:
            break
        loss = F.cross_entropy(logits, target, reduction="none").clamp(max=LARGEST).mean()
        [slope] = torch.autograd.grad(loss, [noise])
        with torch.no_grad():
            noise = noise - STEP * slope.sign()
            length = noise.flatten(1).norm(dim=1).clamp(min=1e-12)
            noise = noise * (eps / length).clamp(max=1)[:, None, None, None]
    return (x + noise.detach()).clamp(0, 1), own, target


def polarizing_loss(logits: Tensor, perturbed: Tensor, y: Tensor, own: Tensor, target: Tensor, *, adversarial: float) -> Tensor:
    """Return the loss of the answers to a batch and to its perturbed images; see `npd`."""
    log_free = (1 + ROUNDING - perturbed.softmax(dim=1)).log()
    wrong = torch.stack([_likeliest_wrong(perturbed, y), target], dim=1)
    escaped = -log_free.gather(1, wrong).sum(dim=1).mean()
    return F.cross_entropy(logits, y) + adversarial * (F.cross_entropy(perturbed, own) + escaped)


def _likeliest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.detach().scatter(1, y[:, None], -math.inf).argmax(dim=1)


def _choose(model: nn.Module, input_shape: tuple[int, int, int], layer: str | None) -> str:
    read = trace_channels(model, input_shape).inputs
    modules = {name: core(model).get_submodule(name) for name in read}
    convolutions = [name for name, m in modules.items() if isinstance(m, nn.Conv1d | nn.Conv2d) and m.groups == 1]
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    if layer is not None:
        if str(layer) not in convolutions + linear:  # a layer of a Sequential may be called 3
            raise MethodError(unknown("layer", str(layer), convolutions + linear))
        return str(layer)
    first = next(iter(read), None)
    candidates = [name for name in convolutions if name != first] or [name for name in linear if name != first]
    if not candidates:
        raise MethodError("npd needs a second layer, a convolution that is not grouped or a linear one; use another method")
    return candidates[-2:][0]


def _check(**given: float) -> None:
    lowest = {"lr": 1e-12, "batch_size": 1}
    for name, value in given.items():
        check_range(name, value, lowest.get(name, 0), 2**31)
