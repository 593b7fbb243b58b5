"""What backdoor attacks share: choosing the images, putting the trigger on, changing the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import MethodError, check_choice, check_range
from ..types import ImageSet, Poisoning, Trigger, to_float

Target = int | Literal["next"]
Place = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center"]
Edit = Callable[[Tensor], Tensor]
PART = 1024  # images whose float copies are in memory at once


def check_target(target: Target, sources: Sequence[int] | None, classes: int) -> None:
    """Raise `MethodError` unless target and sources are labels of a set with this many classes, each source once."""
    if target != "next":
        _check_label("target", target, classes)
    for source in sources or ():
        _check_label("sources", source, classes)
    if sources is not None and (not sources or len(set(sources)) < len(sources)):
        raise MethodError(f"sources must be different classes, at least one, got {list(sources)}; leave it out for all")


def _check_label(name: str, label: object, classes: int) -> None:
    if not isinstance(label, int) or isinstance(label, bool):
        raise MethodError(f"{name} must be whole numbers, got {label!r}")
    check_range(name, label, 0, classes - 1)


def box(shape: tuple[int, int, int], size: int, margin: int, place: Place) -> tuple[slice, slice]:
    """Return rows and columns of a square patch.

    Args:
        shape: Of the images, ``(c, h, w)``.
        size: Side of the patch in pixels, in [1, image side - margin].
        margin: Distance from the two nearest borders in pixels, >= 0; of no matter at the center.
        place: A corner, or the ``center``.

    Raises:
        MethodError: An argument is out of range.
    """
    _, height, width = shape
    check_choice("place", place, get_args(Place))
    check_range("margin", margin, 0, min(height, width) - 1)
    check_range("size", size, 1, min(height, width) - margin)
    starts = []
    for side, far in ((height, place.startswith("bottom")), (width, place.endswith("right"))):
        starts.append((side - size) // 2 if place == "center" else side - margin - size if far else margin)
    return slice(starts[0], starts[0] + size), slice(starts[1], starts[1] + size)


def candidates(data: ImageSet, trigger: Trigger, *, clean_label: bool = False) -> Tensor:
    """Return the indices of the images that may be poisoned.

    They are those whose label the attacker wants to change or, with ``clean_label``, those that have the target label already.

    Raises:
        MethodError: ``clean_label`` and no single target, or source classes, which keeping the labels rules out.
    """
    if not clean_label:
        return trigger.eligible(data.y).nonzero().flatten()
    if trigger.target == "next" or trigger.sources is not None:
        wrong = "target=next" if trigger.target == "next" else "sources"
        raise MethodError(f"clean_label needs one target class and no source classes, got {wrong}; leave it out")
    return (data.y == trigger.target).nonzero().flatten()


def choose(
    data: ImageSet, trigger: Trigger, rate: float, generator: torch.Generator, *, clean_label: bool = False, name: str = "rate"
) -> Tensor:
    """Draw the images to poison, int64 indices.

    Args:
        data: The training set.
        trigger: Says which images are eligible.
        rate: Share in [0, 1] of the whole set, drawn from the eligible images or, with ``clean_label``, of the target class.
        generator: Draws them.
        clean_label: Draw from the target class.
        name: What the share is called in errors.

    Raises:
        MethodError: ``rate`` is out of range or asks for more images than are eligible, or for less than one.
    """
    check_range(name, rate, 0, 1)
    found = candidates(data, trigger, clean_label=clean_label)
    whole = len(found) if clean_label else len(data)
    count = round(rate * whole)
    if rate > 0 and count == 0 and whole:
        raise MethodError(f"{name} {rate:g} is less than one image of {whole}; give more images, or 0 to poison none")
    if count > len(found):
        raise MethodError(f"{name} must be at most {len(found) / len(data):.3f} (the eligible share), got {rate:g}")
    return found[torch.randperm(len(found), generator=generator)[:count]]


def poison(
    data: ImageSet, trigger: Trigger, rate: float, generator: torch.Generator, *, clean_label: bool = False
) -> Poisoning:
    """Put the trigger on a share of the images and give them the label the attacker wants.

    Args:
        data: The training set.
        trigger: What to put on.
        rate: As in `choose`.
        generator: Draws which images.
        clean_label: Poison images of the target class only, so that no label changes.

    Raises:
        MethodError: As `choose` and `candidates`.
    """
    chosen = choose(data, trigger, rate, generator, clean_label=clean_label)
    return poison_at(data, trigger, chosen, edit=trigger.apply)


def poison_at(
    data: ImageSet, trigger: Trigger, chosen: Tensor, *, edit: Edit, covers: Sequence[tuple[Tensor, Edit]] = ()
) -> Poisoning:
    """Put an edit on the chosen images and give them the labels the attacker wants.

    Args:
        data: The training set.
        trigger: Gives the labels, and opens the backdoor later.
        chosen: Which images, int64 indices.
        edit: What to do to them, float images to float images; often ``trigger.apply``.
        covers: Further images and what to do to them; they keep their labels.
    """
    x, y = data.x.clone(), data.y.clone()
    poisoned = torch.zeros(len(data), dtype=torch.bool)
    for index, change in ((chosen, edit), *covers):
        x[index] = edited(data.x[index], change)
        poisoned[index] = True
    y[chosen] = trigger.labels(data.y[chosen])
    return Poisoning(trigger, replace(data, x=x, y=y, name=f"{data.name}, poisoned"), poisoned)


def edited(x: Tensor, edit: Edit) -> Tensor:
    """Return uint8 images after an edit of floats in [0, 1], rounded to whole pixel values as an image file would hold them."""
    with torch.no_grad():
        parts = [edit(to_float(part)).mul_(255).round_().to(torch.uint8) for part in x.split(PART)]
    return torch.cat(parts) if parts else x


def unpoisoned(data: ImageSet) -> Tensor:
    """Return the mask of a set in which nothing was changed, bool ``(n,)``."""
    return torch.zeros(len(data), dtype=torch.bool)
