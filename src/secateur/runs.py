"""Whole runs: measure before, repair, remove, measure after, and write it all down.

The command line is a thin face over these functions; each returns a typed record that ``report`` renders.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import __version__
from .architectures import is_reference
from .compress import Removal, remove_channels
from .data import count_shared, holdout
from .errors import DataError, InconclusiveError, MethodError, ModelError
from .measure import Evaluation, Visibility, cost, evaluate, predict, visibility
from .methods import check_suspect, get, settings
from .models import Classifier, build, core
from .models.factory import call_factory, import_factory
from .models.weights import count_outputs
from .poison import train_victim
from .poison.common import unpoisoned
from .prune.layers import prunable_layers
from .prune.mask import hard
from .recipe import Recipe
from .state import generator, seeded
from .train import OnNote, OnStep
from .types import ChannelMask, HardMask, ImageSet, NeuronGraph, Poisoning, Rate, Repaired, Result, Trigger, to_float

HOLDOUT = 0.2
SEEN = 1000  # images on which a trigger's visibility is measured
ENTRIES, LARGEST = 300, 1e100  # of a history that a record keeps: how many, and the largest number
EDGES = 10_000  # of all graphs together that a record keeps
NO_TRIGGER = (
    "No trigger was given, so attack success was not measured: this run does not show whether a backdoor was there, or is gone."
)
ONE_SEED = "One repair with one seed: another seed gives other numbers."


@dataclass(frozen=True, eq=False)
class RepairRun:
    """A finished repair.

    Attributes:
        model: The repaired network, without the channels that could be removed.
        mask: What stays masked in it.
        result: The record.
        step: The entry for the bundle's list of steps.
    """

    model: Classifier
    mask: HardMask | None
    result: Result
    step: Mapping[str, Any]


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


def repair(
    model: Classifier,
    clean: ImageSet,
    *,
    method: str = "norm-pruning",
    arguments: Mapping[str, Any] | None = None,
    test: ImageSet | None = None,
    trigger: Trigger | None = None,
    suspect: ImageSet | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> RepairRun:
    """Repair a network and measure it before and after.

    The method sees the model and clean images, nothing else. Without ``test`` a fifth of ``clean`` is held out from it for
    measuring, because accuracy on the images that healed a network says little.

    Args:
        model: The network; not changed.
        clean: Labelled clean images.
        method: Name of a repair (``secateur list repairs``).
        arguments: Its settings; the rest are defaults.
        test: Images to measure on.
        trigger: Measured as well, when given; the method never sees it.
        suspect: Possibly poisoned images, for methods that need some.
        seed: Of all randomness.
        command: The command line, for the record.
        on_step: Progress of fine-tuning, of repairs that do any.
        on_note: Told how it goes, by repairs that try several things.

    Raises:
        DataError: All test images are also among the clean ones.
        InconclusiveError: The network is no better than chance on the images.
        MethodError: Unknown method or setting, or suspect images missing or of no use.
        ModelError: The images do not fit the network.
    """
    row = get("repair", method)
    chosen = settings(row, arguments or {})
    check_suspect(row, given=suspect is not None)
    random = generator(seed)
    seen, measured = (clean, test) if test is not None else holdout(clean, HOLDOUT, generator=random)
    shared = count_shared(measured, seen)
    if shared == len(measured):
        raise DataError(
            "the test images are all among the clean images, which the repair sees; give others, or leave --test out"
        )
    check_fit(model, seen)
    check_fit(model, measured)
    if suspect is not None:
        check_fit(model, suspect)
    before = measure(model, measured, trigger)
    check_better_than_chance(before, measured)
    start = time.perf_counter()
    function = row.load()
    watchers = {"on_step": on_step, "on_note": on_note}
    watched = {name: watch for name, watch in watchers.items() if name in signature(function).parameters}
    needed = {} if suspect is None else {"suspect": suspect}
    repaired = function(model, seen, **chosen, **needed, **watched, generator=random)
    seconds = time.perf_counter() - start
    final, removal, checks = _remove(repaired, measured)
    mask = (removal.mask if removal.mask.keep else None) if removal else hard(repaired.mask)
    step = {"method": row.name, "version": row.version, "args": chosen}
    result = Result(
        kind="repair",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=_inputs(model),
        data={"clean": _describe(seen), "test": _describe(measured), **({"suspect": _describe(suspect)} if suspect else {})},
        method={"name": row.name, "version": row.version, "args": chosen, "seed": seed},
        before=before,
        after=measure(final, measured, trigger),
        cost={"seconds": seconds},
        checks=checks,
        findings=list((model.origin or {}).get("findings", ())),
        limitations=_limitations(test, trigger, measured, shared),
        details=_details(model, repaired, removal),
    )
    return RepairRun(final, mask, result, step)


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
    model, shown = train_victim(poisoning, untrained, recipe, generator=random, on_step=on_step, checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    assert isinstance(model, Classifier)
    limitations = ["One seed."]
    details: dict[str, Any] = {}
    if attack is not None and shown is not None:
        details = {"backdoor": attack, "trigger": picture(shown, measured)}
    if test is None:
        limitations.append("No test images were given: accuracy is that on the training images, and optimistic.")
    result = Result(
        kind="train",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=[],
        data={"train": _describe(images), "test": _describe(measured)},
        method={"name": arch, "version": 1, "args": {**asdict(recipe), **(kwargs or {})}, "seed": seed},
        before=measure(untrained, measured, shown),
        after=measure(model, measured, shown),
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


def measure(model: Classifier, data: ImageSet, trigger: Trigger | None) -> dict[str, Any]:
    """Return the ``before`` or ``after`` part of a record."""
    rates = evaluate(model, data, trigger=trigger)
    numbers = {name: _rate(getattr(rates, name)) for name in Evaluation.__dataclass_fields__}
    return {**numbers, "adversarial_accuracy": None, **asdict(cost(model, data.shape, repeats=10))}


def check_fit(model: Classifier, data: ImageSet) -> None:
    """Raise `ModelError` unless the images have the network's shape and number of classes."""
    if data.shape != model.input_shape:
        raise ModelError(f"the network takes images of shape {model.input_shape}, got {data.shape}; resize with --input-size")
    if len(data.classes) != len(model.classes):
        raise ModelError(f"the network has {len(model.classes)} classes, the images have {len(data.classes)}")


def check_better_than_chance(before: Mapping[str, Any], data: ImageSet) -> None:
    """Raise `InconclusiveError` when a network does no better than the commonest class would."""
    commonest = max(data.per_class()) / len(data)
    accuracy = before["accuracy"]
    if accuracy["low"] <= commonest:
        remedy = "give more images" if accuracy["value"] > commonest else "check --mean, --std, the class order and the data"
        raise InconclusiveError(
            f"accuracy on the given images is {100 * accuracy['value']:.1f} % (at least {100 * accuracy['low']:.1f} %, "
            f"n={accuracy['n']}), no better than always answering the commonest class ({100 * commonest:.1f} %); {remedy}"
        )


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


def _rate(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else asdict(rate)


def _inputs(model: Classifier) -> list[dict[str, Any]]:
    """Return what a record says of the file that a network came from."""
    return [{key: value for key, value in model.origin.items() if key != "findings"}] if model.origin else []


def _describe(images: ImageSet) -> dict[str, Any]:
    return {"name": images.name, "n": len(images), "per_class": list(images.per_class()), "sha256": images.sha256}


def _limitations(test: ImageSet | None, trigger: Trigger | None, measured: ImageSet, shared: int) -> list[str]:
    said = [ONE_SEED, "Robustness to adversarial examples was not measured."]
    if shared:
        said.append(
            f"{shared} of {len(measured)} measured images are also among those that the repair saw: rates are optimistic."
        )
    if test is None:
        said.append(f"No test images were given: accuracy is that on {len(measured)} clean images held out from the repair.")
    if trigger is None:
        said.append(NO_TRIGGER)
    else:
        said.append("Only the given trigger was tested; other triggers may still work.")
    return said


def _remove(repaired: Repaired, data: ImageSet) -> tuple[Classifier, Removal | None, list[dict[str, Any]]]:
    """Take masked channels out and check that no answer changes."""
    assert isinstance(repaired.model, Classifier)
    if not isinstance(repaired.mask, ChannelMask):
        return repaired.model, None, []
    start = time.perf_counter()
    removal = remove_channels(repaired.model, repaired.mask, data.shape)
    assert isinstance(removal.model, Classifier)
    removal.model.channels = _compose(removal.model.channels, removal.kept)
    same = int((predict(repaired.model, data) == predict(removal.model, data)).sum())
    check = {
        "id": "masked-equals-removed",
        "status": "ok" if same == len(data) else "finding",
        "why": "the network without the pruned channels gives the same answers as the masked one"
        if same == len(data)
        else f"removal changed {len(data) - same} answers, so the masked network was kept",
        "metrics": {"same": same / len(data), "n": len(data)},
        "seconds": time.perf_counter() - start,
    }
    if same < len(data):
        return repaired.model, None, [check]
    return removal.model, removal, [check]


def _details(model: Classifier, repaired: Repaired, removal: Removal | None) -> dict[str, Any]:
    path = [
        {"amount": c.amount, "removed": c.removed, "holdout": _rate(c.holdout), "chosen": c.mask is repaired.mask}
        for c in repaired.path
    ]
    notes = [*repaired.notes, *(removal.notes if removal else ())]
    learned = {"history": _history(repaired.history), "graphs": _graphs(repaired.graphs)}
    return {
        "path": path,
        "layers": _layers(model, repaired) if hard(repaired.mask) else [],
        "log": dict(repaired.log),
        "notes": notes,
        **{name: value for name, value in learned.items() if value},
    }


def _history(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return `ENTRIES` of a history, evenly spaced from the first to the last, and the best one, without what is no number."""
    count = min(len(history), ENTRIES)
    kept = {i * (len(history) - 1) // max(1, count - 1) for i in range(count)}
    rewards = {i: entry["reward"] for i, entry in enumerate(history) if abs(entry.get("reward", math.nan)) <= LARGEST}
    kept |= {max(rewards, key=lambda i: rewards[i])} if rewards else set()
    return [{name: float(value) for name, value in history[i].items() if abs(value) <= LARGEST} for i in sorted(kept)]


def _graphs(graphs: Sequence[NeuronGraph]) -> list[dict[str, Any]]:
    """Return the graphs for a record, with `EDGES` edges at most: the layers with the most cut neurons have theirs first.

    Where not all of a layer's edges have room, those of its cut neurons may have.
    """
    room, edges = EDGES, {}
    for number in sorted(range(len(graphs)), key=lambda i: -len(graphs[i].cut)):
        graph, cut = graphs[number], set(graphs[number].cut)
        choices = (graph.edges, [edge for edge in graph.edges if not cut.isdisjoint(edge)], ())
        edges[number] = next(list(map(list, some)) for some in choices if len(some) <= room)
        room -= len(edges[number])
    shown = []
    for number, graph in enumerate(graphs):
        left = len(graph.edges) - len(edges[number])
        record = {"sites": list(graph.sites), "size": graph.size, "edges": edges[number], "cut": list(graph.cut)}
        shown.append(record | ({"edges_left_out": left} if left else {}))
    return shown


def _layers(model: Classifier, repaired: Repaired) -> list[dict[str, Any]]:
    """Return, for every prunable layer or masked site in the network's order, how much was cut."""
    keep: dict[str, Tensor] = {}
    if repaired.mask is not None and hasattr(repaired.mask, "keep"):
        keep = {name.removesuffix(".weight"): mask for name, mask in repaired.mask.keep.items()}  # type: ignore[union-attr]
    order = {name: i for i, (name, _) in enumerate(core(model).named_modules())}
    names = set(keep) if isinstance(repaired.mask, ChannelMask) else {*keep, *prunable_layers(model)}
    rows = []
    for name in sorted(names, key=lambda n: order.get(n, len(order))):
        total = keep[name].numel() if name in keep else core(model).get_submodule(name).weight.numel()  # type: ignore[union-attr]
        rows.append({"name": name, "total": total, "removed": int((~keep[name]).sum()) if name in keep else 0})
    return rows


def _compose(before: Mapping[str, Sequence[int]], kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return a channel plan in the original network's indices for a network that was shrunk twice."""
    plan = {site: list(index) for site, index in before.items()}
    for site, index in kept.items():
        plan[site] = [plan[site][i] for i in index.tolist()] if site in plan else index.tolist()
    return plan
