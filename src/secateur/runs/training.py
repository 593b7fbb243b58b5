"""A training from end to end, with a backdoor or without one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architectures import is_reference
from ..errors import InconclusiveError, MethodError, ModelError
from ..methods import get, settings
from ..models import Classifier, build
from ..models.factory import call_factory, import_factory
from ..models.weights import count_outputs
from ..poison import train_victim
from ..poison.common import unpoisoned
from ..recipe import Recipe
from ..state import generator, seeded
from ..train import OnStep
from ..types import ImageSet, Poisoning, Result, Trigger
from .records import check_fit, compare, describe, environment, measure, now, picture, tool


@dataclass(frozen=True, eq=False)
class TrainRun:
    """A finished training.

    Attributes:
        model: The trained network.
        trigger: What opens its backdoor, if it has one that is known.
        result: The record.
    """

    model: Classifier
    trigger: Trigger | None
    result: Result


def train(
    images: ImageSet,
    *,
    arch: str,
    kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    test: ImageSet | None = None,
    trigger: Trigger | None = None,
    backdoor: str | None = None,
    backdoor_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    command: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> TrainRun:
    """Train a network, with a backdoor if one is named, and measure it before and after.

    Args:
        images: Training images.
        arch: Name of the architecture (``secateur.models.names()``), or ``file.py:make`` of the user's own code.
        kwargs: Its arguments, besides the number of classes and channels.
        recipe: How to train.
        mean: Per channel; that of the images by default.
        std: Likewise.
        test: Images to measure on; the training images by default, which the record then says.
        trigger: Measured as well, when given: that of images that are poisoned already.
        backdoor: Name of a backdoor to put in (``secateur list backdoors``).
        backdoor_settings: Its settings; the rest are defaults.
        seed: Of all randomness.
        device: Where to train.
        checkpoint: File to resume from after a kill.
        command: The command line, for the record.
        on_step: Progress.

    Raises:
        InconclusiveError: None of the images to measure on is of a class that the attacker wants to move.
        MethodError: Unknown backdoor or setting, or a trigger besides a backdoor.
        ModelError: The images to measure on have another shape or other classes, training diverged, or the checkpoint belongs
            to another run.
    """
    random = generator(seed)
    poisoning, attack = _poisoned(images, trigger, backdoor, backdoor_settings or {}, random)
    untrained = new_network(poisoning.data, arch, kwargs=kwargs, mean=mean, std=std, generator=random)
    untrained.to(device)
    measured = test if test is not None else images
    check_fit(untrained, measured)
    if attack is not None:
        _check_eligible(poisoning.trigger or _wanted(attack["args"], images), measured)
    start = time.perf_counter()
    limitations = ["One seed."]
    model, shown = train_victim(
        poisoning, untrained, recipe, generator=random, checkpoint=checkpoint, on_step=on_step,
        on_note=lambda note: limitations.append(f"{note[0].upper()}{note[1:]}."),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert isinstance(model, Classifier)
    details: dict[str, Any] = {}
    if attack is not None and shown is not None:
        details = {"backdoor": attack, "trigger": picture(shown, measured)}
    if test is None:
        limitations.append("No test images were given: accuracy is that on the training images, and optimistic.")
    before, after = compare(measure(untrained, measured, shown), untrained, model, measured, shown)
    result = Result(
        kind="train",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=[],
        data={"train": describe(images), "test": describe(measured)},
        method={"name": arch, "version": 1, "args": {**recipe.settings(), **(kwargs or {})}, "seed": seed},
        before=before,
        after=after,
        cost={"seconds": seconds},
        limitations=limitations,
        details=details,
    )
    return TrainRun(model, shown, result)


def _wanted(args: Mapping[str, Any], images: ImageSet) -> Trigger:
    """Return whom an attack is for that only learns its trigger in training."""
    sources = args.get("sources")
    tell = {"classes": len(images.classes)}
    return Trigger("generator", tell, {}, args["target"], tuple(sources) if sources is not None else None)


def _check_eligible(trigger: Trigger, data: ImageSet) -> None:
    """Raise `InconclusiveError` unless an attack can be measured on these images; before a training, not after it."""
    if not bool(trigger.eligible(data.y).any()):
        raise InconclusiveError("no test image is of a class that the attacker wants to move; give others with --test")


def _poisoned(
    images: ImageSet,
    trigger: Trigger | None,
    backdoor: str | None,
    chosen: Mapping[str, Any],
    random: torch.Generator,
) -> tuple[Poisoning, dict[str, Any] | None]:
    """Return the training set to begin with, and what the record says of the backdoor in it."""
    if backdoor is None:
        return Poisoning(trigger, images, unpoisoned(images)), None
    if trigger is not None:
        raise MethodError("give a trigger for images that are poisoned already, or name a backdoor to put in, not both")
    row = get("backdoor", backdoor)
    args = settings(row, chosen)
    poisoning = row.load()(images, **args, generator=random)
    number = int(poisoning.poisoned.sum())
    return poisoning, {"name": row.name, "version": row.version, "args": args, "poisoned": number}


def new_network(
    images: ImageSet,
    arch: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator,
) -> Classifier:
    """Build an untrained network for these images: one of the zoo, or of a user's own ``file.py:make``.

    Mean and std are those of the images by default.
    """
    with seeded(generator):
        net, description = _own(arch, images) if is_reference(arch) else _of_the_zoo(arch, images, kwargs or {})
    pixels = images.x[:10_000].transpose(0, 1).flatten(1).double() / 255
    return Classifier(
        net,
        classes=images.classes,
        input_shape=images.shape,
        mean=mean or pixels.mean(dim=1).tolist(),
        std=std or pixels.std(dim=1).clamp_min(1e-3).tolist(),
        arch=description,
    )


def _of_the_zoo(arch: str, images: ImageSet, kwargs: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    chosen = {**kwargs, "classes": len(images.classes)}
    if arch.partition(":")[0] != "torchvision":
        chosen["in_channels"] = images.shape[0]
    return build(arch, **chosen), {"name": arch, "kwargs": chosen}


def _own(reference: str, images: ImageSet) -> tuple[torch.nn.Module, dict[str, Any]]:
    make, digest = import_factory(reference)
    net = call_factory(make)
    outputs = count_outputs(net, images.shape)
    if outputs != len(images.classes):
        raise ModelError(f"{reference} must give one logit per class ({len(images.classes)}), got {outputs}")
    return net, {"factory": {"ref": reference, "sha256": digest}}
