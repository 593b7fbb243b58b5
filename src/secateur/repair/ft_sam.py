"""FT-SAM: fine-tuning with sharpness-aware minimisation, which moves large weights most.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023
(arXiv:2304.11823).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import state
from ..data import count_steps, passes
from ..errors import check_range
from ..recipe import Recipe
from ..train import OnStep
from ..types import ImageSet, Repaired
from .student import check_loss, graduate, student_of

TINY = 1e-12


def ft_sam(
    model: nn.Module,
    clean: ImageSet,
    *,
    epochs: int = 100,
    lr: float = 0.01,
    rho: float = 2.0,
    smoothing: float = 0.1,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Fine-tune with the gradient at the worst weights nearby, where nearby is measured relative to each weight.

    Each step takes the gradient ``g`` at the weights ``w``, then descends along the gradient at
    ``w + rho * w^2 * g / |w * g|`` (adaptive SAM): a ball in which large weights move most. SGD with momentum 0.9, weight decay
    5e-4, a cosine schedule over all steps, crops and flips. The target of the loss is ``1 - smoothing`` for the true class and
    ``smoothing / (classes - 1)`` for each other.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        epochs: Passes over them, >= 0; each step goes through the network twice.
        lr: Largest learning rate, > 0.
        rho: Radius of the ball, >= 0; 0 is plain fine-tuning.
        smoothing: Of the labels, in [0, 0.5].
        batch_size: Images per batch, >= 1.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: There are no clean images.
        MethodError: An argument is out of range.
        ModelError: Training diverged.

    Differs from the authors' code in that the cosine schedule runs once over all steps; theirs is set to 100 epochs but counts
    batches, so that the learning rate swings up and down, once every 200 batches.
    """
    check_range("rho", rho, 0, 1e6)
    check_range("smoothing", smoothing, 0, 0.5)
    recipe = Recipe(epochs=epochs, lr=lr, batch_size=batch_size)
    student = student_of(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    steps = epochs * count_steps(len(clean), batch_size)
    device = next(student.parameters()).device
    batches = passes(clean, batch_size, epochs, augment=("crop", "flip"), device=device, generator=generator)
    loss = math.nan
    with state.seeded(generator):
        for step, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * recipe.factor((step + 0.5) / steps)
            loss = float(sharp_gradients(student, partial(smoothed_loss, student, x, y, smoothing), rho=rho))
            check_loss(loss, step + 1, lr)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, steps)
    return Repaired(graduate(model, student), None, log={"loss": loss} if steps else {})


def sharp_gradients(network: nn.Module, loss: Callable[[], Tensor], *, rho: float) -> Tensor:
    """Leave in ``.grad`` the gradient at the worst weights of the ball; return the loss at the weights themselves.

    Only the first of the two passes moves the running statistics of batch-norms.

    Args:
        network: Whose parameters are moved and put back.
        loss: Computes the loss, a scalar, with the network as it is at the call.
        rho: Radius of the ball, >= 0.
    """
    value = _backward(network, loss)
    if rho == 0:
        return value
    used = [(p, p.grad) for p in network.parameters() if p.grad is not None]
    before = [p.detach().clone() for p, _ in used]
    with torch.no_grad():
        scale = rho / (torch.stack([(p * grad).norm() for p, grad in used]).norm() + TINY)
        for p, grad in used:
            p.add_(p.square().mul_(grad).mul_(scale))
    with _still(network):
        _backward(network, loss)
    with torch.no_grad():
        for (p, _), old in zip(used, before, strict=True):
            p.copy_(old)
    return value


def smoothed_loss(network: nn.Module, x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy to ``1 - smoothing`` for the true class and equal parts of the rest for the others, a scalar."""
    logits = network(x)
    classes = logits.shape[1]
    return F.cross_entropy(logits, y, label_smoothing=smoothing * classes / (classes - 1))


def _backward(network: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    network.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach()


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Keep the running statistics of norms in train mode as they are; the norms go on using the batch's."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
