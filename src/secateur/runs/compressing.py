"""A compression from end to end: measure and attack, compress, measure and attack again, and say how small it is now."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..compress import Runtime, agreement, encode, export_onnx
from ..compress.pruning import check_targets
from ..data.splits import stratified
from ..errors import MethodError, ModelError, check_range
from ..measure import TransferMatrix, correct, latencies_ms, latency_ms, transfer_matrix, wilson
from ..measure.adversarial import ThreatModel, craft
from ..methods import Method, get, parameters, settings
from ..models import Classifier, quantisation_of
from ..prune.mask import compression, hard, joined, still, zeros
from ..state import generator
from ..train import OnNote, OnStep
from ..types import HardMask, ImageSet, Repaired, Result
from .evading import adaptive_attack, divergence_attack
from .records import (
    NetworkRun,
    check_better_than_chance,
    check_fit,
    compare,
    describe,
    environment,
    inputs,
    is_chance,
    measure,
    now,
    rate_of,
    share_out,
    tool,
)
from .repairing import layers_cut

ATTACKED = 500  # images under attack
STEPS = 10
LATENCY = 50  # images, one by one
BATCH = 250  # images attacked at once
BEFORE, AFTER = "before", "after"
ONE_SEED = "One compression with one seed: another seed gives other numbers."
BROKEN = "The network after is no better than chance: give more clean images, more epochs or a smaller target."
TWIN = "Attacks follow the twin in floating point; of an integer file only the share of equal answers is known."


def compress(
    model: Classifier,
    clean: ImageSet,
    *,
    method: str = "pruning",
    arguments: Mapping[str, Any] | None = None,
    target: float | None = None,
    bits: int | None = None,
    also: Sequence[float] = (),
    test: ImageSet | None = None,
    eps: float = 0.03137254901960784,
    images: int = ATTACKED,
    seed: int = 0,
    command: Sequence[str] = (),
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> NetworkRun:
    """Compress a network; measure accuracy, size and robustness before and after, and how images made on one fool the other.

    Without ``test`` a fifth of ``clean`` is held out from the method for measuring.

    Args:
        model: The network; not changed.
        clean: Labelled clean images.
        method: Name of a compressor (``secateur list compressors``).
        arguments: Its settings; the rest are defaults.
        target: All parameters over those left, >= 1; for a method that cuts a ``fraction``, that of what it can cut.
        bits: Of weights and feature maps, for methods that round.
        also: Further targets to compress the network to, measured alike: how the choice trades accuracy for robustness.
        test: Images to measure on.
        eps: Budget of the attacks (PGD, Linf) in units of pixels that go from 0 to 1, > 0.
        images: How many images are attacked, >= 1.
        seed: Of all randomness.
        command: The command line, for the record.
        on_step: Progress of the method.
        on_note: Told what is being done.

    Raises:
        DataError: All test images are also among the clean ones.
        InconclusiveError: The network is no better than chance on the images.
        MethodError: Unknown method or setting, or one that this method does not have.
        ModelError: The images do not fit the network.
    """
    row = get("compressor", method)
    given = dict(arguments or {})
    chosen = settings(row, given | asked(row, target, bits, given))
    others = {f"{times:g}x": settings(row, given | asked(row, times, bits)) for times in also}
    if len(others) < len(also) or chosen in others.values():
        raise MethodError("further targets must be different, and other than the target")
    check_range("eps", eps, 1e-12, 1)
    check_range("images", images, 1, 2**31)
    random, tell = generator(seed), on_note or (lambda _: None)
    seen, measured, shared = share_out(clean, test, generator=random)
    check_fit(model, seen)
    check_fit(model, measured)
    before = measure(model, measured, None)
    check_better_than_chance(before, measured)
    function, state = row.load(), random.get_state()
    check_targets(model, [given["target"] for given in (chosen, *others.values()) if "target" in given])
    watchers = {"on_step": on_step, "on_note": on_note}
    watched = {name: watch for name, watch in watchers.items() if name in signature(function).parameters}

    def compressed(given: Mapping[str, Any], told: str) -> Repaired:
        tell(f"compressing with {row.name}{told}")
        return function(model, seen, **given, **watched, generator=random)

    made: dict[str, Repaired] = {}
    seconds = 0.0
    jobs = {AFTER: chosen, **others}
    for name in sorted(jobs, key=lambda name: -_strength(jobs[name])):  # what is too much is refused before minutes are spent
        random.set_state(state)
        start = time.perf_counter()
        made[name] = compressed(jobs[name], f", {name}" if name in others else "")
        seconds = time.perf_counter() - start if name == AFTER else seconds
    networks = {BEFORE: model, **{name: made[name].model for name in jobs}}
    done, before_cut = made[AFTER], zeros(model)
    final = done.model
    assert isinstance(final, Classifier)

    def cut(done: Repaired) -> HardMask | None:
        return joined(model, hard(done.mask), still(before_cut, done.model))

    mask = cut(done)
    times = compression(model, before_cut), compression(model, mask)
    attacked = measured
    if images < len(measured):
        attacked = measured.subset(stratified(measured.y, [images], generator=generator(seed))[0])
    tell(f"attacking {len(attacked):,} images with {len(networks)} networks")
    matrix = _transfer(networks, attacked, eps, seed)
    before, after = compare(before, model, final, measured, None)
    broken = [BROKEN] if is_chance(after, measured) else []
    small = _compression(model, final, measured, matrix, times)
    if others:
        whole = {BEFORE: (before["accuracy"], small["encoded_bytes"][0]), AFTER: (after["accuracy"], small["encoded_bytes"][1])}
        rest = {name: (_share(correct(networks[name], measured)), len(encode(networks[name]))) for name in others}
        reached = {name: compression(model, cut(done)) for name, done in made.items()}
        lost = [f"{reached[name]:.3g}x" for name, (accuracy, _) in rest.items() if is_chance({"accuracy": accuracy}, measured)]
        if lost:
            broken.append(f"{', '.join(lost)}: no better than chance, so that what is right under attack says nothing.")
        small["choices"] = _choices(whole | rest, matrix, reached)
    step = {"method": row.name, "version": row.version, "args": chosen}
    result = Result(
        kind="compress",
        created=now(),
        command=list(command),
        tool=tool(),
        environment=environment(model),
        inputs=inputs(model),
        data={"clean": describe(seen), "test": describe(measured)},
        method={"name": row.name, "version": row.version, "args": chosen, "seed": seed},
        before=before | {"adversarial_accuracy": _left(matrix, BEFORE)},
        after=after | {"adversarial_accuracy": _left(matrix, AFTER)} | _not_timed(final),
        cost={"seconds": seconds},
        findings=list((model.origin or {}).get("findings", ())),
        limitations=_limitations(final, test, measured, shared),
        details={
            "compression": {**small, "divergence": _divergence(model, final, attacked, matrix, seed)},
            "layers": layers_cut(model, replace(done, mask=mask)) if mask else [],
            "log": dict(done.log),
            "notes": [*broken, *done.notes],
        },
    )
    return NetworkRun(final, mask, result, step)


def _not_timed(model: Classifier) -> dict[str, Any]:
    """Return that a quantised network has no time: it computes in floating point what an integer file would."""
    return {"latency_ms": None} if quantisation_of(model) is not None else {}


def _strength(given: Mapping[str, Any]) -> float:
    """Return how much a method is to cut: a target or a share; 0 for one that rounds only."""
    return given.get("target", given.get("fraction", 0.0))


def asked(
    row: Method, target: float | None, bits: int | None, arguments: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the settings that a target and a number of bits are, for this method.

    Raises:
        MethodError: The method has no such setting, or ``arguments`` say it, too.
    """
    known = {parameter.name for parameter in parameters(row)}
    found: dict[str, Any] = {}
    if target is not None:
        check_range("target", target, 1, 1e9)
        if not {"target", "fraction"} & known:
            raise MethodError(f"'{row.name}' has no target; it rounds, and its size follows from bits")
        found |= {"target": float(target)} if "target" in known else {"fraction": 1 - 1 / target}
    if bits is not None:
        if "bits" not in known:
            raise MethodError(f"'{row.name}' does not round; use it first, then compress its result with 'quantisation'")
        found["bits"] = bits
    for name in found.keys() & arguments.keys():
        raise MethodError(
            f"{name} is given twice, as {found[name]:g} and {arguments[name]}; give it once, as a flag or a setting"
        )
    return found


def _transfer(networks: Mapping[str, nn.Module], data: ImageSet, eps: float, seed: int) -> TransferMatrix:
    attack = adaptive_attack(get("evasion", "pgd"), {"eps": eps, "steps": STEPS})
    return transfer_matrix(networks, networks, data, attack, ThreatModel(eps), generator=generator(seed))


def _divergence(
    before: Classifier, after: Classifier, data: ImageSet, matrix: TransferMatrix, seed: int
) -> dict[str, Any] | None:
    """Return how many images can be changed so that the network before is right and the one after wrong, of those both know."""
    known, threat = matrix.right[BEFORE] & matrix.right[AFTER], ThreatModel(matrix.threat.eps)
    if not bool(known.any()):
        return None
    some = data.subset(known)
    attack = divergence_attack(before, {"eps": threat.eps})
    made = [
        craft(attack, after, x, y, threat, generator(seed)).stored
        for x, y in zip(some.x.split(BATCH), some.y.split(BATCH), strict=True)
    ]
    changed = replace(some, x=torch.cat(made))
    return _share(correct(before, changed) & ~correct(after, changed))


def _left(matrix: TransferMatrix, name: str) -> dict[str, Any]:
    """Return the accuracy that a network keeps under its own images."""
    return _share(matrix.right[name] & ~matrix.wrong[name, name])


def _share(right: torch.Tensor) -> dict[str, Any]:
    return asdict(wilson(int(right.sum()), len(right)))


def _choices(
    measured: Mapping[str, tuple[Mapping[str, Any], int]], matrix: TransferMatrix, times: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return what each choice of a target would leave, the network before first, the one asked for second.

    Args:
        measured: Name -> accuracy and encoded bytes.
        matrix: Of all the networks.
        times: Name -> compression that was reached; not of the network before.
    """
    return [
        {
            "name": f"{times[name]:.3g}x" if name in times else name,
            "encoded_bytes": size,
            "accuracy": accuracy,
            "white_box": _left(matrix, name),
            "transfer": _share(~matrix.wrong[BEFORE, name]),
        }
        for name, (accuracy, size) in measured.items()
    ]


def _compression(
    before: Classifier, after: Classifier, data: ImageSet, matrix: TransferMatrix, times: tuple[float, float]
) -> dict[str, Any]:
    cells = [
        {
            "source": source,
            "target": target,
            "success": rate_of(rate),
            "left": _share(~matrix.wrong[source, target]),
        }
        for (source, target), rate in matrix.success.items()
        if {source, target} <= {BEFORE, AFTER}
    ]
    encoded = [len(encode(model)) for model in (before, after)]
    threat = str(matrix.threat).rpartition(", ")[0]  # what the attacker knows differs from cell to cell
    found = {"threat": threat, "budget": matrix.budget, "transfer": cells, "encoded_bytes": encoded}
    found |= dict(zip(("times_before", "times"), times, strict=True))
    quantisation = quantisation_of(after)
    if quantisation is not None and quantisation.activation_bits == 8:
        found["runtime"] = _runtime(before, after, data)
    return found


def _runtime(before: Classifier, after: Classifier, data: ImageSet) -> dict[str, Any]:
    """Return what the integer file is and answers, and its time beside that of the network before, or why that is not known."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = export_onnx(after, Path(folder) / "after.onnx")
            runtime = Runtime(file.path)
            found = agreement(after, runtime, data)
        except ModelError as error:
            return {"why": str(error)}
        told = {"bytes": file.size_bytes, "agreement": asdict(found.same), "accuracy": asdict(found.runtime)}
        try:
            whole = Runtime(export_onnx(before, Path(folder) / "before.onnx").path)
        except ModelError:
            return {**told, "latency_ms": latency_ms(runtime, data.shape, repeats=LATENCY)}
        own, other = latencies_ms([runtime, whole], data.shape, repeats=LATENCY)
        return {**told, "latency_ms": own, "latency_ms_before": other}


def _limitations(model: Classifier, test: ImageSet | None, measured: ImageSet, shared: int) -> list[str]:
    said = [
        ONE_SEED,
        f"Attacked by PGD of {STEPS} steps alone: what that leaves bounds robustness from above; secateur attack does more.",
    ]
    if quantisation_of(model) is not None:
        said.append(TWIN)
    if shared:
        said.append(
            f"{shared} of {len(measured)} measured images are also among those that the method saw: rates are optimistic."
        )
    if test is None:
        said.append(f"No test images were given: rates are those on {len(measured)} clean images held out from the method.")
    said.append("A mask of single weights makes no dense file smaller and no dense network faster.")
    return said
