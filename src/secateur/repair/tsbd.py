"""TSBD, two-stage backdoor defence: reset the weights that unlearning moves most, then fine-tune on a flat path.

Lin, Liu, Wei, Li, Xiong, "Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness", NeurIPS 2024 (arXiv:2405.20291).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import state
from ..data import count_steps, holdout, passes
from ..errors import MethodError, check_range
from ..models import core
from ..models.channels import trace_channels
from ..prune import follow
from ..prune.grammar import HELD_OUT
from ..prune.mask import apply_mask, removed
from ..train import OnStep
from ..types import ImageSet, Repaired, WeightMask
from .student import check_loss, graduate, student_of
from .unlearning import unlearn

SHARES = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)
TINY = 1e-12


def tsbd(
    model: nn.Module,
    clean: ImageSet,
    *,
    unlearn_lr: float = 1e-4,
    unlearn_epochs: int = 20,
    until: float = 0.1,
    weights: float = 0.7,
    drop: float = 0.2,
    epochs: int = 20,
    lr: float = 0.01,
    radius: float = 0.05,
    blend: float = 0.7,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Set to 0 what changes most when clean images are unlearned, then fine-tune against large gradients.

    Between the network ``w`` and its unlearned copy ``u`` filter ``k`` changed by ``||u_k - w_k||_1``. Among the weights of the
    ``n`` filters that changed most, taken together, the share ``weights`` with the largest ``|u - w|`` goes to 0. Convolutions
    on a shortcut are left alone. Fine-tuning steps along ``(1 - a) * g + a * g'``, where ``g'`` is the gradient at
    ``w + r * g / ||g||``, each parameter by its own norm; the zeros may grow back.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: three quarters are unlearned, a quarter chooses ``n``, all fine-tune.
        unlearn_lr: Learning rate of the unlearning, > 0.
        unlearn_epochs: Its epochs at the most, >= 1.
        until: Stop it when this share of the images or less is answered rightly, in [0, 1].
        weights: Share of weights to reset among the chosen filters, in [0, 1].
        drop: Clean accuracy that the reset may cost before the fine-tuning, in [0, 1]: ``n`` is the largest of 1, 5, 10, ...,
            90 % of all filters before the first that costs more.
        epochs: Epochs of the fine-tuning, >= 0; each step goes through the network twice.
        lr: Its learning rate (SGD with momentum 0.9, constant), > 0.
        radius: ``r``, how far off the second gradient is taken, >= 0.
        blend: ``a``, the weight of that gradient, in [0, 1].
        batch_size: Images per batch, >= 1.
        on_step: Progress of the unlearning, then of the fine-tuning.
        generator: Source of all randomness.

    Returns:
        No mask, since nothing is held at 0: the path has what was reset.

    Raises:
        DataError: ``clean`` is too small to hold a quarter out.
        MethodError: An argument is out of range, or no convolution is left to reset.
        ModelError: The network cannot be traced, or the fine-tuning diverged.

    Differs from the authors' code, which measures every ``n`` on test images and chooses none, in that ``n`` follows from
    ``drop``; in that shortcuts are found by following the data and not by name; in that the unlearning stops by the accuracy
    while it trains, as RNP's does (theirs by that of a pass after it); and in that they fine-tune for one epoch more.
    """
    for name, value in (("weights", weights), ("drop", drop), ("blend", blend)):
        check_range(name, value, 0, 1)
    check_range("radius", radius, 0, 1e6)
    check_range("epochs", epochs, 0, 2**31)
    check_range("unlearn_epochs", unlearn_epochs, 1, 2**31)
    for name, rate in (("lr", lr), ("unlearn_lr", unlearn_lr)):
        check_range(name, rate, 1e-12, 1e6)
    names = resettable(model, clean.shape)
    fitted, judged = holdout(clean, HELD_OUT, generator=generator)
    unlearned, share = unlearn(
        model, fitted, lr=unlearn_lr, until=until, epochs=unlearn_epochs, weight_decay=0.0, batch_size=batch_size,
        on_step=on_step, generator=generator,
    )  # fmt: skip
    before, after = (dict(core(net).named_parameters()) for net in (model, unlearned))
    changes = {name: (after[name] - before[name]).detach().abs().cpu() for name in names}
    masks = {n: reset_mask(changes, filters=n, weights=weights) for n in (0.0, *SHARES)}
    path, mask, note = follow(model, judged, masks, drop)
    assert isinstance(mask, WeightMask)
    chosen = next(n for n in masks if masks[n] is mask)
    repaired = flattened(
        apply_mask(model, mask), clean, epochs=epochs, lr=lr, radius=radius, blend=blend, batch_size=batch_size,
        on_step=on_step, generator=generator,
    )  # fmt: skip
    log = {"unlearned_accuracy": share, "filters_chosen": chosen, "weights_reset": float(sum(removed(mask).values()))}
    return Repaired(repaired, None, path, log, (note,) * bool(note))


def resettable(model: nn.Module, input_shape: tuple[int, int, int]) -> list[str]:
    """Return the names of the weights of all convolutions that are not on a shortcut.

    A convolution is on a shortcut when it writes into a sum with others, and reads what another convolution reads as well whose
    channels do not go into this sum: the first of the way around.

    Raises:
        MethodError: There is none.
        ModelError: The network cannot be traced.
    """
    graph = trace_channels(model, input_shape)
    convolutions = [name for name, module in core(model).named_modules() if isinstance(module, nn.Conv2d)]
    followed = [name for name in convolutions if name in graph.inputs]
    reads = {name: tuple(graph.inputs[name].tolist()) for name in followed}
    writes = {name: tuple(graph.outputs[name].tolist()) for name in followed}
    shortcuts = {
        name
        for name in followed
        if any(writes[other] == writes[name] for other in followed if other != name)
        and any(reads[other] == reads[name] and writes[other] != writes[name] for other in followed)
    }
    names = [f"{name}.weight" for name in convolutions if name not in shortcuts]
    if not names:
        raise MethodError("this network has no convolution whose filters could be reset; use another method")
    return names


def reset_mask(changes: Mapping[str, Tensor], *, filters: float, weights: float) -> WeightMask:
    """Return the mask that sets to 0 the weights that changed most in the filters that changed most.

    Args:
        changes: Parameter name -> how much each weight changed, >= 0.
        filters: Share of all filters to choose, rounded down.
        weights: Share of the chosen filters' weights, rounded down; equal changes go together.
    """
    totals = torch.cat([change.flatten(1).sum(dim=1) for change in changes.values()])
    order = totals.argsort(descending=True, stable=True)
    chosen = torch.zeros(len(totals), dtype=torch.bool)
    chosen[order[: int(filters * len(totals) + 1e-9)]] = True
    rows = dict(zip(changes, chosen.split([len(change) for change in changes.values()]), strict=True))
    pool = torch.cat([change[rows[name]].flatten() for name, change in changes.items()])
    count = int(weights * len(pool) + 1e-9)
    least = float(pool.kthvalue(len(pool) - count + 1).values) if count else math.inf
    keep = {}
    for name, change in changes.items():
        inside = rows[name].reshape(-1, *[1] * (change.ndim - 1))
        keep[name] = ~(inside & (change >= least))
    return WeightMask(keep)


def flattened(
    model: nn.Module,
    clean: ImageSet,
    *,
    epochs: int,
    lr: float,
    radius: float,
    blend: float,
    batch_size: int,
    on_step: OnStep | None,
    generator: torch.Generator,
) -> nn.Module:
    """Return a fine-tuned copy, in eval mode; see `tsbd`."""
    student = student_of(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    steps = epochs * count_steps(len(clean), batch_size)
    device = next(student.parameters()).device
    batches = passes(clean, batch_size, epochs, augment=("crop", "flip"), device=device, generator=generator)
    with state.seeded(generator):
        for step, (x, y) in enumerate(batches, 1):
            loss, slopes = flat_slopes(student, x, y, radius=radius, blend=blend)
            check_loss(loss, step, lr)
            for parameter, slope in zip(student.parameters(), slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            if on_step is not None:
                on_step(step, steps)
    return graduate(model, student)


def flat_slopes(network: nn.Module, x: Tensor, y: Tensor, *, radius: float, blend: float) -> tuple[float, Sequence[Tensor]]:
    """Return the loss and ``(1 - a) * g + a * g'`` per parameter; only the first pass moves running statistics."""
    parameters = dict(network.named_parameters())
    loss, here = _slopes(lambda: network(x), y, list(parameters.values()))
    there = {
        name: (parameter + radius * slope / (slope.norm() + TINY)).detach().requires_grad_()
        for (name, parameter), slope in zip(parameters.items(), here, strict=True)
    }
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    _, ahead = _slopes(lambda: functional_call(network, {**there, **buffers}, (x,)), y, list(there.values()))
    return loss, [(1 - blend) * g + blend * further for g, further in zip(here, ahead, strict=True)]


def _slopes(answer: Callable[[], Tensor], y: Tensor, leaves: list[Tensor]) -> tuple[float, Sequence[Tensor]]:
    loss = F.cross_entropy(answer(), y)
    return float(loss.detach()), torch.autograd.grad(loss, leaves, materialize_grads=True)
