"""HYDRA: learn which weights to keep by training a score for each on the robust loss, the weights frozen.

Sehwag, Wang, Mittal, Jana, "HYDRA: Pruning Adversarially Robust Neural Networks", NeurIPS 2020 (arXiv:2002.10509).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import check_choice, check_range
from ..train import OnStep
from ..types import Granularity, ImageSet, Repaired, Scores
from .grammar import apply_and_heal
from .learned import Masked, Objective, adopt_statistics, final_scores, largest, learn_scores, robust_recipe, straight_through
from .select import Fraction, Scope, select


class Subnet(Masked):
    """Keeps a fixed share of each layer, or of all layers together: those with the largest scores."""

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, int, int], granularity: Granularity, fraction: float, scope: Scope
    ) -> None:
        """Prepare to cut ``fraction`` of the entries; arguments and errors as in `hydra`."""
        check_range("fraction", fraction, 0, 1)
        check_choice("scope", scope, ("layer", "global"))
        super().__init__(model, input_shape, granularity)
        self.fraction, self.scope = fraction, scope

    def masks(self) -> list[Tensor]:
        """Return the masks; the gradient of an entry is that of its score's magnitude."""
        found = self.magnitudes()
        if self.scope == "layer":
            return [straight_through(self._keep(each), each) for each in found]
        keep = self._keep(torch.cat([each.flatten() for each in found])).split([each.numel() for each in found])
        return [straight_through(part.reshape(each.shape), each) for part, each in zip(keep, found, strict=True)]

    def _keep(self, values: Tensor) -> Tensor:
        return largest(values, int(self.fraction * values.numel() + 1e-9))


def hydra(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    fraction: float = 0.9,
    scope: Scope = "layer",
    adversarial: Objective = "trades",
    eps: float = 0.03137254901960784,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 10,
    beta: float = 6.0,
    epochs: int = 20,
    lr: float = 0.1,
    weight_decay: float = 1e-4,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Scores:
    """Score by what training on the robust loss makes of a score for each weight, at a fixed share to cut.

    ``min over s of L(f(w * m(s)))``, where ``m(s)`` keeps the weights of largest ``|s|`` and passes gradients straight through,
    ``w`` stands still and ``L`` is the loss of adversarial training. The scores start at ``sqrt(6 / fan_in) * w / max |w|`` in
    each layer, so that the first mask is that of magnitudes. Cut the share that was learned for: `select` with
    ``Fraction(fraction)`` and the same scope gives the mask that the last step used.

    Args:
        model: Takes images in [0, 1]; left as it was.
        clean: Labelled images to learn from.
        granularity: ``weight``: of convolutions and linear layers. ``channel``: one score per filter, at its site.
        fraction: Share to cut, in [0, 1].
        scope: The share holds for each ``layer``, or ``global`` for all together.
        adversarial: Loss: ``trades``, ``pgd`` or ``fast`` (`secateur.adversarial_training.Adversary`).
        eps: Budget in units of pixels that go from 0 to 1, >= 0; 0 learns on clean images.
        norm: ``linf`` or ``l2``.
        steps: Of the attack, >= 1.
        beta: Of ``trades``, >= 0.
        epochs: Passes over the images, >= 0; 0 leaves the start, which ranks as magnitudes do.
        lr: Largest learning rate of the scores (SGD with momentum 0.9, cosine), > 0.
        weight_decay: Of the scores, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress.
        generator: Source of all randomness.

    Returns:
        The magnitudes of the scores; larger = more important.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range.
        ModelError: Training diverged, or, for channels, the network cannot be traced.

    Differs from the authors' code in that biases and norms stand still too (theirs trains the weights of batch-norms along with
    the scores, unless told not to), and that shares may be ``global``. Channels are ours: the score of a filter starts from
    ``sum |W_k|`` and masks the site's weight and bias, as pruning a channel does.
    """
    recipe = robust_recipe(
        adversarial=adversarial, eps=eps, norm=norm, steps=steps, beta=beta, epochs=epochs, lr=lr, weight_decay=weight_decay,
        batch_size=batch_size,
    )  # fmt: skip
    start = Subnet(model, clean.shape, granularity, fraction, scope)
    masked = learn_scores(start, clean, recipe, on_step=on_step, generator=generator)
    return Scores(final_scores(masked), granularity)


def hydra_pruning(
    model: nn.Module,
    clean: ImageSet,
    *,
    granularity: Granularity = "weight",
    fraction: float = 0.9,
    scope: Scope = "layer",
    adversarial: Objective = "trades",
    eps: float = 0.03137254901960784,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 10,
    beta: float = 6.0,
    score_epochs: int = 20,
    score_lr: float = 0.1,
    epochs: int = 100,
    lr: float = 0.01,
    weight_decay: float = 1e-4,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Prune by the scores of `hydra`, then fine-tune on the robust loss with the mask held.

    Args:
        model: Takes images in [0, 1]; not changed. The authors' was trained adversarially.
        clean: Labelled images to learn from.
        granularity: Cut single ``weight``s or whole ``channel``s.
        fraction: Share to cut, in [0, 1].
        scope: The share holds for each ``layer``, or ``global`` for all together.
        adversarial: Loss of both stages: ``trades``, ``pgd`` or ``fast``.
        eps: Budget in units of pixels that go from 0 to 1, >= 0; 0 for clean images.
        norm: ``linf`` or ``l2``.
        steps: Of the attack, >= 1.
        beta: Of ``trades``, >= 0.
        score_epochs: Passes that learn the scores, >= 0.
        score_lr: Their largest learning rate, > 0.
        epochs: Passes of the fine-tuning; 0 leaves it out.
        lr: Its largest learning rate, > 0.
        weight_decay: Of both, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress of each of the two stages.
        generator: Source of all randomness.

    Raises:
        DataError: There are no images.
        MethodError: An argument is out of range.
        ModelError: Training diverged, or, for channels, the network cannot be traced.

    Running statistics of norms are those of the masked network, as the scores left them. Differences from the authors' code are
    those of `hydra`.
    """
    heal = robust_recipe(
        adversarial=adversarial, eps=eps, norm=norm, steps=steps, beta=beta, epochs=epochs, lr=lr, weight_decay=weight_decay,
        batch_size=batch_size,
    )  # fmt: skip
    recipe = replace(heal, epochs=score_epochs, lr=score_lr)
    start = Subnet(model, clean.shape, granularity, fraction, scope)
    told: list[str] = []
    masked = learn_scores(start, clean, recipe, on_step=on_step, on_note=told.append, generator=generator)
    mask = select(Scores(final_scores(masked), granularity), Fraction(fraction), scope=scope)
    done = apply_and_heal(adopt_statistics(model, masked), clean, mask, heal=heal, on_step=on_step, generator=generator)
    return replace(done, notes=(*told, *done.notes))
