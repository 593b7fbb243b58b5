"""ONNX files, for their facts: operators, tensors, and what they point at. Nothing in them is run, and no path in them followed
out of their folder.

The bytes are walked once before the library parses them, because two bytes of a file can become a hundred in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..errors import ModelError
from ..models.files import one_line, read_bytes
from .findings import Finding
from .tensors import DTYPES, Storage, Stored, TensorInfo

MAX_BYTES = 2**31 - 1  # protobuf's own limit
MAX_FIELDS = 1_000_000
MAX_PACKED = 64 * 2**20  # bytes of packed whole numbers, each of which may take eight in memory
MAX_DEPTH = 60  # messages inside messages; a subgraph is three deeper than its graph
MAX_NESTED = 16
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 25
MAX_LOOKED_AT = 4 * 2**30  # bytes of files beside the model that are searched for NaN
MAX_SHOWN = 200
BLOCK = 2**24
NO_MESSAGE = "it is cut short, or its bytes are not those of a protobuf message"

KINDS: Mapping[int, tuple[str, int, str]] = {  # type in the file -> torch's name, bits, and the field when not raw
    1: ("float32", 32, "float_data"),
    2: ("uint8", 8, "int32_data"),
    3: ("int8", 8, "int32_data"),
    4: ("uint16", 16, "int32_data"),
    5: ("int16", 16, "int32_data"),
    6: ("int32", 32, "int32_data"),
    7: ("int64", 64, "int64_data"),
    8: ("string", 0, "string_data"),
    9: ("bool", 8, "int32_data"),
    10: ("float16", 16, "int32_data"),
    11: ("float64", 64, "double_data"),
    12: ("uint32", 32, "uint64_data"),
    13: ("uint64", 64, "uint64_data"),
    14: ("complex64", 64, "float_data"),
    15: ("complex128", 128, "double_data"),
    16: ("bfloat16", 16, "int32_data"),
    17: ("float8_e4m3fn", 8, "int32_data"),
    18: ("float8_e4m3fnuz", 8, "int32_data"),
    19: ("float8_e5m2", 8, "int32_data"),
    20: ("float8_e5m2fnuz", 8, "int32_data"),
    21: ("uint4", 4, "int32_data"),
    22: ("int4", 4, "int32_data"),
    23: ("float4_e2m1fn", 4, "int32_data"),
    24: ("float8_e8m0fnu", 8, "int32_data"),
    25: ("uint2", 2, "int32_data"),
    26: ("int2", 2, "int32_data"),
}
FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
WIDTHS = {"float_data": "<f4", "double_data": "<f8", "int64_data": "<i8", "uint64_data": "<u8"}
STANDARD = ("ai.onnx", "com.microsoft")
OPAQUE = re.compile(r"py(thon)?(custom)?(op|func)(grad)?|aten(op)?|epcontext", re.IGNORECASE)
HEAD = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}  # fields of a model and their wire types
TEXTS = (2, 3, 4, 6)  # of the producer, and a description


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file says.

    Attributes:
        facts: Plain printable values by name, ready for JSON.
        tensors: Its tensors, those of subgraphs and functions included.
        findings: What is noticed about it; values that are not finite are no finding, since exported graphs mask with -inf.
    """

    facts: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    findings: tuple[Finding, ...]


def looks_like_onnx(head: bytes) -> bool:
    """Return whether these first bytes of a file can be those of an ONNX model."""
    if head[:1] != b"\x08":
        return False
    at, seen = 0, []
    while at < len(head):
        try:
            tag, at = _varint(head, at, len(head))
            value, after = _varint(head, at, len(head))
        except ModelError:
            break
        number = tag >> 3
        if HEAD.get(number) != tag & 7 or (number == 1 and not 0 < value < 100):
            return False
        inner = head[after : after + value] if tag & 7 == 2 else b""
        if number in TEXTS:
            text = inner.decode("utf-8", "ignore")
            plain = text.isprintable() and value <= 1000 if number != 6 else "\0" not in text
        else:
            plain = not inner or (inner[0] & 7 in (0, 2) and inner[0] >> 3 > 0)
        if not plain:
            return False
        seen.append(number)
        at = after + (value if tag & 7 == 2 else 0)
    return len(seen) > 1 and seen.count(1) == 1


def read_onnx(path: Path) -> OnnxFacts:
    """Read what an ONNX file says about itself.

    Raises:
        ModelError: It is damaged, contradicts itself or is too large, or the library is missing.
    """
    library = _library()
    data = read_bytes(path, MAX_BYTES)
    try:
        _check_wire(data, library.ModelProto.DESCRIPTOR)
        model = _parse(library, data)
        return _Reader(path.parent).read(model)
    except ModelError as error:
        raise ModelError(f"{path} is not a usable ONNX model: {error}") from error
    except UnicodeError as error:
        raise ModelError(f"{path} is not a usable ONNX model: a name in it is not UTF-8") from error


def _library() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError("reading ONNX needs the extra: pip install 'secateur[onnx]'") from error
    except Exception as error:
        raise ModelError(f"onnx is installed but does not load: {one_line(error)}") from error
    return onnx


def _parse(library: Any, data: bytes) -> Any:
    try:
        model = library.ModelProto.FromString(data)
    except Exception as error:
        raise ModelError("it does not parse") from error
    if not model.HasField("graph") or model.ir_version < 1:
        raise ModelError("it has no graph or no version")
    return model


def _check_wire(data: bytes, descriptor: Any) -> None:
    """Raise `ModelError` for broken or oversized structure, and `UnicodeError` for texts that are none, before it is built."""
    shapes: dict[Any, _Shape] = {}
    fields = packed = 0
    waiting = [(0, len(data), descriptor, 0)]
    while waiting:
        at, end, kind, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"it is nested more than {MAX_DEPTH} levels deep")
        shape = shapes.setdefault(kind, _Shape.of(kind))
        while at < end:
            fields += 1
            tag, at = _varint(data, at, end)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                _, at = _varint(data, at, end)
            elif wire == 2:
                size, at = _varint(data, at, end)
                if number in shape.messages and size:
                    waiting.append((at, at + size, shape.messages[number], depth + 1))
                elif number in shape.texts:
                    data[at : at + size].decode()
                elif number in shape.numbers:
                    packed += size
                at += size
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            if at > end or number == 0 or wire not in (0, 1, 2, 5):
                raise ModelError(NO_MESSAGE)
            if fields > MAX_FIELDS or packed > MAX_PACKED:
                raise ModelError(f"it must have at most {MAX_FIELDS} fields and {MAX_PACKED} bytes of packed numbers")


@dataclass(frozen=True)
class _Shape:
    """Which fields of a message hold messages, texts, and numbers that may be packed and vary in size."""

    messages: Mapping[int, Any]
    texts: frozenset[int]
    numbers: frozenset[int]

    @classmethod
    def of(cls, descriptor: Any) -> _Shape:
        fields = descriptor.fields
        return cls(
            {item.number: item.message_type for item in fields if item.message_type is not None},
            frozenset(item.number for item in fields if item.type == item.TYPE_STRING),
            frozenset(item.number for item in fields if item.cpp_type in (1, 2, 3, 4, 8)),
        )


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ModelError(NO_MESSAGE)


@dataclass
class _Reader:
    """Goes through one model; ``folder`` is where files beside it may lie."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    files: dict[str, Path | None] = field(default_factory=dict)
    looked_at: int = 0

    def read(self, model: Any) -> OnnxFacts:
        nodes, found = _collect(model)
        tensors = tuple(self._tensor(name, tensor) for name, tensor in found)
        custom = self._operators(model, nodes)
        producer = f"{model.producer_name} {model.producer_version}".strip()
        initial = {tensor.name for tensor in model.graph.initializer}
        facts = {
            "ir_version": model.ir_version,
            "producer": _show(producer),
            "opsets": {_show(entry.domain or "ai.onnx"): entry.version for entry in model.opset_import[:MAX_SHOWN]},
            "inputs": _values(value for value in model.graph.input if value.name not in initial),
            "outputs": _values(model.graph.output),
            "nodes": len(nodes),
            "operators": dict(Counter(_operator(node) for node in nodes).most_common(MAX_SHOWN)),
            "functions": [_show(f"{item.domain}::{item.name}") for item in model.functions[:MAX_SHOWN]],
            "custom_domains": sorted({_show(domain) for domain, _ in custom})[:MAX_SHOWN],
            "metadata": [_show(entry.key) for entry in model.metadata_props[:MAX_SHOWN]],
            "training": bool(model.training_info),
            "external_files": [self._file(name) for name in list(self.files)[:MAX_SHOWN]],
        }
        return OnnxFacts(facts, tensors, tuple(self.findings))

    def _operators(self, model: Any, nodes: Iterable[Any]) -> Mapping[tuple[str, str], int]:
        """Find operators that no standard defines, and those that run something else than the graph."""
        own = {(item.domain, item.name) for item in model.functions}
        uses = Counter((node.domain, node.op_type) for node in nodes)
        custom = {key: count for key, count in uses.items() if not _is_standard(key[0]) and key not in own}
        opaque = {key: count for key, count in uses.items() if OPAQUE.fullmatch(key[1]) and key not in custom}
        for (domain, name), count in list(custom.items())[:MAX_SHOWN]:
            text = f"{count} node(s) use the operator {_show(name)!r} of the domain {_show(domain)!r}, which is no standard one"
            self.findings.append(Finding("LOD-002", text))
        for (_, name), count in list(opaque.items())[:MAX_SHOWN]:
            text = f"{count} node(s) are {_show(name)!r}, which runs code that the graph does not show"
            self.findings.append(Finding("LOD-002", text))
        return custom

    def _tensor(self, name: str, tensor: Any) -> TensorInfo:
        """Check one tensor against the bytes that are there."""
        shown, shape = _show(name), tuple(tensor.dims[: MAX_DIMENSIONS + 1])
        if len(shape) > MAX_DIMENSIONS or any(side < 0 for side in shape):
            raise ModelError(f"the tensor {shown!r} must have at most {MAX_DIMENSIONS} sizes, each from 0 up")
        if tensor.HasField("segment") or sum(map(bool, _places(tensor))) > 1:
            raise ModelError(f"the tensor {shown!r} must have its values in one place")
        outside = bool(tensor.external_data) or tensor.data_location == 1
        if tensor.data_type not in KINDS:
            self.findings.append(Finding("LOD-010", f"a tensor is of the type {tensor.data_type}, which is not read", shown))
            if outside:
                self._beside(shown, tensor, None)
            return TensorInfo(shown, f"onnx type {tensor.data_type}", shape, None)
        dtype, bits, typed = KINDS[tensor.data_type]
        count = math.prod(shape)
        if outside and dtype == "string":
            raise ModelError(f"the tensor {shown!r} must hold its texts itself")
        if outside:
            nonfinite = self._beside(shown, tensor, (dtype, count * bits))
        elif tensor.HasField("raw_data"):
            _same(shown, "bytes", math.ceil(count * bits / 8) if bits else -1, len(tensor.raw_data))
            nonfinite = _nonfinite(dtype, memoryview(tensor.raw_data))
        else:
            values = getattr(tensor, typed)
            units = math.ceil(count * bits / 8) if 0 < bits < 8 else count * (2 if "complex" in dtype else 1)
            _same(shown, "values", units, sum(len(getattr(tensor, other)) for other in FIELDS), len(values))
            nonfinite = _nonfinite_values(dtype, typed, values)
        return TensorInfo(shown, dtype, shape, nonfinite)

    def _beside(self, shown: str, tensor: Any, wanted: tuple[str, int] | None) -> int | None:
        """Look at values in a file beside the model; None when that was not done."""
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        given = dict(entries)
        location = given.get("location", "")
        if len(given) != len(entries) or not location or not location.isprintable():
            raise ModelError(f"the tensor {shown!r} must say once, in printable text, in which file its values are")
        if location not in self.files:
            self.files[location] = _inside(self.folder, location)
            if self.files[location] is None:
                text = f"values are said to lie in {_show(location)!r}"
                self.findings.append(Finding("LOD-009", text, shown))
        place = self.files[location]
        offset, length = (_digits(shown, given.get(key)) for key in ("offset", "length"))
        if wanted is None or place is None or not place.exists():
            return None
        if not place.is_file():
            raise ModelError(f"the tensor {shown!r} must have its values in a regular file, got {_show(location)!r}")
        dtype, size = wanted[0], math.ceil(wanted[1] / 8)
        if length is not None:
            _same(shown, "bytes", size, length)
        if (offset or 0) + size > place.stat().st_size:
            raise ModelError(f"the tensor {shown!r} claims more values than {_show(location)!r} holds")
        return self._scan(place, dtype, offset or 0, size)

    def _scan(self, place: Path, dtype: str, offset: int, size: int) -> int | None:
        if not _has_nonfinite(dtype):
            return _nonfinite(dtype, memoryview(b""))
        self.looked_at += size
        if self.looked_at > MAX_LOOKED_AT:
            return None
        found = 0
        try:
            with place.open("rb") as file:
                file.seek(offset)
                for start in range(0, size, BLOCK):
                    found += _nonfinite(dtype, memoryview(file.read(min(BLOCK, size - start)))) or 0
        except OSError as error:
            raise ModelError(f"cannot read {place}: {error.strerror}") from error
        return found

    def _file(self, location: str) -> dict[str, Any]:
        place = self.files[location]
        size = place.stat().st_size if place is not None and place.is_file() else None
        return {"location": _show(location), "inside": place is not None, "bytes": size}


def _collect(model: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """Return all nodes and all tensors, with names, of the graph, its subgraphs and functions."""
    nodes: list[Any] = []
    tensors: list[tuple[str, Any]] = []
    training = [graph for item in model.training_info for graph in (item.initialization, item.algorithm)]
    waiting = [(holder, 0) for holder in (model.graph, *model.functions, *training)]
    for holder, depth in waiting:  # grows while it is gone through
        if depth > MAX_NESTED:
            raise ModelError(f"graphs must be nested at most {MAX_NESTED} deep")
        tensors += [(tensor.name, tensor) for tensor in getattr(holder, "initializer", ())]
        for sparse in getattr(holder, "sparse_initializer", ()):
            tensors += _parts(sparse.values.name, sparse)
        nodes += holder.node
        for where, attribute in _attributes(holder):
            waiting += [(graph, depth + 1) for graph in (*_one(attribute, "g"), *attribute.graphs)]
            tensors += [(where, tensor) for tensor in (*_one(attribute, "t"), *attribute.tensors)]
            for sparse in (*_one(attribute, "sparse_tensor"), *attribute.sparse_tensors):
                tensors += _parts(where, sparse)
        if len(tensors) > MAX_TENSORS:
            raise ModelError(f"it must have at most {MAX_TENSORS} tensors")
    return nodes, tensors


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    for attribute in getattr(holder, "attribute_proto", ()):
        yield f"{holder.name}/{attribute.name}", attribute
    for node in holder.node:
        for attribute in node.attribute:
            yield f"{node.name or node.op_type}/{attribute.name}", attribute


def _one(message: Any, name: str) -> tuple[Any, ...]:
    return (getattr(message, name),) if message.HasField(name) else ()


def _parts(name: str, sparse: Any) -> list[tuple[str, Any]]:
    return [(f"{name} (values)", sparse.values), (f"{name} (indices)", sparse.indices)]


def _places(tensor: Any) -> Iterator[bool]:
    """Say for each place that can hold a tensor's values whether it holds some."""
    yield bool(tensor.external_data) or tensor.data_location == 1
    yield len(tensor.raw_data) > 0
    yield from (len(getattr(tensor, name)) > 0 for name in FIELDS)


def _inside(folder: Path, location: str) -> Path | None:
    """Return the file that a location means, or None when it leaves the folder, by its text or through a link."""
    texts = (PurePosixPath(location), PureWindowsPath(location))
    if ":" in location or any(text.anchor or ".." in text.parts for text in texts):
        return None
    root = Path(os.path.realpath(folder))
    place = Path(os.path.realpath(root / location))
    return place if place.is_relative_to(root) else None


def _same(shown: str, what: str, wanted: int, *got: int) -> None:
    if any(number != wanted for number in got):
        raise ModelError(f"the tensor {shown!r} must hold {wanted} {what} for its sizes, got {got[0]}")


def _digits(shown: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ModelError(f"the tensor {shown!r} must say in digits where its values begin and end")
    return int(text)


def _has_nonfinite(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _nonfinite(dtype: str, data: memoryview) -> int | None:
    """Return how many values in raw bytes are NaN or infinite; None for types that are not looked into."""
    if dtype not in DTYPES:
        return None if _has_nonfinite(dtype) else 0
    count = len(data) // DTYPES[dtype]
    return Stored(dtype, (count,), (1,), 0, Storage(len(data), data=data)).count_nonfinite()


def _nonfinite_values(dtype: str, typed: str, values: Any) -> int | None:
    if not _has_nonfinite(dtype):
        return 0
    if typed != "int32_data":
        return _nonfinite(dtype, memoryview(np.array(values, WIDTHS[typed]).tobytes()))
    kind = "<u2" if DTYPES.get(dtype) == 2 else "<u1"
    return _nonfinite(dtype, memoryview(np.array(values, "<i4").astype(kind).tobytes()))


def _values(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"name": _show(value.name), **_type(value.type)} for _, value in zip(range(MAX_SHOWN), values, strict=False)]


def _type(kind: Any) -> dict[str, Any]:
    """Return the dtype and shape of an input or output; sizes that are not fixed are names."""
    if not kind.HasField("tensor_type"):
        return {"dtype": kind.WhichOneof("value") or "unknown", "shape": None}
    number = kind.tensor_type.elem_type
    dtype = KINDS[number][0] if number in KINDS else f"onnx type {number}"
    if not kind.tensor_type.HasField("shape"):
        return {"dtype": dtype, "shape": None}
    sides = kind.tensor_type.shape.dim[:MAX_SHOWN]
    return {"dtype": dtype, "shape": [s.dim_value if s.HasField("dim_value") else _show(s.dim_param or "?") for s in sides]}


def _operator(node: Any) -> str:
    return _show(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}")


def _is_standard(domain: str) -> bool:
    return domain == "" or any(domain == known or domain.startswith(f"{known}.") for known in STANDARD)


def _show(text: str) -> str:
    """A text from a file may hold anything: escape and shorten it."""
    short = text if len(text) <= 100 else text[:100] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]
