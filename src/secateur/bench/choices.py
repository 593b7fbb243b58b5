"""What a plan compares: each model, backdoor, repair or compressor with all its settings, read from a plan's tables."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..architectures import is_reference, resolve
from ..errors import DataError, MethodError, unknown
from ..methods import Kind, get, parameters, settings
from ..methods import table as table_of

NONE = "none"
ORACLE = "oracle"
AFTER = "after"
CHECKPOINT = "checkpoint"
AXES_KINDS: Mapping[str, Kind] = {"backdoor": "backdoor", "repair": "repair", "compress": "compressor", "evasion": "evasion"}
NOT_TRAINED = ("classes", "in_channels")  # what the data decide about a network


@dataclass(frozen=True)
class Choice:
    """One method or architecture with all its settings.

    Attributes:
        name: Its name in its table, or ``none``.
        label: What the tables call it.
        settings: Every setting with its value.
        version: Version of the method; 0 for architectures and ``none``.
        uses: Scores that the settings name, and their versions where those are above 1.
        files: Of files that the settings name, sha256 -> where each lies; the settings have the sha256 in its place. For a
            network of the user's own that is ``file.py:make``.
        oracle: For a repair, the accuracy that may be lost where a cut is *also* chosen with test images and trigger.
        first: For a compressor, another one that works on the network before it.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    version: int = 0
    uses: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    oracle: float | None = None
    first: Choice | None = None

    @property
    def steps(self) -> tuple[Choice, ...]:
        """What is done, one after the other."""
        return (*(self.first.steps if self.first else ()), self)


def read_models(table: Mapping[str, Any], home: Path) -> Iterable[Choice]:
    """Yield the architectures, or the checkpoint, that a table names."""
    if CHECKPOINT in table:
        yield _checkpoint(table, home)
        return
    name = name_of("model", table)
    if is_reference(name):
        check_known(f"key of [[model]] {name}", table, ("name", "label"))
        file, _, function = name.rpartition(":")
        try:
            digest = hashlib.sha256((home / file).read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {file} of [[model]]: {error.strerror}; paths are relative to the plan") from None
        code = f"{(home / file).absolute()}:{function}"
        yield Choice(name, typed("label", table.get("label", name), str), {"sha256": digest}, files={digest: code})
        return
    resolve(name, {})
    for given, varied in _points(table, sequences=()):
        for key in NOT_TRAINED:
            if key in given:
                raise MethodError(f"{key} of a [[model]] follows from the data; leave it out")
        full = {key: value for key, value in resolve(name, given).items() if key not in NOT_TRAINED}
        yield Choice(name, _label(table, name, given, varied), full)


def _checkpoint(table: Mapping[str, Any], home: Path) -> Choice:
    """Return somebody's finished network: a file, and what the file does not say."""
    check_known(
        "key of [[model]] with a checkpoint", table, (CHECKPOINT, "sha256", "name", "label", "mean", "std", "input_size")
    )
    file = typed(CHECKPOINT, table[CHECKPOINT], str)
    said: dict[str, Any] = {key: table[key] for key in ("mean", "std") if key in table}
    for key, value in said.items():
        if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
            raise MethodError(f"{key} of [[model]] must be a list of numbers, one per channel, got {value!r}")
        said[key] = [float(number) for number in value]
    if "input_size" in table:
        said["input_size"] = typed("input_size of [[model]]", table["input_size"], int)
    if "name" in table:
        said["arch"] = typed("name of [[model]]", table["name"], str)
        if is_reference(said["arch"]):
            raise MethodError(
                f"a checkpoint of a plan is a network of the zoo, got name '{said['arch']}'; convert it to a bundle first"
            )
        resolve(said["arch"], {})
    path = home / file
    wanted = typed("sha256 of [[model]]", table["sha256"], str) if "sha256" in table else None
    digest = _digest(path) if wanted is None or path.exists() else wanted  # a plan that says it can be read without the file
    if wanted not in (None, digest):
        raise DataError(f"{path} must have sha256 {wanted}, got {digest}; it is another file")
    label = typed("label", table.get("label", path.name), str)
    return Choice(CHECKPOINT, label, {"sha256": digest, **said}, files={digest: str(path.absolute())})


def read_evasion(table: Mapping[str, Any], home: Path) -> Choice:
    """Return the attack of [evasion]; its eps may be a fraction, ``"8/255"``."""
    given = {key: _fraction(key, value) if isinstance(value, str) and "/" in value else value for key, value in table.items()}
    if table.get("name") == NONE:
        raise MethodError("[evasion] needs an attack; leave the table out for none")
    choices = list(_methods("evasion", given, home))
    if len(choices) != 1:
        raise MethodError("[evasion] is one attack: its settings cannot be lists")
    return choices[0]


def _fraction(key: str, text: str) -> float:
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom)
    except (ValueError, ZeroDivisionError):
        raise MethodError(f"{key} of [evasion] must be a number or a fraction like '8/255', got '{text}'") from None


def read_choices(raw: Mapping[str, Any], axis: str, home: Path, *, optional: bool = False) -> tuple[Choice, ...]:
    """Return all choices of an axis."""
    if optional and raw.get(axis, []) == []:
        return (Choice(NONE, NONE, {}),) if axis == "compress" else ()
    found: list[Choice] = []
    named: dict[str, list[Choice]] = {}  # by the label of their table
    for table in tables_at(raw, axis):
        firsts = _firsts(axis, table, named)
        own = {key: value for key, value in table.items() if key != AFTER or axis != "compress"}
        made = [_second(first, choice) for first in firsts for choice in _methods(axis, own, home)]
        named.setdefault(str(table.get("label", table["name"])), []).extend(made)
        found += made
    return unique(axis, found)


def _firsts(axis: str, table: Mapping[str, Any], named: Mapping[str, Sequence[Choice]]) -> Sequence[Choice | None]:
    """Return the compressors that a table's own come after: those of the tables above it that it names."""
    if axis != "compress" or AFTER not in table:
        return [None]
    labels = table[AFTER] if isinstance(table[AFTER], list) else [table[AFTER]]
    possible = [label for label in named if label != NONE]
    check_known(f"label in {AFTER} of [[compress]]", (typed(AFTER, label, str) for label in labels), possible)
    if not labels or table.get("name") == NONE:
        raise MethodError(f"{AFTER} of [[compress]] needs a method, and at least one label of a table above it")
    return [first for label in labels for first in named[label]]


def _second(first: Choice | None, choice: Choice) -> Choice:
    return choice if first is None else replace(choice, label=f"{first.label}, {choice.label}", first=first)


def _methods(axis: str, table: Mapping[str, Any], home: Path) -> Iterable[Choice]:
    name = name_of(axis, table)
    if name == NONE:
        if axis == "repair":
            raise MethodError("[[repair]] 'none' is always part of the table; leave it out")
        check_known(f"key of [[{axis}]] none", table, ("name", "label"))
        yield Choice(NONE, typed("label", table.get("label", NONE), str), {})
        return
    oracle = _oracle(axis, table)
    table = {key: value for key, value in table.items() if key != ORACLE}
    method = get(AXES_KINDS[axis], name)
    annotations = {parameter.name: parameter.annotation for parameter in parameters(method)}
    sequences = {key for key, text in annotations.items() if _is_sequence(text)}
    for given, varied in _points(table, sequences):
        full = {key: _number(value, annotations.get(key, "")) for key, value in settings(method, given).items()}
        if oracle is not None and not isinstance(full.get("drop"), float):
            raise MethodError(f"{ORACLE} needs a repair that chooses how much to cut, by its setting drop; '{name}' has none")
        paths = {key: home / full[key] for key in method.files if isinstance(full[key], str) and full[key]}
        digests = {key: _digest(path) for key, path in paths.items() if path.exists()}
        files = {digest: str(paths[key].absolute()) for key, digest in digests.items()}
        yield Choice(name, _label(table, name, given, varied), full | digests, method.version, _uses(full), files, oracle)


def _digest(path: Path) -> str:
    from .source import content  # which needs this module

    try:
        return content(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; paths are relative to the plan") from None


def _oracle(axis: str, table: Mapping[str, Any]) -> float | None:
    if axis != "repair" or ORACLE not in table:
        return None
    drop = float(typed(ORACLE, table[ORACLE], (int, float)))
    if not 0 <= drop <= 1:
        raise MethodError(f"{ORACLE} must lie in [0, 1]: the accuracy that a cut may cost, got {drop:g}")
    return drop


def _uses(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the versions of scores that settings name: a repair's result depends on them too."""
    versions = {row.name: row.version for row in table_of("score") if row.version > 1}
    return {value: versions[value] for value in settings.values() if isinstance(value, str) and value in versions}


def _points(table: Mapping[str, Any], sequences: Iterable[str]) -> Iterable[tuple[dict[str, Any], list[str]]]:
    """Yield every point of a table whose lists are axes, with the names of the axes.

    A setting that is always a sequence needs a list of lists to be an axis.
    """
    given = {key.replace("-", "_"): value for key, value in table.items() if key not in ("name", "label")}
    for key, value in given.items():
        _check_plain(key, value)
    axes = {
        key: value
        for key, value in given.items()
        if isinstance(value, list) and (key not in sequences or any(isinstance(item, list) for item in value))
    }
    for key, values in axes.items():
        if not values:
            raise MethodError(f"{key} must hold at least one value, got []")
    varied = [key for key, values in axes.items() if len(values) > 1]
    for point in itertools.product(*axes.values()):
        yield {**given, **dict(zip(axes, point, strict=True))}, varied


def _is_sequence(annotation: str) -> bool:
    """Whether a setting is always a sequence, so that a flat list is one value of it."""
    kinds = annotation.split(" | ")
    return any(kind.startswith(("Sequence", "tuple", "list")) for kind in kinds) and not {"str", "int", "float"} & set(kinds)


def _check_plain(key: str, value: Any) -> None:
    """Raise `MethodError` for what a key cannot hold: dates, tables, and numbers that are not finite."""
    if isinstance(value, list):
        for item in value:
            _check_plain(key, item)
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise MethodError(f"{key} must be text, true, false or a finite number, got {value}")


def _label(table: Mapping[str, Any], name: str, given: Mapping[str, Any], varied: Iterable[str]) -> str:
    """Return the given label followed by what varies, or the name followed by what was set."""
    label = table.get("label")
    shown = given if label is None else list(varied)
    words = [f"{key}={_short(given[key])}" for key in shown]
    return f"{label or name} ({', '.join(words)})" if words else typed("label", label or name, str)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(_short, value)) if isinstance(value, list | tuple) else str(value)


def unique(axis: str, choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Return choices; raise `MethodError` if two have one label, or one has that of the row without any."""
    found = tuple(choices)
    labels = [choice.label for choice in found]
    if any(choice.label == NONE != choice.name for choice in found):
        raise MethodError(f"a [[{axis}]] cannot be called 'none': that stands for the row without one; give it another label")
    for label, count in Counter(labels).items():
        if count > 1:
            raise MethodError(f"two [[{axis}]] are called '{label}'; give them labels of their own")
    return found


def check_known(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise `MethodError` for a name that is not allowed."""
    for name in given:
        if name not in allowed:
            raise MethodError(unknown(what, name, allowed))


def table_at(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the table ``[key]``, empty if there is none."""
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise MethodError(f"{key} must be a table: [{key}]")
    return value


def tables_at(raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the tables ``[[key]]``, at least one."""
    value = raw.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
        raise MethodError(f"a plan needs at least one [[{key}]]")
    return value


def name_of(axis: str, table: Mapping[str, Any]) -> str:
    """Return the name that every table of an axis needs."""
    if "name" not in table:
        raise MethodError(f"every [[{axis}]] needs a name")
    return typed(f"name of [[{axis}]]", table["name"], str)


def typed(what: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """Return a value if it is of that kind; true and false never are."""
    if not isinstance(value, kind) or isinstance(value, bool):
        words = " or ".join({"str": "text", "int": "a whole number"}.get(k.__name__, "a number") for k in _as_tuple(kind))
        raise MethodError(f"{what} must be {words}, got {value!r}")
    return value


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind[-1:] if isinstance(kind, tuple) else (kind,)


def one_of(what: str, value: Any, allowed: Iterable[str]) -> str:
    """Return a value if it is allowed."""
    if value not in allowed:
        raise MethodError(unknown(what, str(value), allowed))
    return value


def _number(value: Any, annotation: str) -> Any:
    """Return a whole number as a float where the method wants one, so that 1 and 1.0 are one node."""
    return float(value) if annotation.partition(" | ")[0] == "float" and type(value) is int else value
