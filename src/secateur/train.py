"""One training loop: it trains victims, fine-tunes repaired networks and serves every later method that trains.

The network that comes in is not changed; a trained copy goes out. All randomness comes from the generator, so that a run
killed after any epoch and resumed from its checkpoint ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adversarial_training import Adversary, Watch
from .data import augment
from .errors import DataError, MethodError, ModelError
from .models import core, wrappers_of
from .models.quantised import is_on_grid
from .recipe import Recipe
from .state import batch_size, load_progress, save_progress, seeded
from .types import ImageSet, to_float

BatchHook = Callable[[Tensor, Tensor, int, torch.Generator], tuple[Tensor, Tensor]]
Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]
OnNote = Callable[[str], None]
OnEpoch = Callable[[int, float, nn.Module], None]


@dataclass
class _Run:
    """What changes while training; exactly this is what a checkpoint stores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    fingerprint: str
    adversary: Adversary
    watch: Watch | None = None
    hook: Any = None  # a batch hook that has a state of its own
    epoch: int = 0
    loss: float = field(default=math.nan)
    note: str = ""

    def save(self, path: Path) -> None:
        state = {
            "epoch": self.epoch,
            "loss": self.loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "hook": self.hook.state_dict() if self.hook else {},
            "adversary": self.adversary.state_dict(),
            "watched": self.watch.best if self.watch else 0.0,
            "note": self.note,
        }
        save_progress(path, state, self.fingerprint)

    def resume(self, path: Path) -> None:
        state = load_progress(path, self.fingerprint)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.hook:
            self.hook.load_state_dict(state["hook"])
        if self.watch:
            self.watch.best = state["watched"]
        if state.get("adversary"):
            self.adversary.load_state_dict(state["adversary"])
        self.epoch, self.loss, self.note = state["epoch"], state["loss"], state.get("note", "")


def train(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    hold: Mapping[str, Tensor] | None = None,
    batch_hook: BatchHook | None = None,
    penalty: Penalty | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    on_note: OnNote | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
) -> nn.Module:
    """Return a trained copy of ``model``, in eval mode.

    Args:
        model: Takes images in [0, 1] and returns logits ``(b, classes)``; not changed.
        data: Training images; moved to the model's device once.
        recipe: How to train; with ``adversarial``, on perturbed images (see `secateur.adversarial_training.Adversary`).
        generator: Source of all randomness (order, augmentation, dropout, starts of perturbations).
        hold: Parameter name (relative to the core network) -> bool of its shape. False entries are 0 after every step, in the
            parameter and in the optimizer's averages, so that pruned weights stay pruned.
        batch_hook: ``(x, y, step, generator) -> (x, y)``, applied to each augmented batch, ``x`` float in [0, 1]; it may return
            another number of images. What it returns may depend on parameters of its own: they get their gradients from
            the same backward pass as the network. Its ``state_dict``, if it has one, goes into the checkpoint. Perturbations
            come after it, around what it returns.
        penalty: ``(network, x, y) -> scalar`` added to the loss of each batch, the network in train mode; ``x`` without
            perturbations.
        on_step: Called with ``(step, steps)`` after each step.
        on_epoch: Called with ``(epoch, mean loss, model)`` after each epoch, the model in train mode.
        on_note: Called with a sentence when ``fast`` overfits catastrophically (`secateur.adversarial_training.Watch`).
            Training then ends with the weights of the epoch before.
        checkpoint: Where to write the state after each epoch; an existing file of the same run is resumed.
        identity: What else tells this run from another: a text that stands for the settings of ``batch_hook`` and ``penalty``.

    Raises:
        DataError: There are no images.
        MethodError: ``hold`` does not fit the network, or ``eps`` the images; or see `check_trainable`.
        ModelError: The loss is not finite, or the checkpoint belongs to another run.
    """
    if len(data) == 0:
        raise DataError("training needs at least one image, got 0")
    check_trainable(model)
    student = deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.requires_grad_(True)
    device = next(student.parameters()).device
    images = ImageSet(data.x.to(device), data.y.to(device), data.classes, data.name)
    adversary = Adversary(recipe, data.shape)
    watch = Watch(images, recipe) if adversary.kind == "fast" else None
    hook = batch_hook if hasattr(batch_hook, "state_dict") else None
    run = _Run(student, _optimizer(student, recipe), generator, "", adversary, watch, hook)
    held = _held(student, hold)
    if checkpoint is not None:
        run.fingerprint = _fingerprint(model, data, recipe, hold or {}, generator, identity)
        if checkpoint.exists():
            run.resume(checkpoint)
    _release(run, held)
    while run.epoch < recipe.epochs and not run.note:
        before = deepcopy(student.state_dict()) if watch else {}
        with seeded(generator):
            _epoch(run, images, recipe, held, batch_hook, penalty, on_step)
        run.epoch += 1
        fallen = watch.fallen(student, generator) if watch else ""
        if fallen:
            student.load_state_dict(before)
            run.note = f"{fallen} in epoch {run.epoch}: training ended with the weights of the epoch before"
        if checkpoint is not None:
            run.save(checkpoint)
        if on_epoch is not None:
            on_epoch(run.epoch, run.loss, student)
    if run.note and on_note is not None:
        on_note(run.note)
    for old, after in zip(model.parameters(), student.parameters(), strict=True):
        after.grad = None
        after.requires_grad_(old.requires_grad)
    return student.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def check_trainable(model: nn.Module) -> None:
    """Raise `MethodError` for a network that rounds its feature maps, whose gradients are 0, or that is quantised for good."""
    rounded = [fields["after"] for fields in wrappers_of(model) if fields["kind"] == "round"]
    if rounded:
        raise MethodError(
            f"the network rounds its feature maps after '{rounded[-1]}', and nothing before that can be trained; take it off "
            "first (models.unwrap)"
        )
    if is_on_grid(model):
        raise MethodError(
            "the network is quantised already, and training would undo that; take it off first (models.dequantised)"
        )


def _epoch(
    run: _Run,
    data: ImageSet,
    recipe: Recipe,
    held: list[tuple[nn.Parameter, Tensor]],
    batch_hook: BatchHook | None,
    penalty: Penalty | None,
    on_step: OnStep | None,
) -> None:
    run.model.train()
    steps = math.ceil(len(data) / batch_size(recipe.batch_size))
    batches = torch.randperm(len(data), generator=run.generator).tensor_split(steps)
    total = torch.zeros((), device=data.x.device)
    for i, index in enumerate(batches):
        step = run.epoch * steps + i
        for group in run.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.factor((step + 0.5) / (steps * recipe.epochs))
        index = index.to(data.x.device)
        x, y = data.x.index_select(0, index), data.y.index_select(0, index)
        x = to_float(augment(x, recipe.augment, generator=run.generator))
        if batch_hook is not None:
            x, y = batch_hook(x, y, step, run.generator)
        total += _step(run, recipe, held, x, y, penalty)
        if on_step is not None:
            on_step(step + 1, steps * recipe.epochs)
    run.loss = float(total) / steps
    if not math.isfinite(run.loss):
        raise ModelError(
            f"training diverged: the loss is {run.loss} in epoch {run.epoch + 1}; use a smaller lr than {recipe.lr:g}"
        )


def _step(
    run: _Run, recipe: Recipe, held: list[tuple[nn.Parameter, Tensor]], x: Tensor, y: Tensor, penalty: Penalty | None
) -> Tensor:
    """Train on a batch, as often as it is replayed; return the mean of the losses."""

    def low() -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")

    def answer(images: Tensor) -> Tensor:
        with low():
            logits = run.model(images)
        return logits.float()

    total = torch.zeros((), device=x.device)
    for _ in range(run.adversary.replays):
        run.optimizer.zero_grad(set_to_none=True)
        loss = run.adversary.loss(run.model, answer, x, y, run.generator)
        with low():
            more = penalty(run.model, x, y) if penalty is not None else 0.0
        loss = loss + more
        loss.backward()
        run.adversary.learn()
        run.optimizer.step()
        _release(run, held)
        total += loss.detach()
        x = x.detach()  # what made it has had its gradient
    return total / run.adversary.replays


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _held(model: nn.Module, hold: Mapping[str, Tensor] | None) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = dict(core(model).named_parameters())
    pairs = []
    for name, keep in (hold or {}).items():
        if name not in parameters:
            raise MethodError(f"the mask to hold names '{name}', which is not a parameter of this network")
        parameter = parameters[name]
        if keep.shape != parameter.shape:
            raise MethodError(f"the mask of '{name}' must have shape {tuple(parameter.shape)}, got {tuple(keep.shape)}")
        pairs.append((parameter, ~keep.to(parameter.device)))
    return pairs


@torch.no_grad()
def _release(run: _Run, held: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Put held weights, and what the optimizer remembers of them, back to 0."""
    for parameter, gone in held:
        parameter.masked_fill_(gone, 0)
        for memory in run.optimizer.state.get(parameter, {}).values():
            if isinstance(memory, Tensor) and memory.shape == parameter.shape:
                memory.masked_fill_(gone, 0)


def _fingerprint(
    model: nn.Module, data: ImageSet, recipe: Recipe, hold: Mapping[str, Tensor], generator: torch.Generator, identity: str
) -> str:
    digest = hashlib.sha256(repr((sorted(recipe.settings().items()), identity)).encode())
    digest.update(data.sha256.encode())
    digest.update(generator.get_state().numpy().tobytes())
    for name, tensor in [*model.state_dict().items(), *hold.items()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
