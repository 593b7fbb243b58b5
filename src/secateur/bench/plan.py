"""A plan: which models, backdoors, repairs and seeds make up a table. Read from TOML and checked before anything runs.

Nothing here imports torch, so that ``bench status`` and ``bench report`` answer at once.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, MethodError, SecateurError
from ..recipe import Recipe, read_recipe
from .choices import (
    AXES_KINDS,
    CHECKPOINT,
    NONE,
    Choice,
    check_known,
    one_of,
    read_choices,
    read_evasion,
    read_models,
    table_at,
    tables_at,
    typed,
    unique,
)

FORMAT = 1
METRICS = ("accuracy", "attack_success", "triggered_accuracy")
RETUNED = "retuned_attack_success"  # costs a fine-tuning for each row
DEVICES = ("cpu", "cuda")
EMBEDDED = "fashion-mini"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TOP = ("format", "name", "victim_seeds", "repair_seeds", "threads", "device", "timeout", "memory", "train", "data", "model")
KEYS = (*TOP, *AXES_KINDS, "surrogate", "measure", "reported")
GROUPS = ("model", "backdoor", "trigger", "clean", "repair", "compress")  # columns of the table that say what is compared


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
class Surrogate:
    """Another network, on which images are made that are then shown to those of the table.

    Attributes:
        model: Its architecture, or its checkpoint.
        seed: Of its data and training.
    """

    model: Choice
    seed: int

    @property
    def metric(self) -> str:
        """The metric that tells what its images leave of accuracy."""
        return f"transfer_{re.sub(r'[^a-z0-9]+', '_', self.model.label.lower()).strip('_')}"


@dataclass(frozen=True)
class Evasion:
    """How the networks of the table are attacked: each by its own images, its parent's, those of surrogates and of a twin.

    The other way round ``to_parent`` is the parent's accuracy under the images made on what became of it.

    Attributes:
        attack: The attack with its settings.
        images: Test images to attack; None means all.
        surrogates: Networks that are no part of the table.
        twin: Also attack by the images of a copy that was repaired or compressed in the same way with another seed.
    """

    attack: Choice
    images: int | None = None
    surrogates: tuple[Surrogate, ...] = ()
    twin: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured: accuracy under images made on the network, on each other one, on any of those, and `to_parent`."""
        others = ("transfer_parent", *(each.metric for each in self.surrogates), *(["transfer_twin"] if self.twin else []))
        return "white_box", *others, "worst_transfer", "to_parent"


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
    evasion: Evasion | None = None
    reported: tuple[Reported, ...] = ()

    @property
    def studies_attacks(self) -> bool:
        """Whether it is about victims alone: nothing is repaired or compressed."""
        return not self.repairs and all(choice.name == NONE for choice in self.compressors)

    @property
    def sources(self) -> dict[str, str]:
        """What nodes read from outside the store: ``train``, ``test``, and by its sha256 each file that a choice names."""
        others = [each.model for each in self.evasion.surrogates] if self.evasion else []
        choices = (*self.models, *others, *self.backdoors, *self.repairs, *self.compressors)
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
    check_known("key", raw, KEYS)
    form = raw.get("format")
    if form != FORMAT or form is True:
        raise MethodError(f"format must be {FORMAT}, got {form!r}" + ("; update secateur" if _is_newer(form) else ""))
    recipe = read_recipe(table_at(raw, "train"))
    evasion = _evasion(raw, path.parent)
    models = unique("model", itertools.chain.from_iterable(read_models(t, path.parent) for t in tables_at(raw, "model")))
    backdoors = read_choices(raw, "backdoor", path.parent)
    if any(model.name == CHECKPOINT for model in models) and any(backdoor.name != NONE for backdoor in backdoors):
        raise MethodError("a checkpoint of [[model]] cannot be given a backdoor: the only [[backdoor]] must be 'none'")
    seeds = _seeds(raw, "victim_seeds")
    for each in evasion.surrogates if evasion else ():
        own = any((model.name, model.settings) == (each.model.name, each.model.settings) for model in models)
        if own and (each.model.name == CHECKPOINT or each.seed in seeds):
            raise MethodError(
                f"the [[surrogate]] '{each.model.label}' is a [[model]] of the table itself; give it another seed"
            )
    return Plan(
        name=typed("name", raw.get("name", path.name.partition(".")[0]), str),
        data=_data(table_at(raw, "data"), path.parent),
        models=models,
        backdoors=backdoors,
        repairs=read_choices(raw, "repair", path.parent, optional=True),
        compressors=read_choices(raw, "compress", path.parent, optional=True),
        recipe=recipe,
        victim_seeds=seeds,
        repair_seeds=_seeds(raw, "repair_seeds"),
        threads=_at_least_1("threads", raw.get("threads", 1)),
        device=one_of("device", raw.get("device", "cpu"), DEVICES),
        timeout=_seconds(raw.get("timeout")),
        memory=_bytes(raw.get("memory")),
        metrics=(*_metrics(table_at(raw, "measure")), *(evasion.metrics if evasion else ())),
        evasion=evasion,
        reported=_reported(table_at(raw, "reported"), path.parent),
    )


def _evasion(raw: Mapping[str, Any], home: Path) -> Evasion | None:
    if "evasion" not in raw:
        if "surrogate" in raw:
            raise MethodError("[[surrogate]] is for [evasion], which this plan does not have")
        return None
    table = dict(table_at(raw, "evasion"))
    images, twin = table.pop("images", None), table.pop("twin", False)
    if type(twin) is not bool:
        raise MethodError(f"twin of [evasion] must be true or false, got {twin!r}")
    found = []
    for each in tables_at(raw, "surrogate") if "surrogate" in raw else []:
        [seed] = _seeds({"seed": [each.get("seed", 0)]}, "seed")
        models = list(read_models({key: value for key, value in each.items() if key != "seed"}, home))
        found.extend(Surrogate(model, seed) for model in models)
    for name, count in Counter(surrogate.metric for surrogate in found).items():
        if count > 1 or name in ("transfer_parent", "transfer_twin", "transfer_"):
            raise MethodError(f"[[surrogate]] needs labels of their own, other than parent and twin; two give '{name}'")
    attack = read_evasion(table, home)
    if attack.settings.get("targeted"):
        raise MethodError("[evasion] is untargeted: leave targeted out")
    given = _at_least_1("images of [evasion]", images) if images is not None else None
    return Evasion(attack, given, tuple(found), twin)


def _data(table: Mapping[str, Any], home: Path) -> DataPlan:
    check_known("key of [data]", table, ("name", "path", "train", "test", "clean", "train_limit", "test_limit"))
    given = [key for key in ("name", "path", "train") if key in table]
    if len(given) != 1 or ("train" in table) != ("test" in table):
        raise MethodError("[data] needs name, or path, or train and test; got " + (", ".join(given) or "none"))
    if "name" in table:
        train = test = one_of("name of [data]", table["name"], (EMBEDDED,))
    else:
        train, test = (_place(table.get(key, table.get("path")), home) for key in ("train", "test"))
    if given != ["train"]:
        train, test = f"{train}:train", f"{test}:test"
    clean = table.get("clean", 0.05)
    shares = tuple(float(typed("clean", share, (int, float))) for share in (clean if isinstance(clean, list) else [clean]))
    if not shares or not all(0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
        raise MethodError(f"clean must be different shares in (0, 1), got {clean!r}")
    limits = {
        key: _at_least_1(f"{key} of [data]", table[key]) if key in table else None for key in ("train_limit", "test_limit")
    }
    return DataPlan(train, test, shares, **limits)


def _place(value: Any, home: Path) -> str:
    """Return a path of the plan, relative ones taken from the plan's own folder."""
    text = typed("path of [data]", value, str)
    return text if text.partition(":")[0] == EMBEDDED else str((home / text).absolute())


def _metrics(table: Mapping[str, Any]) -> tuple[str, ...]:
    check_known("key of [measure]", table, ("metrics",))
    metrics = table.get("metrics", METRICS)
    if not isinstance(metrics, list | tuple) or not metrics:
        raise MethodError(f"metrics must be a list of {', '.join((*METRICS, RETUNED))}, got {metrics!r}")
    return tuple(dict.fromkeys(one_of("metric", metric, (*METRICS, RETUNED)) for metric in metrics))


def _reported(table: Mapping[str, Any], home: Path) -> tuple[Reported, ...]:
    check_known("key of [reported]", table, ("file",))
    if "file" not in table:
        return ()
    path = home / typed("file of [reported]", table["file"], str)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the reported numbers in {path}: {error}") from None
    found = []
    for row in tables_at(raw, "reported"):
        check_known("key of [[reported]]", row, ("source", "where", *METRICS))
        check_known("column in where of [[reported]]", table_at(row, "where"), GROUPS)
        values = {name: float(typed(name, row[name], (int, float))) for name in METRICS if name in row}
        if not values or not all(0 <= value <= 1 for value in values.values()):
            raise MethodError(f"a [[reported]] row of {path.name} needs {' or '.join(METRICS)} in [0, 1]")
        found.append(Reported(typed("source", row.get("source"), str), table_at(row, "where"), values))
    return tuple(found)


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
    if not 0 < typed("timeout", value, (int, float)) < math.inf:
        raise MethodError(f"timeout must be more than 0 seconds, got {value!r}")
    return float(value)


def _bytes(value: Any) -> int | None:
    if value is None:
        return None
    text = typed("memory", value, str)
    for unit, size in UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return round(float(number) * size)
    raise MethodError(f"memory must be like '4 GiB' or '512 MiB', got '{text}'")


def _is_newer(value: Any) -> bool:
    return type(value) is int and value > FORMAT


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain JSON values, without settings that have no effect: keys are made of it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.settings().items()}
