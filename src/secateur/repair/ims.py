"""IMS, invertible masking with selection: cut the neurons whose absence hides the backdoor and whose presence alone keeps it.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks", NeurIPS 2025
(arXiv:2509.15497).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..data import holdout, sample
from ..errors import check_range
from ..prune.grammar import HELD_OUT
from ..prune.mask import Edit
from ..prune.neurons import Neurons, cut_lowest
from ..state import seeded
from ..train import OnStep
from ..types import ImageSet, Repaired, Scores

LEAST = 1e-8
IMPROVED = 0.98  # a loss below this share of the best counts as better


def ims(
    model: nn.Module,
    clean: ImageSet,
    *,
    initial_rounds: int = 100,
    rounds: int = 200,
    inner_steps: int = 20,
    inner_lr: float = 0.001,
    radius: float = 1.0,
    lr: float = 0.02,
    slope: float = 20.0,
    sparsity: float = 10.0,
    patience: int = 25,
    batch_size: int = 256,
    drop: float = 0.02,
    edit: Edit = "weight",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a mask that keeps the clean answers while its inverse keeps those under a synthesised trigger; cut by it.

    A neuron has a mask ``m`` and a selection ``s`` in [0, 1]. Its factor is ``g(m) + s*(1 - g(m))`` under the mask and
    ``g(1 - m) + s*(1 - g(1 - m))`` under the inverse, ``g(m) = sigmoid(k*(m - 1/2))``: with ``s = 1`` it takes part in both.
    Two networks agree by ``-log sum_c p_c q_c`` and disagree by ``-log(1 - sum_c p_c q_c)``. First the masked network learns to
    agree with the original on clean images, and its inverse to disagree. Then perturbations of each image are sought under
    which the inverse agrees with the original, and the original with none of its clean answers; the masked network learns to
    answer them as if they were clean, the inverse as the original does. ``w * mean(1 - s)`` keeps the selection small in the
    first and the third part; the second goes without it.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Clean images; labels serve the choice of how much to cut alone, on a quarter that is held out.
        initial_rounds: Most batches of the first part, >= 1.
        rounds: Most batches of the second part, and again of the third, >= 1.
        inner_steps: Steps of each search for perturbations, >= 1.
        inner_lr: Their length (AdamW), > 0.
        radius: Largest perturbation of a pixel, in [0, 1].
        lr: Learning rate of masks and selection (AdamW), > 0.
        slope: ``k``, how steep masks are, > 0.
        sparsity: ``w``, the weight of the share of neurons that is selected, >= 0.
        patience: A part ends when so many rounds brought no better loss, >= 1.
        batch_size: Images per round, >= 1.
        drop: Clean accuracy that the cut may cost, in [0, 1].
        edit: Set the ``weight`` of a cut neuron to 0, or ``weight+bias``.
        on_step: Progress; it may end early.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out.
        MethodError: An argument is out of range.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that a factor scales the weight of the neuron's norm and not the output of its convolution
    (where the norm's mean would stay behind), in that perturbed images stay in [0, 1], and in that neurons are cut for good,
    their number chosen on held-out clean images, where the soft mask stays in the network.
    """
    counts = {"initial_rounds": initial_rounds, "rounds": rounds, "inner_steps": inner_steps, "patience": patience}
    for name, value in counts.items():
        check_range(name, value, 1, 2**31)
    for name, value in (("inner_lr", inner_lr), ("lr", lr), ("slope", slope)):
        check_range(name, value, 1e-12, 1e6)
    check_range("sparsity", sparsity, 0, 1e6)
    check_range("radius", radius, 0, 1)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    game = Game(Neurons(model, clean.shape), slope)
    parts = ((initial_rounds, False, sparsity), (rounds, True, 0.0), (rounds, True, sparsity))
    done, whole = 0, initial_rounds + 2 * rounds
    with seeded(generator):
        for length, perturbed, weight in parts:
            batches = sample(fitted, batch_size, length, device=game.neurons.device, generator=generator)

            def loss(x: Tensor, perturbed: bool = perturbed, weight: float = weight) -> Tensor:
                hurt = game.perturbed(x, steps=inner_steps, lr=inner_lr, radius=radius) if perturbed else None
                return game.loss(x, hurt) + weight * game.selected()

            watch = None if on_step is None else (lambda step, done=done: on_step(done + step, whole))
            game.minimise(loss, (x for x, _ in batches), lr=lr, patience=patience, on_step=watch)
            done += length
    return cut_lowest(model, judged, game.scores(), drop=drop, edit=edit)


class Game:
    """The masked network, its inverse and the original."""

    def __init__(self, neurons: Neurons, slope: float) -> None:
        self.neurons, self.slope = neurons, slope
        self.mask, self.selection, self.ones = neurons.filled(1.0), neurons.filled(1.0), neurons.filled(1.0)
        neurons.network.eval()

    def factors(self, *, inverse: bool) -> dict[str, Tensor]:
        """Return each neuron's factor under the mask or its inverse, site -> ``(channels,)``."""
        found = {}
        for site, mask in self.mask.items():
            soft = torch.sigmoid(self.slope * ((1 - mask if inverse else mask) - 0.5))
            found[site] = soft + self.selection[site] * (1 - soft)
        return found

    def loss(self, x: Tensor, hurt: Tensor | None) -> Tensor:
        """Return the loss of masks and selection on clean images and, if there are any, perturbed ones."""
        with torch.no_grad():
            original = self.neurons(x, self.ones)
        masked, inverse = self.factors(inverse=False), self.factors(inverse=True)
        loss = agree(self.neurons(x, masked), original) + disagree(self.neurons(x, inverse), original)
        if hurt is None:
            return loss
        with torch.no_grad():
            fooled = self.neurons(hurt, self.ones)
        kept = self.neurons(hurt, inverse)
        return loss + agree(self.neurons(hurt, masked), original) + agree(kept, fooled) + disagree(kept, original)

    def perturbed(self, x: Tensor, *, steps: int, lr: float, radius: float) -> Tensor:
        """Return images that the inverse and the original answer alike, and not as they answer the clean ones."""
        with torch.no_grad():
            original = self.neurons(x, self.ones)
            inverse = self.factors(inverse=True)
        change = torch.zeros_like(x, requires_grad=True)
        optimizer = torch.optim.AdamW([change], lr=lr)
        for _ in range(steps):
            hurt = (x + change).clamp(0, 1)
            fooled = self.neurons(hurt, self.ones)
            (change.grad,) = torch.autograd.grad(
                agree(self.neurons(hurt, inverse), fooled) + disagree(fooled, original), [change]
            )
            optimizer.step()
            with torch.no_grad():
                change.clamp_(-radius, radius)
        return (x + change).detach().clamp(0, 1)

    def selected(self) -> Tensor:
        """Return the mean of what is selected, ``1 - s``."""
        return torch.cat([1 - selection for selection in self.selection.values()]).mean()

    def minimise(
        self,
        loss: Callable[[Tensor], Tensor],
        batches: Iterable[Tensor],
        *,
        lr: float,
        patience: int,
        on_step: Callable[[int], None] | None,
    ) -> None:
        """Minimise a loss over masks and selection until it does not get better."""
        leaves = [value.requires_grad_() for value in (*self.mask.values(), *self.selection.values())]
        optimizer = torch.optim.AdamW(leaves, lr=lr)
        best, waited = float("inf"), 0
        for step, x in enumerate(batches, 1):
            value = loss(x)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.clamp_(0, 1)
            if on_step is not None:
                on_step(step)
            better = float(value.detach()) < IMPROVED * best
            best, waited = (float(value.detach()), 0) if better else (best, waited + 1)
            if waited > patience:
                break
        for leaf in leaves:
            leaf.requires_grad_(False)

    def scores(self) -> Scores:
        """Return the factors under the mask, for cutting."""
        return Scores({site: factor.cpu() for site, factor in self.factors(inverse=False).items()}, "channel")


def agree(one: Tensor, other: Tensor) -> Tensor:
    """Return how little two sets of logits ``(b, classes)`` agree: ``-log sum_c p_c q_c``, the mean over images."""
    return -(_overlap(one, other) + LEAST).log().mean()


def disagree(one: Tensor, other: Tensor) -> Tensor:
    """Return how much two sets of logits ``(b, classes)`` agree: ``-log(1 - sum_c p_c q_c)``, the mean over images."""
    return -(1 - _overlap(one, other) + LEAST).log().mean()


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    return (one.softmax(dim=1) * other.softmax(dim=1)).sum(dim=1)
