"""AWM, adversarial weight masking: scale down the weights through which one perturbation could move all images.

Chai, Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022 (arXiv:2207.04497).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data import sample
from ..errors import MethodError, check_range
from ..measure import correct, wilson
from ..models import core
from ..prune.mask import apply_mask
from ..train import OnStep, check_trainable
from ..types import ImageSet, Repaired, SoftMask

PIXELS = 3 * 32 * 32


def awm(
    model: nn.Module,
    clean: ImageSet,
    *,
    rounds: int = 20,
    iterations: int = 15,
    lr: float = 0.01,
    trade_off: float = 0.9,
    sparsity: float = 1e-8,
    radius: float = 1000.0,
    ascent: float = 10.0,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a factor for each weight of the convolutions that keeps answers right also under one perturbation of all images.

    ``min over m in [0, 1] of a * CE(f_m(x), y) + (1 - a) * max over ||d||_1 <= r of CE(f_m(x + d), y) + g * ||m||_1`` with the
    weights ``m * w``. In turn, each for some batches: ``d`` starts at 0 and climbs the loss against the network's own answers;
    then, ``d`` scaled into its ball and held, the factors descend. Batch-norms keep their statistics throughout.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images; one per class may do.
        rounds: How often both take their turn, >= 0.
        iterations: Batches of each in a round, >= 1. The paper makes 5 passes: 15 batches of 128 from its 500 images.
        lr: Learning rate of the factors (Adam), > 0.
        trade_off: ``a``, the share of the loss on unchanged images, in [0, 1].
        sparsity: ``g``, the weight of the masks' size, >= 0.
        radius: ``r`` for images of 3 x 32 x 32, >= 0; for others in proportion to the number of values.
        ascent: Learning rate of the perturbation (SGD), >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress, in batches.
        generator: Source of all randomness.

    Returns:
        A mask of factors by parameter, most of them 1 or close to it. The log says how sparse they are: ``removed`` of them are
        exactly 0, ``halved_share`` is the share below 1/2 and ``mean_factor`` their mean. Nothing can be taken out of the
        network for good.

    Raises:
        MethodError: An argument is out of range, or the network has no convolution.

    Differs from the authors' code in that perturbed images are kept in [0, 1] also while the perturbation is sought, in that
    every image comes once before any comes again (they draw with replacement), and in that the number of batches does not grow
    with the number of images. They draw the clean images from the test set; here they are the defender's.
    """
    for name, value, low, high in (
        ("rounds", rounds, 0, 2**31), ("iterations", iterations, 1, 2**31), ("lr", lr, 1e-12, 1e6),
        ("trade_off", trade_off, 0, 1), ("sparsity", sparsity, 0, 1e6), ("radius", radius, 0, 1e9), ("ascent", ascent, 0, 1e9),
    ):  # fmt: skip
        check_range(name, value, low, high)
    masked = Masked(model)
    factors = {name: torch.ones_like(weight, requires_grad=True) for name, weight in masked.weights.items()}
    optimizer = torch.optim.Adam(factors.values(), lr=lr)
    limit = radius * clean.x[:1].numel() / PIXELS
    for turn in range(rounds):
        batches = sample(clean, batch_size, 2 * iterations, device=masked.device, generator=generator)
        shift = perturbation(masked, factors, islice(batches, iterations), ascent=ascent, limit=limit)
        for step, (x, y) in enumerate(batches, turn * iterations + 1):
            loss = shielded_loss(masked, factors, x, y, shift, trade_off)
            optimizer.zero_grad()
            (loss + sparsity * sum(factor.sum() for factor in factors.values())).backward()
            optimizer.step()
            with torch.no_grad():
                for factor in factors.values():
                    factor.clamp_(0, 1)
            if on_step is not None:
                on_step(step, rounds * iterations)
    return _scaled(model, clean, SoftMask({name: factor.detach().cpu() for name, factor in factors.items()}))


class Masked:
    """A frozen copy of a network in eval mode whose convolutions' weights are multiplied by factors on the way.

    Attributes:
        weights: Name of each convolution's weight, relative to the core network -> the weight.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy ``model``.

        Raises:
            MethodError: It has no convolution; or see `train.check_trainable`.
        """
        check_trainable(model)
        self.network = deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._prefix = "" if core(model) is model else "net."
        modules = core(self.network).named_modules()
        self.weights = {f"{name}.weight": conv.weight for name, conv in modules if isinstance(conv, nn.Conv1d | nn.Conv2d)}
        if not self.weights:
            raise MethodError("awm needs a network with convolutions, got one without; use another method")

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(iter(self.weights.values())).device

    def __call__(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of images, float in [0, 1], under these factors."""
        changed = {self._prefix + name: self.weights[name] * factor for name, factor in factors.items()}
        return functional_call(self.network, changed, (x,))


def perturbation(
    masked: Masked, factors: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, ascent: float, limit: float
) -> Tensor:
    """Return the perturbation, ``(1, c, h, w)``, that raises the loss against the network's answers to unchanged images.

    Args:
        masked: The network.
        factors: Held.
        batches: One step of size ``ascent`` on each.
        ascent: Learning rate.
        limit: The largest l1 norm; the perturbation is scaled down to it at the end.
    """
    held = {name: factor.detach() for name, factor in factors.items()}
    shift: Tensor | None = None
    for x, _ in batches:
        shift = x.new_zeros(1, *x.shape[1:]) if shift is None else shift
        with torch.no_grad():
            answers = masked(x, held).argmax(dim=1)
        shift.requires_grad_()
        loss = F.cross_entropy(masked((x + shift).clamp(0, 1), held), answers)
        shift = shift.detach() + ascent * torch.autograd.grad(loss, shift)[0]
    assert shift is not None
    return shift * min(1.0, limit / max(float(shift.abs().sum()), 1e-12))


def shielded_loss(
    masked: Masked, factors: Mapping[str, Tensor], x: Tensor, y: Tensor, shift: Tensor, trade_off: float
) -> Tensor:
    """Return ``a`` parts of the loss on images and ``1 - a`` parts of that on perturbed ones, from one pass."""
    both = torch.cat([x, (x + shift).clamp(0, 1)]).contiguous(memory_format=torch.channels_last)
    plain, moved = masked(both, factors).chunk(2)
    return trade_off * F.cross_entropy(plain, y) + (1 - trade_off) * F.cross_entropy(moved, y)


def _scaled(model: nn.Module, clean: ImageSet, mask: SoftMask) -> Repaired:
    values = torch.cat([factor.flatten() for factor in mask.scale.values()])
    repaired = apply_mask(model, mask).eval()
    gone = int((values == 0).sum())
    log = {
        "removed": float(gone),
        "removed_share": gone / len(values),
        "halved_share": float((values < 0.5).double().mean()),
        "mean_factor": float(values.double().mean()),
        "clean_accuracy": wilson(int(correct(repaired, clean).sum()), len(clean)).value,
    }
    note = f"{gone} of {len(values)} weights of convolutions are 0, the others scaled: nothing can be removed for good"
    return Repaired(repaired, mask, log=log, notes=(note,) * bool((values < 1).any()))
