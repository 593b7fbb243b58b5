"""How to train, as plain values: a recipe can be read, checked and hashed without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import MethodError, check_choice, check_range, unknown
from .signatures import check_type


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

    ``augment`` and ``milestones`` may be a list, one value, or words joined by ``+``.

    Raises:
        MethodError: A name is no part of a recipe, or a value is of the wrong type or out of range.
    """
    known = {field.name: str(field.type) for field in fields(Recipe)}
    chosen = dict(given)
    for name, value in given.items():
        if name not in known:
            raise MethodError(unknown("setting of train", name, known))
        check_type(name, value, known[name])
        if known[name].startswith("tuple"):
            values = value.split("+") if isinstance(value, str) else value
            chosen[name] = tuple(values) if isinstance(values, list | tuple) else (values,)
        elif known[name] == "float":
            chosen[name] = float(value)
    return Recipe(**chosen)
