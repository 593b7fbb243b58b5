"""Files of ``torch.save``, zipped (since 1.6) and legacy, and bare pickles: read as plain data, tensors left where they are.

The same reading serves `info`, `convert` and every other verb, so that what was looked at is what is used. It is tested against
``torch.load``. Compressed entries, big-endian files and the tar files of torch before 0.1.10 are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from .archive import Archive
from .pickles import Budget, Call, Name, Names, Pickle, Record, read_pickle
from .tensors import DTYPES, Storage, Stored

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_NESTED = 3
PAIR = 100  # bytes that a pair in a dictionary takes, about
STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32"},
    **{"Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64"},
    **{"ComplexDouble": "complex128"},
}


@dataclass(eq=False)
class TorchFile:
    """What a torch file holds.

    Attributes:
        value: Plain values with `Stored` tensors, or `Record` where something else stood; None when it was damaged.
        names: Every global that is named anywhere in it.
        problem: Why it could not be read to the end, if so. The globals seen until then count all the same.
        legacy: Whether it is of the format before torch 1.6.
        budget: What is left for its pickles.
    """

    value: Any = None
    names: Names = field(default_factory=dict)
    problem: str | None = None
    legacy: bool = False
    budget: Budget = field(default_factory=Budget)


def read_zipped(archive: Archive) -> TorchFile:
    """Read a zipped torch file."""

    def persistent(pid: Any) -> Storage:
        storage, content = _storage(pid), archive.read(f"data/{pid[2]}")
        if len(content) > storage.size:
            raise ModelError(f"a tensor's storage must fill its entry of {len(content)} bytes, got {storage.size}")
        storage.fill(content)
        return storage

    def read(file: TorchFile) -> Any:
        if "byteorder" in archive.entries and bytes(archive.read("byteorder")[:8]) != b"little":
            raise ModelError("a checkpoint must be little-endian; save it again on such a machine")
        content = archive.read("data.pkl")
        found = _read(content, 0, file, persistent)
        if found.end != len(content):
            raise ModelError("something follows the pickle in data.pkl")
        return found.value

    return _attempt(read)


def read_pickled(data: memoryview, nested: int = 0, budget: Budget | None = None) -> TorchFile:
    """Read a legacy torch file, or one bare pickle; inside another one it shares that one's ``budget``."""

    def read(file: TorchFile) -> Any:
        waiting: dict[str, Storage] = {}

        def persistent(pid: Any) -> Any:
            if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
                return pid[1]
            storage = _storage(pid[:5] if isinstance(pid, tuple) and pid[5:] == (None,) else pid)
            known = waiting.setdefault(str(pid[2]), storage)
            if known.size != storage.size:
                raise ModelError("a storage must have one size, but two are given")
            return known

        found = _read(data, 0, file, persistent, nested)
        if found.value != MAGIC:
            if found.end != len(data):
                raise ModelError("something follows the pickle: other readers may see another file")
            return found.value
        file.legacy = True
        values = []
        for _ in range(4):
            found = _read(data, found.end, file, persistent, nested)
            values.append(found.value)
        if values[0] != PROTOCOL or not isinstance(values[3], list):
            raise ModelError("a damaged legacy checkpoint")
        _fill(data, found.end, values[3], waiting)
        return values[2]

    return _attempt(read, budget)


def _attempt(read: Callable[[TorchFile], Any], budget: Budget | None = None) -> TorchFile:
    file = TorchFile(budget=budget or Budget())
    try:
        file.value = read(file)
    except ModelError as error:
        file.problem = str(error)
    return file


def _read(content: memoryview, start: int, file: TorchFile, persistent: Callable[[Any], Any], nested: int = 0) -> Pickle:
    def load_from_bytes(arguments: tuple[Any, ...]) -> Any:
        if nested >= MAX_NESTED or len(arguments) != 1 or not isinstance(arguments[0], bytes):
            raise ModelError("a storage that is pickled by itself must be given as bytes")
        inner = read_pickled(memoryview(arguments[0]), nested + 1, file.budget)
        file.names.update(inner.names)
        if inner.problem:
            raise ModelError(inner.problem)
        return inner.value

    def ordered(arguments: tuple[Any, ...]) -> Any:
        pairs = arguments[0] if arguments else None
        file.budget.make(PAIR * len(pairs) if isinstance(pairs, list) else 0)
        return _ordered(arguments)

    def encode(arguments: tuple[Any, ...]) -> Any:
        file.budget.make(len(arguments[0]) if arguments and isinstance(arguments[0], str) else 0)
        return _encode(arguments)

    calls = {**CALLS, LOAD: load_from_bytes, ORDERED: ordered, ENCODE: encode}
    return read_pickle(content, start, calls=calls, persistent=persistent, names=file.names, budget=file.budget)


def _storage(pid: Any) -> Storage:
    """Return the storage that a persistent id describes: ``("storage", type, key, location, numel)``."""
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or type(pid[4]) is not int:
        raise ModelError("a persistent id must describe a tensor's storage")
    _, kind, key, _, numel = pid
    name = kind.name if isinstance(kind, Name) and kind.module in ("torch", "torch.storage", "torch.cuda") else ""
    dtype = STORAGES.get(name.removesuffix("Storage"))
    if not isinstance(key, str | int) or numel < 0 or (dtype is None and name != "UntypedStorage"):
        shown = str(kind)[:60] if isinstance(kind, Name) else "something else"
        raise ModelError(f"a tensor's storage must be of a known type, got {shown!a}")
    return Storage(numel * (DTYPES[dtype] if dtype else 1), dtype)


def _fill(data: memoryview, place: int, keys: list[Any], waiting: dict[str, Storage]) -> None:
    """Find the storages behind a legacy file's pickles: for each key eight bytes of length, then the values."""
    for key in keys:
        storage = waiting.pop(str(key), None)
        if storage is None:
            raise ModelError("a legacy checkpoint lists a storage that no tensor uses, so what follows cannot be told")
        item = DTYPES[storage.dtype] if storage.dtype else 1
        if int.from_bytes(data[place : place + 8], "little") * item != storage.size:
            raise ModelError("a tensor's storage is not as long as it says: the file is cut or lies")
        storage.fill(data[place + 8 :])
        place += 8 + storage.size
    if waiting:
        raise ModelError("a legacy checkpoint must hold all storages that its tensors use")
    if place != len(data):
        raise ModelError("something follows the weights: other readers may see another file")


def _tensor(place: tuple[Any, ...], dtype: Any = None) -> Stored:
    storage, offset, shape, stride = place
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ModelError("a tensor must be made of a storage, an offset, sizes and strides")
    kind = dtype.name if isinstance(dtype, Name) else storage.dtype
    return Stored(str(kind), shape, stride, offset, storage)


def _rebuild_v2(arguments: tuple[Any, ...]) -> Any:
    return _tensor(_first(arguments, 4))


def _rebuild_v3(arguments: tuple[Any, ...]) -> Any:
    return _tensor(arguments[:4], _first(arguments, 7)[6])


def _rebuild_type(arguments: tuple[Any, ...]) -> Any:
    function, _, inner = _first(arguments, 3)
    if not isinstance(function, Name) or function.module != "torch._utils" or not isinstance(inner, tuple):
        raise ModelError("a tensor of a class of its own must be rebuilt by a function of torch")
    known = CALLS.get(function)
    return Record(function, inner) if known is None else known(inner)


def _given(arguments: tuple[Any, ...]) -> Any:
    return _first(arguments, 1)[0]


def _ordered(arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], list):
        return {}
    pairs = arguments[0]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ModelError("an ordered dictionary must be made of pairs")
    return {pair[0]: pair[1] for pair in pairs}


def _size(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], tuple) else ()


def _encode(arguments: tuple[Any, ...]) -> Any:
    """``bytes``, as protocols before 3 write them."""
    text, encoding = (*arguments, None)[:2] if arguments else (None, None)
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        return Record(Name("_codecs", "encode"), arguments)
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise ModelError("bytes in an old pickle must be written as Latin-1") from error


def _bytes(arguments: tuple[Any, ...]) -> Any:
    return Record(Name("builtins", "bytes"), arguments) if arguments else b""


def _first(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(arguments) < count:
        raise ModelError(f"a tensor must be made of at least {count} values, got {len(arguments)}")
    return arguments[:count]


LOAD, ORDERED, ENCODE = Name("torch.storage", "_load_from_bytes"), Name("collections", "OrderedDict"), Name("_codecs", "encode")
CALLS: dict[Name, Call] = {
    Name("__builtin__", "bytes"): _bytes,
    Name("builtins", "bytes"): _bytes,
    Name("torch", "Size"): _size,
    Name("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    Name("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    Name("torch._utils", "_rebuild_parameter"): _given,
    Name("torch._utils", "_rebuild_parameter_with_state"): _given,
    Name("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _given,
    Name("torch._tensor", "_rebuild_from_type_v2"): _rebuild_type,
    Name("torch.nn.parameter", "Parameter"): _given,
    Name("torch.nn.parameter", "Buffer"): _given,
}
