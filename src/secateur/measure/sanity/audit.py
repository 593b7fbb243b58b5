"""The entry point of the sanity checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from ...attack.ball import Norm, check_budget
from ...attack.network import Forward
from ...data.splits import stratified
from ...errors import MethodError, check_range
from ...types import ImageSet
from ..adversarial import Attack, ThreatModel, check_images
from ..intervals import wilson
from ..robustness import Robustness
from .evidence import OURS, Settings
from .gather import gather
from .judging import standing
from .table import RULES
from .values import Sanity

NONE: Mapping[str, Attack] = MappingProxyType({})


def sanity(
    model: nn.Module,
    data: ImageSet,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    queries: int = 100,
    images: int = 200,
    attacks: Mapping[str, Attack] = NONE,
    forward: Forward | None = None,
    surrogate: nn.Module | None = None,
    train: ImageSet | None = None,
    measured: Robustness | None = None,
    batch_size: int = 256,
    on_step: Callable[[int, int], None] | None = None,
    generator: torch.Generator,
) -> Sanity:
    """Attack a network in many ways and judge whether what is left of it may be called robust.

    **Cost** of each image that is right when clean, at most: ``7 * steps + 4`` forwards with backwards, fewer where an attack
    breaks it early; 45 forwards; and if white-box attacks leave it, ``queries`` more, and ``steps`` with backwards of the
    surrogate. Attacks given come on top.

    Args:
        model: Takes images in [0, 1]; left as it was.
        data: Images that it was not trained on, with true labels.
        eps: Budget in units of pixels that go from 0 to 1, > 0.
        norm: Distance that the budget bounds.
        steps: Steps of PGD, >= 2.
        step_size: Length of a step; by default ``2.5 * eps / steps``.
        queries: Queries of Square, >= 1.
        images: How many images to look at, drawn by class, >= 1; all if there are fewer.
        attacks: Name -> attack to judge beside ours, such as the one that a figure was measured with (see `bind`).
        forward: What gradient attacks call in place of the network (`bpda`, `eot`); answers are always the network's.
        surrogate: Another network, such as the one before repair, whose images are tried on this one.
        train: Images that the network was trained on, to count those that are measured on too.
        measured: What `robustness` found on these images at this budget, untargeted: the figure that is judged.
        batch_size: Images at once, >= 1.
        on_step: Called with ``(step, steps)``, a step being one attack.
        generator: Source of all randomness, on the CPU.

    Returns:
        Every check with its number, and whether none failed.

    Raises:
        MethodError: An argument is out of range, there are no images, or an attack given returns none.
        ModelError: The network does not take the images.
    """
    check_images(data)
    _check(steps=steps, step_size=step_size, queries=queries, images=images, batch_size=batch_size)
    features = data.x.shape[1:].numel()
    check_budget(eps, norm, features)
    if eps == 0:
        raise MethodError("eps must be above 0, got 0; accuracy without an attack is what evaluate measures")
    threat = ThreatModel(eps, norm)
    if measured is not None:
        _check_figure(measured, data, threat)
    if clash := sorted(attacks.keys() & {*OURS}):
        raise MethodError(f"attacks need names other than ours ({', '.join(OURS)}), got {clash[0]}")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    [rows] = stratified(data.y, [min(images, len(data))], generator=generator)
    settings = Settings(threat, steps, step_size, queries, forward, batch_size, features, seed)
    evidence = gather(
        model, data.subset(rows), rows, settings, attacks=attacks, surrogate=surrogate, train=train, on_step=on_step
    )
    evidence = replace(evidence, measured=None if measured is None else measured.outcomes)
    checks = tuple(rule.check(evidence) for rule in RULES)
    return Sanity(
        checks=checks,
        established=all(check.status != "FAIL" for check in checks),
        threat=settings.threat,
        clean_accuracy=wilson(int(evidence.right.sum()), len(rows)),
        upper_bound=standing(evidence),
        budgets=evidence.budgets,
        seed=seed,
    )


def _check_figure(measured: Robustness, data: ImageSet, threat: ThreatModel) -> None:
    """Raise unless the figure is one on these images under this threat model."""
    y, got = measured.outcomes.y, measured.threat
    if not torch.equal(y, data.y):
        raise MethodError(f"the figure must be one on the same {len(data)} images, got one on {len(y)} others")
    if (got.eps, got.norm, got.targeted) != (threat.eps, threat.norm, False):
        raise MethodError(f"the figure must be one under the same threat model ({threat}), got one under {got}")


def _check(*, steps: int, step_size: float | None, queries: int, images: int, batch_size: int) -> None:
    check_range("steps", steps, 2, 2**31)
    check_range("queries", queries, 1, 2**31)
    check_range("images", images, 1, 2**31)
    check_range("batch_size", batch_size, 1, 2**31)
    if step_size is not None:
        check_range("step_size", step_size, 1e-9, 1e6)
