"""HARP: learn how much of each layer to keep together with which weights, on the robust loss, under one budget for all.

Zhao, Wressnegger, "Holistic Adversarially Robust Pruning", ICLR 2023 (arXiv:2412.14714).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import MethodError, check_range
from ..train import OnStep
from ..types import ImageSet, Repaired, WeightMask
from .grammar import apply_and_heal
from .learned import (
    Masked,
    Objective,
    adopt_statistics,
    final_scores,
    largest,
    learn_scores,
    robust_recipe,
    straight_through,
)

MET = 5e-5  # an excess that rounds to 0 at four digits meets the budget
EDGE = 0.01  # how near to 0 and 1 a sigmoid may start
OFF = 0.05  # relative difference of learned and wanted budget that is worth a note


class Rated(Masked):
    """Keeps of each layer the share ``k_l = sigmoid(r_l) * (1 - k_min) + k_min``; the ``r_l`` are learned like the scores.

    Attributes:
        target: Share of all weights to keep.
        least: ``k_min``, the least share of a layer.
        rates: The ``r_l``, ``(layers,)``.
    """

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, int, int], target: float, minimum: float, initial: float
    ) -> None:
        """Start with the share ``initial`` in every layer; arguments and errors as in `harp`."""
        super().__init__(model, input_shape, "weight")
        self.target, self.least = target, minimum * target
        self.sizes = tuple(score.numel() for score in self.scores)
        room = max(1 - self.least, EDGE)  # none where every weight is kept
        share = min(max((initial - self.least) / room, EDGE), 1 - EDGE)
        device = self.scores[0].device
        self.rates = nn.Parameter(torch.full((len(self.sizes),), math.log(share / (1 - share)), device=device))

    def shares(self, shift: float = 0.0) -> Tensor:
        """Return ``k_l`` at ``r_l + shift``, ``(layers,)``."""
        return torch.sigmoid(self.rates + shift) * (1 - self.least) + self.least

    def masks(self) -> list[Tensor]:
        """Return the masks; a layer's share gets the sum of the gradients of its mask."""
        shares, cuts = self.shares(), self._cuts()
        return [
            straight_through(largest(values, cut), values, share)
            for values, cut, share in zip(self.magnitudes(), cuts, shares, strict=True)
        ]

    def kept(self) -> Tensor:
        """Return the share of all weights that is kept, a scalar."""
        sizes = self.rates.new_tensor(self.sizes)
        return (sizes * self.shares()).sum() / sizes.sum()

    def excess(self) -> Tensor:
        """Return ``max(kept / target - 1, 0)``, a scalar."""
        return (self.kept() / self.target - 1).clamp_min(0)

    def _cuts(self) -> list[int]:
        shares = self.shares().detach().tolist()
        return [int((1 - share) * size) for share, size in zip(shares, self.sizes, strict=True)]


class Pressure:
    """The penalty on the budget: ``gamma`` times the epoch times the excess, until the budget is met; from then on as it is."""

    def __init__(self, gamma: float) -> None:
        self._gamma, self._epoch = gamma, 1
        self._fixed: float | None = None

    @property
    def weight(self) -> float:
        """Weight of the excess now."""
        return self._gamma * self._epoch if self._fixed is None else self._fixed

    def __call__(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the penalty, a scalar."""
        assert isinstance(network, Rated)
        return self.weight * network.excess()

    def after(self, epoch: int, loss: float, network: nn.Module) -> None:
        """Go on to the next epoch."""
        assert isinstance(network, Rated)
        if self._fixed is None and float(network.excess().detach()) < MET:
            self._fixed = self.weight
        self._epoch = epoch + 1


def harp(
    model: nn.Module,
    clean: ImageSet,
    *,
    fraction: float = 0.9,
    minimum: float = 0.1,
    initial: float = 0.1,
    gamma: float = 0.01,
    adversarial: Objective = "pgd",
    eps: float = 0.03137254901960784,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 10,
    beta: float = 6.0,
    score_epochs: int = 20,
    score_lr: float = 0.1,
    epochs: int = 100,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a share to keep for each layer, and a score for each weight, on the robust loss; cut, then fine-tune.

    ``min over r, s of L(f(w * m(s, r))) + gamma * epoch * max(sum n_l k_l / (a * N) - 1, 0)``: layer ``l`` of ``n_l`` weights
    keeps the share ``k_l = sigmoid(r_l) * (1 - k_min) + k_min`` of largest ``|s|``, ``a`` is the share of all ``N`` weights to
    keep, ``k_min = minimum * a``. Gradients pass straight through the mask: to the scores as in HYDRA, to ``k_l`` as their sum
    over the layer. The factor on the penalty grows each epoch until one ends within the budget, and then stays. The weights
    stand still meanwhile; scores start as in HYDRA.

    Args:
        model: Takes images in [0, 1]; not changed. The authors' was trained adversarially.
        clean: Labelled images to learn from.
        fraction: Share of all weights of convolutions and linear layers to cut, in [0, 1).
        minimum: Least share that a layer keeps, relative to that of all, in [0, 1].
        initial: Share that every layer keeps at first, in (0, 1]; at least that wanted in the end.
        gamma: Growth of the penalty in an epoch, >= 0.
        adversarial: Loss of both stages: ``pgd``, ``trades`` or ``fast`` (`secateur.adversarial_training.Adversary`).
        eps: Budget in units of pixels that go from 0 to 1, >= 0; 0 for clean images.
        norm: ``linf`` or ``l2``.
        steps: Of the attack, >= 1.
        beta: Of ``trades``, >= 0.
        score_epochs: Passes that learn shares and scores, >= 0.
        score_lr: Their largest learning rate (SGD with momentum 0.9, cosine), > 0.
        epochs: Passes of the fine-tuning with the mask held; 0 leaves it out.
        lr: Its largest learning rate, > 0.
        weight_decay: Of both stages, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress of each of the two stages.
        generator: Source of all randomness.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range, or there is less than one weight to keep for each layer.
        ModelError: Training diverged.

    Differs from the authors' code in that the budget is met to the weight: they take the epoch of best robust accuracy *on test
    images* among those whose excess rounds to 0; here the last epoch is taken, all ``r_l`` are shifted by one number until the
    shares add up, and counts are rounded by largest remainders. ``log["learned_share"]`` has what was kept before. Biases and
    norms stand still too. Their strategies for ``initial`` (LAMP, ERK) and their channel pruning by FLOPs are not here.
    """
    check_range("fraction", fraction, 0, 1 - 1e-9)
    for name, value, low in (("minimum", minimum, 0.0), ("initial", initial, 1e-9)):
        check_range(name, value, low, 1)
    check_range("gamma", gamma, 0, 1e6)
    heal = robust_recipe(
        adversarial=adversarial, eps=eps, norm=norm, steps=steps, beta=beta, epochs=epochs, lr=lr, weight_decay=weight_decay,
        batch_size=batch_size,
    )  # fmt: skip
    start = Rated(model, clean.shape, 1 - fraction, minimum, max(initial, 1 - fraction))
    budget = sum(start.sizes) - int(fraction * sum(start.sizes) + 1e-9)
    share_out(start.sizes, [1 - fraction] * len(start.sizes), budget)  # refuses now what would be refused after minutes
    pressure = Pressure(gamma)
    notes: list[str] = []
    rated = learn_scores(
        start, clean, replace(heal, epochs=score_epochs, lr=score_lr),
        penalty=pressure, on_epoch=pressure.after, on_step=on_step, on_note=notes.append, generator=generator,
    )  # fmt: skip
    mask, counts = _cut(rated, budget)
    done = apply_and_heal(adopt_statistics(model, rated), clean, mask, heal=heal, on_step=on_step, generator=generator)
    learned = float(rated.kept().detach())
    log = {"learned_share": learned, **{f"kept/{name}": float(n) for name, n in zip(rated.names, counts, strict=True)}}
    notes += done.notes
    if learned > (1 + OFF) * rated.target:
        told = f"the shares learned kept {learned:.2%} of the weights, more than {rated.target:.2%}; they were lowered together"
        notes.append(f"{told}; more score_epochs or a larger gamma leave that to the learning")
    return replace(done, log={**done.log, **log}, notes=tuple(notes))


def _cut(rated: Rated, budget: int) -> tuple[WeightMask, list[int]]:
    """Return the mask that keeps ``budget`` weights, the shares shifted together, and how many each layer keeps."""
    with torch.no_grad():
        low, high = -60.0, 60.0
        sizes = torch.tensor(rated.sizes, dtype=torch.float64)
        for _ in range(80):
            middle = (low + high) / 2
            kept = float((sizes * rated.shares(middle).double().cpu()).sum())
            low, high = (middle, high) if kept < budget else (low, middle)
        counts = share_out(rated.sizes, rated.shares(high).detach().tolist(), budget)
    scores = final_scores(rated)
    keep = {name: largest(s, s.numel() - count) for (name, s), count in zip(scores.items(), counts, strict=True)}
    return WeightMask(keep), counts


def share_out(sizes: Sequence[int], shares: Sequence[float], budget: int) -> list[int]:
    """Return how many weights each layer keeps: about its share, at least one, ``budget`` in all.

    Raises:
        MethodError: That is less than one for each layer.
    """
    if budget < len(sizes):
        raise MethodError(
            f"fraction leaves {budget} weights for {len(sizes)} layers; each needs one: lower it to at most "
            f"{1 - len(sizes) / sum(sizes):.6g}"
        )
    exact = [size * share for size, share in zip(sizes, shares, strict=True)]
    counts = [min(size, max(1, math.floor(value))) for size, value in zip(sizes, exact, strict=True)]
    while (rest := budget - sum(counts)) != 0:
        sign = 1 if rest > 0 else -1
        room = [i for i, count in enumerate(counts) if (count < sizes[i] if sign > 0 else count > 1)]
        for i in sorted(room, key=lambda i: sign * (counts[i] - exact[i]))[: abs(rest)]:
            counts[i] += sign
    return counts
