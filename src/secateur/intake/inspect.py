"""What a file is and what speaks against it, as far as that can be told without running anything from it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError, RefusedError
from .findings import Finding
from .pickles import Record
from .reading import Reading, admit, read, show
from .tensors import Stored, TensorInfo

Verdict = Literal["readable", "refused", "unusable"]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: The file or folder.
        format: By content.
        size: Bytes of weights.
        sha256: Of the file.
        weights_sha256: Of names, types, shapes and values alone: the same in whatever container; None when not all were read.
        verdict: ``readable``; ``refused``: the file is a program or names dangerous objects; ``unusable``: there are no
            weights in it that can be used.
        why: The reason, unless it is readable.
        findings: What was noticed, worst first.
        globals: Objects that a pickle names.
        tensors: The weights.
        architecture: ``name`` and ``kwargs`` of the zoo's network that has these weights; None when there is none.
        unmatched: Why there is none, if so.
        layers: Class of each layer, when a network was pickled whole.
        facts: What else the file says.
    """

    path: str
    format: str
    size: int
    sha256: str
    weights_sha256: str | None
    verdict: Verdict
    why: str | None
    findings: tuple[Finding, ...] = ()
    globals: tuple[str, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    architecture: Mapping[str, Any] | None = None
    unmatched: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def inspect(path: str | Path, *, match: bool = True) -> Inspection:
    """Look into a file or folder.

    Args:
        path: What to look into.
        match: Whether to look for the architecture, which imports torch; nothing else does.

    Raises:
        ModelError: There is nothing there, it is no checkpoint, or it is too damaged to say anything about.
    """
    reading = read(path)
    if reading.problem and not reading.refusal:
        raise ModelError(f"{show(reading.path)}: {reading.problem}")
    verdict, why = _judge(reading)
    weights = {} if reading.contents is None else reading.contents.tensors
    tensors = reading.described or tuple(_look(name, tensor) for name, tensor in weights.items())
    spoilt = [tensor.name for tensor in tensors if tensor.nonfinite and reading.format != "onnx"]  # graphs mask with -inf
    if spoilt:
        more = f" and {len(spoilt) - 1} more" if len(spoilt) > 1 else ""
        told = Finding("LOD-008", f"{spoilt[0][:60]!a}{more} hold NaN or infinite values", spoilt[0][:60])
        reading = replace(reading, findings=(*reading.findings, told))
    found = Inspection(
        path=str(reading.path),
        format=reading.format,
        size=reading.size,
        sha256=reading.sha256,
        weights_sha256=_digest(weights),
        verdict=verdict,
        why=why,
        findings=tuple(sorted(reading.findings, key=lambda finding: finding.rank, reverse=True)),
        globals=reading.names,
        tensors=tensors,
        layers={} if reading.contents is None else {name: layer.kind for name, layer in reading.contents.layers.items()},
        facts={**(reading.contents.facts if reading.contents else {}), **reading.facts},
    )
    return _match(found, reading) if match and verdict == "readable" else found


def _judge(reading: Reading) -> tuple[Verdict, str | None]:
    try:
        admit(reading)
    except RefusedError as error:
        return "refused", str(error)
    except ModelError as error:
        return "unusable", str(error)
    return "readable", None


def _look(name: str, tensor: Stored | Record) -> TensorInfo:
    if isinstance(tensor, Record):
        return TensorInfo(name, "?", (), None)
    looked = TensorInfo(name, tensor.dtype, tensor.shape, tensor.count_nonfinite())
    tensor.release()
    return looked


def _digest(weights: Mapping[str, Stored | Record]) -> str | None:
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        if not isinstance(tensor, Stored):
            return None
        total.update(repr((name, tensor.dtype, tensor.shape)).encode())
        for block in tensor.blocks():
            total.update(block.data)
        tensor.release()
    return total.hexdigest() if weights else None


def _match(found: Inspection, reading: Reading) -> Inspection:
    if reading.format == "bundle":
        return _rebuilt(replace(found, architecture=reading.facts["arch"]))
    from .checkpoint import fitting, hint, recognised

    assert reading.contents is not None
    tensors = {name: tensor for name, tensor in reading.contents.tensors.items() if isinstance(tensor, Stored)}
    try:
        if name := reading.facts.get("arch"):
            kwargs = fitting(tensors, name, reading.facts.get("kwargs", {}))
        else:
            name, kwargs, _ = recognised(tensors)
    except ModelError as error:
        return replace(found, unmatched=f"{error}{hint(reading)}")
    return replace(found, architecture={"name": name, "kwargs": kwargs})


def _rebuilt(found: Inspection) -> Inspection:
    """Check that a bundle's parts fit each other, unless only its author's code could tell."""
    assert found.architecture is not None
    if found.architecture["factory"]:
        return found
    from ..models.bundle import load_bundle

    try:
        load_bundle(found.path)
    except ModelError as error:
        return replace(found, verdict="unusable", why=str(error))
    return found
