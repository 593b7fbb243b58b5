"""How to train, as plain values: a recipe can be read, checked and hashed without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import MethodError, check_choice, check_range, unknown
from .signatures import check_type

_BUDGET = frozenset({"eps", "norm", "adversarial_step_size"})
ADVERSARIAL: Mapping[str, frozenset[str]] = {  # kind of adversarial training -> the settings that it reads
    "none": frozenset(),
    "pgd": _BUDGET | {"adversarial_steps"},
    "trades": _BUDGET | {"adversarial_steps", "beta"},
    "fast": _BUDGET,
    "free": _BUDGET | {"replays"},
}
ADVERSARIAL_SETTINGS = frozenset().union(*ADVERSARIAL.values())
FRACTIONS = ("eps", "adversarial_step_size")  # may be written 8/255


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the data, >= 0.
        batch_size: Images a step, >= 1; an epoch is cut into equal batches of at most this size.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adamw``.
        lr: Largest learning rate, > 0.
        momentum: Of SGD, in [0, 1).
        nesterov: Nesterov momentum for SGD.
        weight_decay: L2 penalty, >= 0.
        schedule: ``constant``, ``cosine`` (to 0), ``multistep`` (x0.1 at each milestone) or ``triangle`` (up, then down to 0).
        milestones: For ``multistep``, as shares of all steps; for ``triangle``, the first is the peak.
        label_smoothing: In [0, 1).
        augment: Names of batched augmentations: ``crop``, ``flip``.
        precision: ``float32``, or ``bfloat16`` autocast where the machine gains from it.
        adversarial: ``none``, or the adversarial training: ``pgd``, ``trades``, ``fast``, ``free`` (see
            ``adversarial_training.py``). What follows belongs to it and stays at its defaults without it.
        eps: Budget of the perturbation in units of pixels that go from 0 to 1 (8/255), >= 0; 0 trains on clean images.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        adversarial_steps: Steps of ``pgd`` and ``trades``, >= 1.
        adversarial_step_size: Length of a step, >= 0; by default ``2.5 * eps / adversarial_steps`` (the authors' quarter of eps
            at 10 steps), ``1.25 * eps`` for ``fast`` and ``eps`` for ``free``.
        beta: Of ``trades``: weight of the divergence, >= 0 (1 / lambda in the paper).
        replays: Of ``free``: how often each batch is used in a row, >= 1 (m in the paper).
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "multistep", "triangle"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    adversarial: Literal["none", "pgd", "trades", "fast", "free"] = "none"
    eps: float = 0.03137254901960784
    norm: Literal["linf", "l2"] = "linf"
    adversarial_steps: int = 10
    adversarial_step_size: float | None = None
    beta: float = 6.0
    replays: int = 8

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 0, 100_000)
        check_range("batch_size", self.batch_size, 1, 2**31)
        check_range("lr", self.lr, 1e-12, 1e6)
        check_range("momentum", self.momentum, 0, 1 - 1e-9)
        check_range("weight_decay", self.weight_decay, 0, 1e3)
        check_range("label_smoothing", self.label_smoothing, 0, 1 - 1e-9)
        for milestone in self.milestones:
            check_range("milestones", milestone, 0, 1)
        if self.schedule == "triangle" and not self.milestones:
            raise MethodError("milestones must hold the peak of a triangle, got none")
        check_choice("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        check_choice("schedule", self.schedule, ("constant", "cosine", "multistep", "triangle"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        self._check_adversarial()

    def _check_adversarial(self) -> None:
        check_choice("adversarial", self.adversarial, ADVERSARIAL)
        check_choice("norm", self.norm, ("linf", "l2"))
        check_range("eps", self.eps, 0, 1 if self.norm == "linf" else 1e6)
        check_range("adversarial_steps", self.adversarial_steps, 1, 2**31)
        if self.adversarial_step_size is not None:
            check_range("adversarial_step_size", self.adversarial_step_size, 0, 1e6)
        check_range("beta", self.beta, 0, 1e6)
        check_range("replays", self.replays, 1, 2**31)
        used = ADVERSARIAL[self.adversarial]
        for each in fields(self):
            if each.name in ADVERSARIAL_SETTINGS - used and getattr(self, each.name) != each.default:
                users = " or ".join(name for name, settings in ADVERSARIAL.items() if each.name in settings)
                raise MethodError(f"{each.name} has no effect with adversarial={self.adversarial}; set adversarial={users}")

    def settings(self) -> dict[str, Any]:
        """Return all that a result depends on, by name: without the settings of adversarial training that is not done.

        So what was trained before they existed keeps its keys and checkpoints.
        """
        unused = ADVERSARIAL_SETTINGS - ADVERSARIAL[self.adversarial]
        unused |= {"adversarial"} if self.adversarial == "none" else set()
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in unused}

    def factor(self, progress: float) -> float:
        """Return the share of ``lr`` in force after ``progress`` in [0, 1] of all steps."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "multistep":
            return 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "triangle":
            peak = self.milestones[0]
            return progress / peak if progress < peak else (1 - progress) / (1 - peak)
        return 1.0


def read_recipe(given: Mapping[str, Any]) -> Recipe:
    """Return the recipe with these settings and the defaults.

    ``augment`` and ``milestones`` may be a list, one value, or words joined by ``+``; ``eps`` and ``adversarial_step_size`` may
    be texts like ``8/255``.

    Raises:
        MethodError: A name is no part of a recipe, or a value is of the wrong type or out of range.
    """
    known = {field.name: str(field.type) for field in fields(Recipe)}
    chosen = dict(given)
    for name, value in given.items():
        if name not in known:
            raise MethodError(unknown("setting of train", name, known))
        if name in FRACTIONS and isinstance(value, str):
            value = _fraction(name, value)
            chosen[name] = value
        check_type(name, value, known[name])
        if known[name].startswith("tuple"):
            values = value.split("+") if isinstance(value, str) else value
            chosen[name] = tuple(values) if isinstance(values, list | tuple) else (values,)
        elif known[name].startswith("float") and value is not None:
            chosen[name] = float(value)
    return Recipe(**chosen)


def _fraction(name: str, text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise MethodError(f"{name} must be a number, like 8/255 or 0.03, got '{text}'") from None
