"""Where the weights are in what a file holds: containers opened, whole modules walked as data, wrappers' names dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..errors import ModelError
from .pickles import Name, Record
from .tensors import Stored

CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "netC", "student"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
LEFTOVERS = ("total_ops", "total_params", "n_averaged")  # of profilers and averaging wrappers
COUNTERS = "num_batches_tracked"
TRAINING = ("optimizer", "optim", "optimizer_state_dict", "scheduler", "lr_scheduler", "scaler", "amp")
MAX_DEPTH = 64
MAX_TENSORS = 100_000
MAX_CONTAINERS = 10_000
MAX_PREFIXES = 8
MAX_FACTS = 40
MAX_NAME = 1000


@dataclass(frozen=True)
class Layer:
    """One layer of a pickled module: its class and its settings, as plain text and numbers."""

    kind: str
    settings: Mapping[str, str | int | float | bool | tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Contents:
    """The weights in a file, and what stood beside them.

    Attributes:
        tensors: State dict, in the file's order; a `Record` stands for a tensor of a kind that is not read.
        container: Keys that lead to it.
        facts: Numbers and short texts beside it: the epoch, the model's name, ...
        layers: Layers by name, when the network was pickled whole.
    """

    tensors: Mapping[str, Stored | Record]
    container: tuple[str, ...] = ()
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)


def find_weights(value: Any) -> Contents:
    """Return the state dict in a file's content; ``tensors`` is empty when there is none."""
    facts: dict[str, Any] = {}
    path: list[str] = []
    while len(path) < MAX_DEPTH:
        if _is_module(value):
            layers: dict[str, Layer] = {}
            tensors = dict(islice(_walk(value, "", layers, set()), MAX_TENSORS + 1))
            if len(tensors) > MAX_TENSORS:
                raise ModelError(f"a pickled network must have at most {MAX_TENSORS} tensors")
            return Contents(_tidy(tensors), tuple(path), facts, layers)
        items = _items(value)
        facts |= {key: found for key, found in _facts(items).items() if key not in facts and len(facts) < MAX_FACTS}
        inner = _inner(items)
        if inner is None:
            return Contents(_tidy({k: v for k, v in items.items() if _is_weight(k, v)}), tuple(path), facts)
        path.append(inner)
        value = items[inner]
    raise ModelError(f"the weights must lie within {MAX_DEPTH} containers, one in another")


def candidates(names: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield renamings of a state dict, file's name -> name: as it is, then without each prefix that all names share."""
    renamed = {name: name for name in names}
    yield renamed
    for _ in range(MAX_PREFIXES):
        prefix = next((p for p in PREFIXES if all(new.startswith(p) for new in renamed.values())), None)
        if prefix is None or not renamed:
            return
        renamed = {name: new.removeprefix(prefix) for name, new in renamed.items()}
        yield renamed


def class_of(record: Record) -> Name | None:
    """Return the class of a described object, if it is named."""
    made_by, arguments = record.made_by, record.arguments
    if isinstance(made_by, Name) and made_by.name in ("_reconstructor", "__newobj__") and arguments:
        made_by = arguments[0]
    return made_by if isinstance(made_by, Name) else None


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= value.state.keys()


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, Record):
        return value.items
    return value if isinstance(value, dict) else {}


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and len(key) <= MAX_NAME and (isinstance(value, Stored) or _is_foreign(value))


def _is_foreign(value: Any) -> bool:
    """Whether a value is a tensor of a kind that is not read: quantised, sparse, without storage."""
    if not isinstance(value, Record):
        return False
    name = class_of(value)
    return name is not None and name.module in ("torch._utils", "torch._tensor") and name.name.startswith("_rebuild")


def _inner(items: Mapping[Any, Any]) -> str | None:
    """Return the key of the container to open next; None when the weights are here, or nowhere."""
    seen: dict[int, int] = {}
    inside = {key: _count(value, seen) for key, value in items.items() if isinstance(key, str) and not _is_weight(key, value)}
    holding = {key: count for key, count in inside.items() if count}
    here = sum(_is_weight(key, value) for key, value in items.items())
    named = next((key for key in CONTAINERS if key in holding), None)
    if named is not None and not here:
        return named
    largest = [key for key, count in holding.items() if count > here]  # one stray tensor beside a network is not the network
    if named in largest:
        return named
    return largest[0] if len(largest) == 1 and (not here or largest[0] not in TRAINING) else None


def _count(value: Any, seen: dict[int, int], depth: int = 8) -> int:
    """Return how many tensors the fullest mapping in a container has; modules count as the fullest. ``seen`` is its memory."""
    if _is_module(value):
        return 2**31
    items = _items(value)
    if not items or id(value) in seen or len(seen) > MAX_CONTAINERS:
        return seen.get(id(value), 0)
    seen[id(value)] = sum(_is_weight(key, inner) for key, inner in items.items())
    if not seen[id(value)] and depth:
        seen[id(value)] = max(_count(inner, seen, depth - 1) for inner in items.values())
    return seen[id(value)]


def _walk(module: Record, prefix: str, layers: dict[str, Layer], above: set[int]) -> Iterator[tuple[str, Stored | Record]]:
    """Yield names and tensors of a module that was pickled whole, as its own ``state_dict`` would."""
    if id(module) in above or len(above) >= MAX_DEPTH or len(layers) > 100_000:
        raise ModelError("a pickled network must not contain itself, nor be deeper than 64 layers")
    state = module.state
    hidden = state.get("_non_persistent_buffers_set")
    passed = {name for name in _members(hidden) if isinstance(name, str)}
    layers[prefix.removesuffix(".")] = Layer(str(class_of(module) or "?"), _settings(state))
    for part in ("_parameters", "_buffers"):
        for name, value in _items(state.get(part)).items():
            if _is_weight(name, value) and not (part == "_buffers" and name in passed):
                yield prefix + name, value
    for name, inner in _items(state["_modules"]).items():
        if isinstance(name, str) and _is_module(inner):
            yield from _walk(inner, f"{prefix}{name}.", layers, above | {id(module)})


def _members(value: Any) -> list[Any]:
    """Return what a described set holds, in the form of either protocol."""
    if not isinstance(value, Record):
        return []
    first = value.arguments[0] if value.arguments else None
    return [*value.entries, *(first if isinstance(first, list) else ())]


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in state.items():
        plain = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 100)
        plain = plain or (isinstance(value, tuple) and len(value) <= 4 and all(type(v) is int for v in value))
        if isinstance(key, str) and not key.startswith("_") and key not in ("training", "dump_patches") and plain:
            found[key] = value
    return dict(list(found.items())[:MAX_FACTS])


def _tidy(tensors: Mapping[str, Stored | Record]) -> dict[str, Stored | Record]:
    """Drop what profilers and wrappers leave behind, and counters that are none."""
    kept = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in LEFTOVERS}
    for name, value in list(kept.items()):
        counts = isinstance(value, Stored) and value.shape == () and value.dtype == "int64"
        if name.endswith(COUNTERS) and not counts:
            del kept[name]
    return kept


def _facts(items: Mapping[Any, Any]) -> dict[str, Any]:
    plain = {
        key: value
        for key, value in items.items()
        if isinstance(key, str)
        and len(key) <= 60
        and (isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200))
    }
    found: dict[str, Any] = {key: value for key, value in plain.items() if not isinstance(value, int) or abs(value) < 2**63}
    size = items.get("img_size")  # of BackdoorBench: (height, width, channels)
    if isinstance(size, tuple | list) and len(size) == 3 and all(type(n) is int and 0 < n <= 4096 for n in size):
        found["input_size"] = (size[0], size[1])
    return found
