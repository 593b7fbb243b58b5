"""Robustness as it was measured: four rates with intervals, for each attack and for the worst of them on each image.

The names are those of the weight-edit study by Kahsolt (github.com/Kahsolt/adversarial-prune), whose table has strict attack
success and prediction change swapped; here each number stands under its own definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import state
from ..errors import MethodError, check_range
from ..types import ImageSet, Rate
from .adversarial import Attack, ThreatModel, answers_of, check_images, craft, described, logits_of
from .intervals import wilson


@dataclass(frozen=True)
class Rates:
    """What an attack, or the worst of several on each image, does to a network.

    Attributes:
        clean_accuracy: Share of all images answered rightly without an attack.
        remnant_accuracy: Share of all images answered rightly under attack; over the worst case, robust accuracy.
        prediction_change_rate: Share of all images whose answer under attack is not the clean one.
        strict_attack_success: Of the images right when clean, the share wrong under attack; None when none was right.
        target_reached: Of the images whose wanted label is not the true one, the share that gets it; None if untargeted.
    """

    clean_accuracy: Rate
    remnant_accuracy: Rate
    prediction_change_rate: Rate
    strict_attack_success: Rate | None
    target_reached: Rate | None = None


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the network answered, image by image; -1 where its logits were not finite.

    Attributes:
        y: True labels, int64 ``(n,)``.
        clean: Answers without an attack, int64 ``(n,)``.
        returned: Attack -> answers to its images as returned.
        stored: Attack -> answers to its images as 8-bit files keep them.
        refused: Attack -> which of its images were beyond the threat model, bool ``(n,)``; the originals stand for them.
        images: Attack -> its images as stored, uint8 ``(n, c, h, w)``; empty unless they were to be kept.
        targets: Wanted labels, int64 ``(n,)``; None if untargeted.
    """

    y: Tensor
    clean: Tensor
    returned: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]
    refused: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Robustness:
    """What was measured, under which threat model, with which budgets.

    Attributes:
        threat: What the attacker could do.
        worst: The claim: each image under the worst of all attacks, or left alone, as returned.
        worst_stored: The same with all images as 8-bit files keep them.
        by_attack: Attack -> rates, as returned.
        stored_by_attack: Attack -> rates, as stored.
        budgets: Attack -> its settings in words.
        seed: Where each attack's random numbers began.
        outcomes: The answers behind the rates.
    """

    threat: ThreatModel
    worst: Rates
    worst_stored: Rates
    by_attack: Mapping[str, Rates]
    stored_by_attack: Mapping[str, Rates]
    budgets: Mapping[str, str]
    seed: int
    outcomes: Outcomes

    @property
    def robust_accuracy(self) -> Rate:
        """Share of all images that no attack broke; no more than an upper bound of what other attacks would leave."""
        return self.worst.remnant_accuracy

    def __str__(self) -> str:
        return f"robust accuracy {self.robust_accuracy}; {self.threat}; worst of {', '.join(self.by_attack)}; seed {self.seed}"


def robustness(
    model: nn.Module,
    data: ImageSet,
    attacks: Mapping[str, Attack],
    threat: ThreatModel,
    *,
    targets: Tensor | None = None,
    keep_images: bool = False,
    batch_size: int = 256,
    on_step: Callable[[int, int], None] | None = None,
    generator: torch.Generator,
) -> Robustness:
    """Run attacks and judge what they return: nothing an attack says of itself counts.

    Images beyond the threat model (farther than eps + 1e-6, outside [0, 1], NaN) do not count: the originals stand for them,
    and they are listed. Every attack starts from the same seed, so which others run does not change what it finds.

    Args:
        model: Takes images in [0, 1]; left as it was.
        data: Images that the network was not trained on.
        attacks: Name -> function of ``(model, x, y, generator)``; `bind` makes one of each function in `secateur.attack`.
        threat: The threat model; its ``eps`` and ``norm`` are held against what attacks return, not handed to them.
        targets: Wanted labels, int64 ``(n,)``, which attacks then get in place of the true ones; for a targeted threat model.
        keep_images: Keep the adversarial images, as stored.
        batch_size: Images at once, >= 1; attacks see such batches.
        on_step: Called with ``(step, steps)``, a step being one attack on one batch.
        generator: Source of all randomness.

    Raises:
        MethodError: No images or attacks; an attack returns no images; targets are missing, or not called for.
        ModelError: The network does not take the images, or gives an attack no gradient.
    """
    check_images(data, attacks)
    check_range("batch_size", batch_size, 1, 2**31)
    if threat.targeted != (targets is not None) or (targets is not None and targets.shape != data.y.shape):
        raise MethodError("targets must be given, one for each image, exactly if the threat model is targeted")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    draws = {name: state.generator(seed) for name in attacks}
    clean: list[Tensor] = []
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in attacks}
    wanted, size, done = data.y if targets is None else targets, state.batch_size(batch_size), 0
    steps = len(attacks) * -(-len(data) // size)
    with state.seeded(state.generator(seed)):
        for start in range(0, len(data), size):
            x, y = data.x[start : start + size], wanted[start : start + size]
            clean.append(answers_of(logits_of(model, x, len(data.classes))))
            for name, attack in attacks.items():
                made = craft(attack, model, x, y, threat, draws[name])
                seen = [answers_of(logits_of(model, shown, len(data.classes))) for shown in (made.returned, made.stored)]
                parts[name].append((*seen, ~made.admissible, *([made.stored] if keep_images else [])))
                done += 1
                if on_step is not None:
                    on_step(done, steps)
    columns = {name: [torch.cat(column) for column in zip(*rows, strict=True)] for name, rows in parts.items()}
    returned, stored, refused = ({name: found[i] for name, found in columns.items()} for i in range(3))
    images = {name: found[3] for name, found in columns.items()} if keep_images else {}
    outcomes = Outcomes(data.y, torch.cat(clean), returned, stored, refused, images, targets)
    return summed(outcomes, threat, {name: described(attack) for name, attack in attacks.items()}, seed)


def summed(outcomes: Outcomes, threat: ThreatModel, budgets: Mapping[str, str], seed: int) -> Robustness:
    """Return the rates of what was answered; in the worst case an attacker may also leave an image alone."""
    found = outcomes.returned, outcomes.stored
    y, clean, targets = outcomes.y, outcomes.clean, outcomes.targets
    worst = [rates(y, clean, clean, *answers.values(), targets=targets) for answers in found]
    each = [{name: rates(y, clean, answer, targets=targets) for name, answer in answers.items()} for answers in found]
    return Robustness(threat, worst[0], worst[1], each[0], each[1], budgets, seed, outcomes)


def rates(y: Tensor, clean: Tensor, *answers: Tensor, targets: Tensor | None = None) -> Rates:
    """Return the four rates of an attack, or of the worst of several on each image.

    Args:
        y: True labels, int64 ``(n,)``.
        clean: Answers without an attack, int64 ``(n,)``.
        answers: Answers under each attack, int64 ``(n,)``.
        targets: Wanted labels, int64 ``(n,)``; None if untargeted.
    """
    shown = torch.stack(answers)
    right, changed, before = (shown == y).all(dim=0), (shown != clean).any(dim=0), clean == y
    reached = None
    if targets is not None and bool((targets != y).any()):
        reached = wilson(int((shown == targets).any(dim=0)[targets != y].sum()), int((targets != y).sum()))
    return Rates(
        clean_accuracy=wilson(int(before.sum()), len(y)),
        remnant_accuracy=wilson(int(right.sum()), len(y)),
        prediction_change_rate=wilson(int(changed.sum()), len(y)),
        strict_attack_success=wilson(int((before & ~right).sum()), int(before.sum())) if bool(before.any()) else None,
        target_reached=reached,
    )


def robustness_curve(
    model: nn.Module,
    data: ImageSet,
    attacks: Callable[[float], Mapping[str, Attack]],
    eps: Sequence[float],
    threat: ThreatModel,
    *,
    targets: Tensor | None = None,
    batch_size: int = 256,
    on_step: Callable[[int, int], None] | None = None,
    generator: torch.Generator,
) -> tuple[Robustness, ...]:
    """Measure `robustness` at several budgets, all from the same seed; each result names its own in ``threat.eps``.

    Each point is what attacks found at that budget, not made monotone with what they found at smaller ones: a curve that rises
    says that an attack failed.

    Args:
        model: Takes images in [0, 1]; left as it was.
        data: Images that the network was not trained on.
        attacks: Budget -> attacks with that budget.
        eps: Budgets.
        threat: The threat model but for its budget.
        targets: See `robustness`.
        batch_size: Images at once, >= 1.
        on_step: Called with ``(step, steps)``, a step being one budget.
        generator: Source of all randomness.

    Raises:
        MethodError: See `robustness`; or there are no budgets.
    """
    if not eps:
        raise MethodError("a curve needs at least one eps, got 0")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    found = []
    for step, value in enumerate(eps, start=1):
        here, draws = replace(threat, eps=value), state.generator(seed)
        found.append(robustness(model, data, attacks(value), here, targets=targets, batch_size=batch_size, generator=draws))
        if on_step is not None:
            on_step(step, len(eps))
    return tuple(found)
