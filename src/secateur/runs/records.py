"""What every record says: rates, images, pictures, the file and the machine that numbers came from."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..data import count_shared, holdout
from ..errors import DataError, InconclusiveError, ModelError
from ..measure import Evaluation, Visibility, cost, evaluate, latencies_ms, visibility
from ..models import Classifier
from ..state import generator, seeded
from ..types import HardMask, ImageSet, Rate, Result, Trigger, to_float

HOLDOUT = 0.2
TIMED = 20  # images, one by one
SEEN = 1000  # images on which a trigger's visibility is measured


@dataclass(frozen=True, eq=False)
class NetworkRun:
    """A finished run that made a network of another.

    Attributes:
        model: The repaired or compressed network, without the channels that could be removed.
        mask: What stays masked in it.
        result: The record.
        step: The entry for the bundle's list of steps.
    """

    model: Classifier
    mask: HardMask | None
    result: Result
    step: Mapping[str, Any]


def measure(model: Classifier, data: ImageSet, trigger: Trigger | None, *, timed: bool = False) -> dict[str, Any]:
    """Return the ``before`` or ``after`` part of a record."""
    with seeded(generator(0)):  # for networks that draw
        rates = evaluate(model, data, trigger=trigger)
        costs = cost(model, data.shape, repeats=TIMED if timed else 0)
    numbers = {name: rate_of(getattr(rates, name)) for name in Evaluation.__dataclass_fields__}
    return {**numbers, "adversarial_accuracy": None, **asdict(costs)}


def compare(
    before: Mapping[str, Any], model: Classifier, final: Classifier, data: ImageSet, trigger: Trigger | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``before`` and ``after`` parts of a record.

    ``before`` is what `measure` returned of ``model``, ``after`` what it does of ``final``. Both networks are timed
    here, in turns: between the two the machine may have become busier.
    """
    with seeded(generator(0)):  # for networks that draw
        own, other = latencies_ms([model, final], data.shape, repeats=TIMED)
    return {**before, "latency_ms": own}, measure(final, data, trigger) | {"latency_ms": other}


def check_fit(model: Classifier, data: ImageSet) -> None:
    """Raise `ModelError` unless the images have the network's shape and number of classes."""
    if data.shape != model.input_shape:
        raise ModelError(f"the network takes images of shape {model.input_shape}, got {data.shape}; use --resize (size=)")
    if len(data.classes) != len(model.classes):
        raise ModelError(f"the network has {len(model.classes)} classes, the images have {len(data.classes)}")


def is_chance(measured: Mapping[str, Any], data: ImageSet) -> bool:
    """Return whether a network may be no better than always answering the commonest class."""
    return measured["accuracy"]["low"] <= max(data.per_class()) / len(data)


def check_better_than_chance(before: Mapping[str, Any], data: ImageSet) -> None:
    """Raise `InconclusiveError` when a network does no better than the commonest class would."""
    commonest, accuracy = max(data.per_class()) / len(data), before["accuracy"]
    if is_chance(before, data):
        remedy = "give more images" if accuracy["value"] > commonest else "check --mean, --std, the class order and the data"
        raise InconclusiveError(
            f"accuracy on the given images is {100 * accuracy['value']:.1f} % (at least {100 * accuracy['low']:.1f} %, "
            f"n={accuracy['n']}), no better than always answering the commonest class ({100 * commonest:.1f} %); {remedy}"
        )


def share_out(clean: ImageSet, test: ImageSet | None, *, generator: torch.Generator) -> tuple[ImageSet, ImageSet, int]:
    """Return the images a method sees, those to measure on (without ``test`` a fifth of the others), and how many are both.

    Raises:
        DataError: All test images are among those that the method sees.
    """
    seen, measured = (clean, test) if test is not None else holdout(clean, HOLDOUT, generator=generator)
    shared = count_shared(measured, seen)
    if shared == len(measured):
        raise DataError(
            "the test images are all among the clean images, which the method sees; give others, or leave --test out"
        )
    return seen, measured, shared


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def tool() -> dict[str, Any]:
    """Return name and version of this package."""
    return {"name": "secateur", "version": __version__, "commit": None}


def environment(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a number may depend on besides its arguments."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return {**software(), "device": device, "threads": torch.get_num_threads()}


def software() -> dict[str, str]:
    """Return the versions and the kind of machine that a number may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.machine()}


def picture(trigger: Trigger, data: ImageSet) -> dict[str, Any]:
    """Return one eligible image without and with the trigger, as PNG ``data:`` URIs, and what the trigger changes."""
    first = int(trigger.eligible(data.y).nonzero()[0])
    clean = to_float(data.x[first : first + 1])
    return {
        "kind": trigger.kind,
        "target": trigger.target,
        "sources": list(trigger.sources) if trigger.sources is not None else None,
        "clean_png": _png(clean[0]),
        "triggered_png": _png(trigger.apply(clean)[0]),
        "visibility": asdict(how_visible(trigger, data)),
    }


def how_visible(trigger: Trigger, data: ImageSet) -> Visibility:
    """Return what a trigger changes, on at most `SEEN` images of all that are eligible."""
    eligible = trigger.eligible(data.y).nonzero().flatten()
    return visibility(trigger, data.subset(eligible[:: max(1, len(eligible) // SEEN)][:SEEN]))


def _png(image: Tensor) -> str:
    pixels = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def rate_of(rate: Rate | None) -> dict[str, Any] | None:
    """Return what a record says of a rate."""
    return None if rate is None else asdict(rate)


def inputs(model: Classifier) -> list[dict[str, Any]]:
    """Return what a record says of the file that a network came from."""
    return [{key: value for key, value in model.origin.items() if key != "findings"}] if model.origin else []


def describe(images: ImageSet) -> dict[str, Any]:
    """Return what a record says of images."""
    return {"name": images.name, "n": len(images), "per_class": list(images.per_class()), "sha256": images.sha256}
