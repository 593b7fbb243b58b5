"""Forgetting given triggers by distillation: answer a triggered image as the network answered the clean one.

Ours; what `auto` heals with. Stamped images that keep their labels are Neural Cleanse's unlearning (IEEE S&P 2019); the
network's own answers as targets for what is to stay are those of Li, Hoiem, "Learning without Forgetting" (arXiv:1606.09282);
the step at the worst weights nearby is that of FT-SAM (arXiv:2304.11823).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import state
from ..data import count_steps, passes
from ..errors import check_range
from ..models import core
from ..prune.mask import parameter_masks
from ..recipe import Recipe
from ..train import OnStep
from ..types import HardMask, ImageSet, Trigger
from .ft_sam import sharp_gradients
from .neural_cleanse import stamping
from .student import check_loss, graduate, student_of, undropped

TEMPERATURE = 2.0


def forget(
    model: nn.Module,
    clean: ImageSet,
    triggers: Sequence[Trigger],
    *,
    teacher: nn.Module | None = None,
    mask: HardMask | None = None,
    epochs: int = 5,
    lr: float = 0.01,
    batch_size: int = 64,
    share: float = 0.15,
    rho: float = 2.0,
    trust: float = 0.5,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> nn.Module:
    """Train on clean images, a share of which bears a trigger, towards the teacher's answers to the images without it.

    ``(1 - trust) * CE(f(x'), y) + trust * T^2 * KL(teacher(x) / T || f(x') / T)`` with ``T = 2``, where ``x'`` is ``x`` or
    ``x`` with a trigger, at the worst weights nearby (see `ft_sam`). SGD with momentum 0.9, a cosine schedule, no weight decay,
    no augmentation and no dropout: what the network knows is to stay as it is.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        triggers: One of them, drawn at random, is put on each image that is chosen; without any, none is.
        teacher: Whose answers to clean images are to stay; ``model`` by default.
        mask: What stays cut.
        epochs: Passes over the images, >= 0.
        lr: Largest learning rate, > 0.
        batch_size: Images per batch, >= 1.
        share: Share of each batch that gets a trigger, in [0, 1].
        rho: Radius of the ball of weights, >= 0; 0 takes plain steps, half as long in the making.
        trust: Weight of the teacher's answers against that of the labels, in [0, 1].
        on_step: Progress.
        generator: Source of all randomness.

    Returns:
        A trained copy in eval mode.

    Raises:
        DataError: There are no clean images.
        MethodError: An argument is out of range.
        ModelError: Training diverged.
    """
    check_range("share", share, 0, 1)
    check_range("rho", rho, 0, 1e6)
    check_range("trust", trust, 0, 1)
    recipe = Recipe(epochs=epochs, lr=lr, batch_size=batch_size)
    student = undropped(student_of(model))
    knows = deepcopy(model if teacher is None else teacher).eval().requires_grad_(False)
    parameters = dict(core(student).named_parameters())
    device = next(iter(parameters.values())).device
    held = [(parameters[name], keep.to(device)) for name, keep in (parameter_masks(model, mask) if mask else {}).items()]
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=recipe.momentum)
    steps = epochs * count_steps(len(clean), batch_size)
    stamp = stamping(triggers, share) if triggers else None
    with state.seeded(generator):
        for step, (x, y) in enumerate(passes(clean, batch_size, epochs, device=device, generator=generator)):
            optimizer.param_groups[0]["lr"] = lr * recipe.factor((step + 0.5) / steps)
            with torch.no_grad():
                known = F.log_softmax(knows(x) / TEMPERATURE, dim=1)
            shown = x if stamp is None else stamp(x, y, step, generator)[0]
            loss = float(sharp_gradients(student, partial(_loss, student, shown, y, known, trust), rho=rho))
            check_loss(loss, step + 1, lr)
            optimizer.step()
            with torch.no_grad():
                for parameter, keep in held:
                    parameter.mul_(keep)
            if on_step is not None:
                on_step(step + 1, steps)
    return graduate(model, student)


def _loss(network: nn.Module, x: Tensor, y: Tensor, known: Tensor, trust: float) -> Tensor:
    """Return the loss of the formula; ``known`` are the teacher's log-probabilities at the temperature, ``(b, classes)``."""
    logits = network(x)
    apart = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), known, log_target=True, reduction="batchmean")
    return (1 - trust) * F.cross_entropy(logits, y) + trust * TEMPERATURE**2 * apart


def between(before: nn.Module, after: nn.Module, share: float) -> nn.Module:
    """Return a network on the straight line between two: WiSE-FT (arXiv:2109.01903), here of running statistics too.

    Args:
        before: Where the line begins; not changed.
        after: Where it ends, a network of the same parameters and buffers.
        share: How much of the way to go, in [0, 1].
    """
    check_range("share", share, 0, 1)
    start, end = before.state_dict(), after.state_dict()
    mixed = {name: start[name].lerp(value, share) if value.is_floating_point() else value for name, value in end.items()}
    result = deepcopy(after)
    result.load_state_dict(mixed)
    return result.eval()
