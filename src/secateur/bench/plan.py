"""A plan: which models, backdoors, repairs and seeds make up a table. Read from TOML and checked before anything runs.

Nothing here imports torch, so that ``bench status`` and ``bench report`` answer at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..architectures import is_reference, resolve
from ..errors import DataError, MethodError, SecateurError, unknown
from ..methods import Kind, get, parameters, settings
from ..methods import table as table_of
from ..recipe import Recipe, read_recipe

FORMAT = 1
NONE = "none"
ORACLE = "oracle"
METRICS = ("accuracy", "attack_success", "triggered_accuracy")
RETUNED = "retuned_attack_success"  # costs a fine-tuning for each row
DEVICES = ("cpu", "cuda")
EMBEDDED = "fashion-mini"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AXES_KINDS: Mapping[str, Kind] = {"backdoor": "backdoor", "repair": "repair", "compress": "compressor"}
TOP = ("format", "name", "victim_seeds", "repair_seeds", "threads", "device", "timeout", "memory", "train", "data", "model")
KEYS = (*TOP, *AXES_KINDS, "measure", "reported")
GROUPS = ("model", "backdoor", "trigger", "clean", "repair", "compress")  # columns of the table that say what is compared
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
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    version: int = 0
    uses: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    oracle: float | None = None


@dataclass(frozen=True)
class DataPlan:
    """Which images.

    Attributes:
        train: What `load_data` reads for victims' training images; the defender's clean ones are held out of them.
        test: Likewise, for measuring.
        clean: Shares of the training images that the defender gets; the largest is held out, smaller ones are drawn from it.
        train_limit: At most so many training images; None means all.
        test_limit: Likewise.
    """

    train: str
    test: str
    clean: tuple[float, ...]
    train_limit: int | None = None
    test_limit: int | None = None


@dataclass(frozen=True)
class Reported:
    """A number that somebody published: it stands beside what was measured and is never mixed with it.

    Attributes:
        source: Where it was published.
        where: Column -> value, for the rows of the table that it belongs to.
        values: Metric -> value in [0, 1].
    """

    source: str
    where: Mapping[str, Any]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """A whole plan; every field is checked."""

    name: str
    data: DataPlan
    models: tuple[Choice, ...]
    backdoors: tuple[Choice, ...]
    repairs: tuple[Choice, ...]
    compressors: tuple[Choice, ...]
    recipe: Recipe
    victim_seeds: tuple[int, ...] = (0,)
    repair_seeds: tuple[int, ...] = (0,)
    threads: int = 1
    device: str = "cpu"
    timeout: float | None = None
    memory: int | None = None
    metrics: tuple[str, ...] = METRICS
    reported: tuple[Reported, ...] = ()

    @property
    def studies_attacks(self) -> bool:
        """Whether it is about victims alone: nothing is repaired or compressed."""
        return not self.repairs and all(choice.name == NONE for choice in self.compressors)

    @property
    def sources(self) -> dict[str, str]:
        """What nodes read from outside the store: ``train``, ``test``, and by its sha256 each file that a choice names."""
        choices = (*self.models, *self.backdoors, *self.repairs, *self.compressors)
        own = {digest: where for choice in choices for digest, where in choice.files.items()}
        return {"train": self.data.train, "test": self.data.test, **own}

    def with_data(self, path: str | None) -> Plan:
        """Return the plan with the images at ``path`` instead (``PATH:train`` and ``PATH:test``)."""
        if path is None:
            return self
        where = path if path == EMBEDDED else str(Path(path).absolute())
        return replace(self, data=replace(self.data, train=f"{where}:train", test=f"{where}:test"))


def read_plan(path: str | Path) -> Plan:
    """Read a plan and check every name, setting and range in it.

    Raises:
        SecateurError: The file cannot be read, or breaks a rule; the message names file, rule, value and remedy.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the plan {path}: {error.strerror}; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML: {error}") from None
    try:
        return _plan(raw, path)
    except SecateurError as error:
        raise type(error)(f"{path.name}: {error}") from None


def _plan(raw: Mapping[str, Any], path: Path) -> Plan:
    _known("key", raw, KEYS)
    form = raw.get("format")
    if form != FORMAT or form is True:
        raise MethodError(f"format must be {FORMAT}, got {form!r}" + ("; update secateur" if _is_newer(form) else ""))
    recipe = read_recipe(_table(raw, "train"))
    return Plan(
        name=_typed("name", raw.get("name", path.name.partition(".")[0]), str),
        data=_data(_table(raw, "data"), path.parent),
        models=_unique("model", itertools.chain.from_iterable(_models(t, path.parent) for t in _tables(raw, "model"))),
        backdoors=_choices(raw, "backdoor", path.parent),
        repairs=_choices(raw, "repair", path.parent, optional=True),
        compressors=_choices(raw, "compress", path.parent, optional=True),
        recipe=recipe,
        victim_seeds=_seeds(raw, "victim_seeds"),
        repair_seeds=_seeds(raw, "repair_seeds"),
        threads=_at_least_1("threads", raw.get("threads", 1)),
        device=_one_of("device", raw.get("device", "cpu"), DEVICES),
        timeout=_seconds(raw.get("timeout")),
        memory=_bytes(raw.get("memory")),
        metrics=_metrics(_table(raw, "measure")),
        reported=_reported(_table(raw, "reported"), path.parent),
    )


def _data(table: Mapping[str, Any], home: Path) -> DataPlan:
    _known("key of [data]", table, ("name", "path", "train", "test", "clean", "train_limit", "test_limit"))
    given = [key for key in ("name", "path", "train") if key in table]
    if len(given) != 1 or ("train" in table) != ("test" in table):
        raise MethodError("[data] needs name, or path, or train and test; got " + (", ".join(given) or "none"))
    if "name" in table:
        train = test = _one_of("name of [data]", table["name"], (EMBEDDED,))
    else:
        train, test = (_place(table.get(key, table.get("path")), home) for key in ("train", "test"))
    if given != ["train"]:
        train, test = f"{train}:train", f"{test}:test"
    clean = table.get("clean", 0.05)
    shares = tuple(float(_typed("clean", share, (int, float))) for share in (clean if isinstance(clean, list) else [clean]))
    if not shares or not all(0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
        raise MethodError(f"clean must be different shares in (0, 1), got {clean!r}")
    limits = {
        key: _at_least_1(f"{key} of [data]", table[key]) if key in table else None for key in ("train_limit", "test_limit")
    }
    return DataPlan(train, test, shares, **limits)


def _place(value: Any, home: Path) -> str:
    """Return a path of the plan, relative ones taken from the plan's own folder."""
    text = _typed("path of [data]", value, str)
    return text if text.partition(":")[0] == EMBEDDED else str((home / text).absolute())


def _models(table: Mapping[str, Any], home: Path) -> Iterable[Choice]:
    name = _name("model", table)
    if is_reference(name):
        _known(f"key of [[model]] {name}", table, ("name", "label"))
        file, _, function = name.rpartition(":")
        try:
            digest = hashlib.sha256((home / file).read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {file} of [[model]]: {error.strerror}; paths are relative to the plan") from None
        code = f"{(home / file).absolute()}:{function}"
        yield Choice(name, _typed("label", table.get("label", name), str), {"sha256": digest}, files={digest: code})
        return
    resolve(name, {})
    for given, varied in _points(table, sequences=()):
        for key in NOT_TRAINED:
            if key in given:
                raise MethodError(f"{key} of a [[model]] follows from the data; leave it out")
        full = {key: value for key, value in resolve(name, given).items() if key not in NOT_TRAINED}
        yield Choice(name, _label(table, name, given, varied), full)


def _choices(raw: Mapping[str, Any], axis: str, home: Path, *, optional: bool = False) -> tuple[Choice, ...]:
    if optional and raw.get(axis, []) == []:
        return (Choice(NONE, NONE, {}),) if axis == "compress" else ()
    return _unique(axis, itertools.chain.from_iterable(_methods(axis, table, home) for table in _tables(raw, axis)))


def _methods(axis: str, table: Mapping[str, Any], home: Path) -> Iterable[Choice]:
    name = _name(axis, table)
    if name == NONE:
        if axis == "repair":
            raise MethodError("[[repair]] 'none' is always part of the table; leave it out")
        _known(f"key of [[{axis}]] none", table, ("name", "label"))
        yield Choice(NONE, _typed("label", table.get("label", NONE), str), {})
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
    drop = float(_typed(ORACLE, table[ORACLE], (int, float)))
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
    return f"{label or name} ({', '.join(words)})" if words else _typed("label", label or name, str)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(_short, value)) if isinstance(value, list | tuple) else str(value)


def _unique(axis: str, choices: Iterable[Choice]) -> tuple[Choice, ...]:
    found = tuple(choices)
    labels = [choice.label for choice in found]
    if any(choice.label == NONE != choice.name for choice in found):
        raise MethodError(f"a [[{axis}]] cannot be called 'none': that stands for the row without one; give it another label")
    for label, count in Counter(labels).items():
        if count > 1:
            raise MethodError(f"two [[{axis}]] are called '{label}'; give them labels of their own")
    return found


def _metrics(table: Mapping[str, Any]) -> tuple[str, ...]:
    _known("key of [measure]", table, ("metrics",))
    metrics = table.get("metrics", METRICS)
    if not isinstance(metrics, list | tuple) or not metrics:
        raise MethodError(f"metrics must be a list of {', '.join((*METRICS, RETUNED))}, got {metrics!r}")
    return tuple(dict.fromkeys(_one_of("metric", metric, (*METRICS, RETUNED)) for metric in metrics))


def _reported(table: Mapping[str, Any], home: Path) -> tuple[Reported, ...]:
    _known("key of [reported]", table, ("file",))
    if "file" not in table:
        return ()
    path = home / _typed("file of [reported]", table["file"], str)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the reported numbers in {path}: {error}") from None
    found = []
    for row in _tables(raw, "reported"):
        _known("key of [[reported]]", row, ("source", "where", *METRICS))
        _known("column in where of [[reported]]", _table(row, "where"), GROUPS)
        values = {name: float(_typed(name, row[name], (int, float))) for name in METRICS if name in row}
        if not values or not all(0 <= value <= 1 for value in values.values()):
            raise MethodError(f"a [[reported]] row of {path.name} needs {' or '.join(METRICS)} in [0, 1]")
        found.append(Reported(_typed("source", row.get("source"), str), _table(row, "where"), values))
    return tuple(found)


def _known(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    for name in given:
        if name not in allowed:
            raise MethodError(unknown(what, name, allowed))


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise MethodError(f"{key} must be a table: [{key}]")
    return value


def _tables(raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = raw.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
        raise MethodError(f"a plan needs at least one [[{key}]]")
    return value


def _name(axis: str, table: Mapping[str, Any]) -> str:
    if "name" not in table:
        raise MethodError(f"every [[{axis}]] needs a name")
    return _typed(f"name of [[{axis}]]", table["name"], str)


def _typed(what: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        words = " or ".join({"str": "text", "int": "a whole number"}.get(k.__name__, "a number") for k in _as_tuple(kind))
        raise MethodError(f"{what} must be {words}, got {value!r}")
    return value


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind[-1:] if isinstance(kind, tuple) else (kind,)


def _one_of(what: str, value: Any, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise MethodError(unknown(what, str(value), allowed))
    return value


def _number(value: Any, annotation: str) -> Any:
    """Return a whole number as a float where the method wants one, so that 1 and 1.0 are one node."""
    return float(value) if annotation.partition(" | ")[0] == "float" and type(value) is int else value


def _seeds(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key, [0])
    if not isinstance(value, list) or not value:
        raise MethodError(f"{key} must be a list of at least one seed, got {value!r}")
    for seed in value:
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise MethodError(f"{key} must be whole numbers in [0, 2147483647], got {seed!r}")
    for seed, count in Counter(value).items():
        if count > 1:
            raise MethodError(f"{key} must be different seeds, got {seed} {count} times")
    return tuple(value)


def _at_least_1(what: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise MethodError(f"{what} must be a whole number of at least 1, got {value!r}")
    return value


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if not 0 < _typed("timeout", value, (int, float)) < math.inf:
        raise MethodError(f"timeout must be more than 0 seconds, got {value!r}")
    return float(value)


def _bytes(value: Any) -> int | None:
    if value is None:
        return None
    text = _typed("memory", value, str)
    for unit, size in UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return round(float(number) * size)
    raise MethodError(f"memory must be like '4 GiB' or '512 MiB', got '{text}'")


def _is_newer(value: Any) -> bool:
    return type(value) is int and value > FORMAT


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain JSON values."""
    values = {each.name: getattr(recipe, each.name) for each in fields(recipe)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
