"""A repair from end to end: measure, repair, remove, measure again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor

from ..compress import Removal, remove_channels
from ..measure import predict
from ..methods import check_suspect, get, settings
from ..models import Classifier, core
from ..prune.layers import prunable_layers
from ..prune.mask import hard
from ..state import generator
from ..train import OnNote, OnStep
from ..types import ChannelMask, ImageSet, NeuronGraph, Repaired, Result, Trigger
from .records import (
    NetworkRun,
    check_better_than_chance,
    check_fit,
    compare,
    describe,
    environment,
    inputs,
    measure,
    now,
    rate_of,
    share_out,
    tool,
)

ENTRIES, LARGEST = 300, 1e100  # of a history that a record keeps: how many, and the largest number
EDGES = 10_000  # of all graphs together that a record keeps
NO_TRIGGER = (
    "No trigger was given, so attack success was not measured: this run does not show whether a backdoor was there, or is gone."
)
ONE_SEED = "One repair with one seed: another seed gives other numbers."


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
) -> NetworkRun:
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
    seen, measured, shared = share_out(clean, test, generator=random)
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
    before, after = compare(before, model, final, measured, trigger)
    result = Result(
        kind="repair",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=inputs(model),
        data={"clean": describe(seen), "test": describe(measured), **({"suspect": describe(suspect)} if suspect else {})},
        method={"name": row.name, "version": row.version, "args": chosen, "seed": seed},
        before=before,
        after=after,
        cost={"seconds": seconds},
        checks=checks,
        findings=list((model.origin or {}).get("findings", ())),
        limitations=_limitations(test, trigger, measured, shared),
        details=_details(model, repaired, removal),
    )
    return NetworkRun(final, mask, result, step)


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
        {"amount": c.amount, "removed": c.removed, "holdout": rate_of(c.holdout), "chosen": c.mask is repaired.mask}
        for c in repaired.path
    ]
    notes = [*repaired.notes, *(removal.notes if removal else ())]
    learned = {"history": _history(repaired.history), "graphs": _graphs(repaired.graphs)}
    return {
        "path": path,
        "layers": layers_cut(model, repaired) if hard(repaired.mask) else [],
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


def layers_cut(model: Classifier, repaired: Repaired) -> list[dict[str, Any]]:
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
