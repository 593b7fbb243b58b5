"""A plan as a graph of nodes, each named by what it computes: the key covers everything a result may depend on.

    data -> victim -> repair -> compress -> measure

    victim, repair, compress -> evade -> measure    (images made on a network, where a plan attacks; shown to others too)
    victim, repair -> oracle    (a row of its own, where a plan asks for it: see ``oracle.py``)

A victim is trained once and used by every repair; the network without repair is measured as well. A benign network
(backdoor ``none``) is measured under the trigger of every attack of the plan: the rate that is there without a backdoor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from .choices import CHECKPOINT, NONE, Choice
from .plan import RETUNED, DataPlan, Plan, recipe_settings

STAGES: Mapping[str, tuple[str, int]] = {  # name -> function and version; the version goes up when results change
    "data": ("secateur.bench.stages:data", 1),
    "victim": ("secateur.bench.stages:victim", 1),
    "repair": ("secateur.bench.stages:repair", 1),
    "compress": ("secateur.bench.stages:compress", 1),
    "evade": ("secateur.bench.stages:evade", 1),
    "measure": ("secateur.bench.stages:measure", 1),
    "oracle": ("secateur.bench.stages:oracle", 1),
}


@dataclass(frozen=True, eq=False)
class Node:
    """One piece of work.

    Attributes:
        stage: A name of `STAGES`.
        method: The method or architecture it runs; empty where there is no choice.
        args: Every setting with its value, plain JSON.
        seed: Of all its randomness.
        parents: Role -> key of the node whose results it reads.
        threads: CPU threads; part of the key because the order of sums depends on it.
        device: ``cpu`` or ``cuda``.
        dtype: Precision of its arithmetic.
        stage_version: Version of the stage.
        method_version: Version of the method.
    """

    stage: str
    method: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parents: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    stage_version: int = 1
    method_version: int = 0

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything a result may depend on."""
        return {
            "stage": self.stage,
            "stage_version": self.stage_version,
            "method": self.method,
            "method_version": self.method_version,
            "args": dict(self.args),
            "seed": self.seed,
            "threads": self.threads,
            "device": self.device,
            "dtype": self.dtype,
            "parents": dict(self.parents),
        }

    @cached_property
    def key(self) -> str:
        """The sha256 of the configuration's canonical JSON."""
        return hashlib.sha256(canonical_json(self.config).encode()).hexdigest()

    @cached_property
    def kin(self) -> str:
        """What nodes share that take about as long: all but the seed, the parents and, for victims, the backdoor."""
        config = {name: value for name, value in self.config.items() if name not in ("seed", "parents")}
        if self.stage == "victim":
            config["method"] = ""
            config["args"] = {name: value for name, value in self.args.items() if name != "settings"}
        return canonical_json(config)

    @property
    def label(self) -> str:
        """What a person calls it."""
        words = [self.stage, self.method, f"seed {self.seed}" if self.stage != "measure" else ""]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Cell:
    """One cell of the table: where it stands, and the nodes it needs, the measuring one last."""

    model: str
    backdoor: str
    trigger: str
    clean: float | None
    repair: str
    compress: str
    victim_seed: int
    repair_seed: int | None
    keys: tuple[str, ...]


COLUMNS = tuple(each.name for each in fields(Cell) if each.name != "keys")


@dataclass(frozen=True, eq=False)
class Graph:
    """All nodes of a plan by key, parents before children, and the cells of its table in the plan's order."""

    nodes: Mapping[str, Node]
    cells: tuple[Cell, ...]


def canonical_json(value: Any) -> str:
    """Return JSON in which equal values are equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_config(config: Mapping[str, Any]) -> Node:
    """Return the node whose `Node.config` this is."""
    return Node(**config)


def expand(plan: Plan, digest: Callable[[str], str]) -> Graph:
    """Return the graph of a plan.

    Args:
        plan: The plan.
        digest: Returns a text that stands for the content of the images at a path.
    """
    return _Expansion(plan, digest).graph()


class _Defended(NamedTuple):
    """What was done to a victim, and the nodes; the twin is the same with another seed."""

    clean: float | None
    repair: str
    compress: str
    seed: int | None
    keys: tuple[str, ...]
    twin: str | None


class _Expansion:
    def __init__(self, plan: Plan, digest: Callable[[str], str]) -> None:
        self.plan = plan
        self.source = {"train": digest(plan.data.train), "test": digest(plan.data.test)}
        self.nodes: dict[str, Node] = {}

    def graph(self) -> Graph:
        surrogates = self._surrogates()
        cells = tuple(cell for seed in self.plan.victim_seeds for cell in self._of_seed(seed, surrogates))
        return Graph(self.nodes, cells)

    def _of_seed(self, seed: int, surrogates: Mapping[str, str]) -> Iterator[Cell]:
        data = self._add("data", args={"source": self.source, **_limits(self.plan.data)}, seed=seed)
        for model in self.plan.models:
            victims = {choice.label: (choice, self._victim(model, choice, data, seed)) for choice in self.plan.backdoors}
            triggers = {label: victim for label, (choice, victim) in victims.items() if choice.name != NONE}
            for label, (choice, victim) in victims.items():
                shown = {label: victim} if choice.name != NONE else (triggers or {NONE: None})
                for clean, repair, compress, repair_seed, keys, twin in self._defences(victim, data):
                    attacked = self._attacked(keys, twin, data, surrogates)
                    for trigger, owner in shown.items():
                        end = self._measure(keys[-1], data, owner, attacked)
                        yield Cell(model.label, label, trigger, clean, repair, compress, seed, repair_seed, (*keys, end))
                for repair, clean, repair_seed, keys in self._chosen_by_oracle(victim, data) if choice.name != NONE else ():
                    yield Cell(model.label, label, label, clean, repair, NONE, seed, repair_seed, keys)

    def _defences(self, victim: str, data: str) -> Iterator[_Defended]:
        """Yield the victim itself and everything done to it."""
        for done in self._repairs(victim, data):
            for compressor in self.plan.compressors:
                if compressor.name == NONE:
                    yield done._replace(compress=compressor.label)
                    continue
                shares = (done.clean,) if done.clean is not None else self.plan.data.clean
                seeds = (done.seed,) if done.seed is not None else self.plan.repair_seeds
                for share, seed in itertools.product(shares, seeds):
                    keys, twin = done.keys, done.twin
                    for step in compressor.steps:
                        end, twin = self._twins("compress", step, (keys[-1], twin), data, share, seed)
                        keys = (*keys, end)
                    yield _Defended(share, done.repair, compressor.label, seed, keys, twin)

    def _repairs(self, victim: str, data: str) -> Iterator[_Defended]:
        yield _Defended(None, NONE, NONE, None, (victim,), None)
        for choice in self.plan.repairs:
            for share, seed in itertools.product(self.plan.data.clean, self.plan.repair_seeds):
                end, twin = self._twins("repair", choice, (victim, None), data, share, seed)
                yield _Defended(share, choice.label, NONE, seed, (victim, end), twin)

    def _chosen_by_oracle(self, victim: str, data: str) -> Iterator[tuple[str, float, int, tuple[str, ...]]]:
        """Yield ``(repair, clean share, seed, keys)`` where a cut is also chosen with the victim's trigger on test images."""
        for choice in self.plan.repairs:
            if choice.oracle is None:
                continue
            further = replace(choice, settings={**choice.settings, "drop": max(choice.settings["drop"], choice.oracle)})
            for share, seed in itertools.product(self.plan.data.clean, self.plan.repair_seeds):
                repair = self._defend("repair", further, victim, data, share, seed, path=True)
                parents = {"victim": victim, "repair": repair, "data": data, "trigger": victim}
                end = self._add("oracle", args={"drop": choice.oracle}, parents=parents)
                yield f"{choice.label}, chosen by ASR on test images", share, seed, (victim, repair, end)

    def _victim(self, model: Choice, backdoor: Choice, data: str, seed: int) -> str:
        recipe = recipe_settings(self.plan.recipe) if model.name != CHECKPOINT else {}
        args = {"model": model.name, "kwargs": model.settings, "recipe": recipe, "settings": backdoor.settings}
        dtype = self.plan.recipe.precision if model.name != CHECKPOINT else "float32"
        return self._add("victim", backdoor, args, seed, {"data": data}, dtype=dtype)

    def _defend(self, stage: str, choice: Choice, model: str, data: str, share: float, seed: int, *, path: bool = False) -> str:
        args = {"clean": share, "settings": choice.settings, **({"path": True} if path else {})}
        return self._add(stage, choice, args, seed, {"model": model, "data": data})

    def _twins(
        self, stage: str, choice: Choice, before: tuple[str, str | None], data: str, share: float, seed: int
    ) -> tuple[str, str | None]:
        """Return what is made of a network and, where a plan attacks by twins, what another seed makes of it or its twin."""
        model, twin = before
        end = self._defend(stage, choice, model, data, share, seed)
        if self.plan.evasion is None or not self.plan.evasion.twin:
            return end, None
        seeds = self.plan.repair_seeds
        other = seeds[(seeds.index(seed) + 1) % len(seeds)] if len(seeds) > 1 else seed + 1
        return end, self._defend(stage, choice, twin or model, data, share, other)

    def _surrogates(self) -> dict[str, str]:
        """Return metric -> images made on each surrogate of the plan; the test images are those of every seed."""
        made = {}
        for each in self.plan.evasion.surrogates if self.plan.evasion else ():
            data = self._add("data", args={"source": self.source, **_limits(self.plan.data)}, seed=each.seed)
            made[each.metric] = self._evade(self._victim(each.model, Choice(NONE, NONE, {}), data, each.seed), data)
        return made

    def _evade(self, source: str, data: str) -> str:
        assert self.plan.evasion is not None
        attack = self.plan.evasion.attack
        args = {"images": self.plan.evasion.images, "settings": attack.settings}
        return self._add("evade", attack, args, parents={"model": source, "data": data})

    def _attacked(self, keys: Sequence[str], twin: str | None, data: str, surrogates: Mapping[str, str]) -> dict[str, str]:
        """Return metric -> the node of the images that it is measured on, and the network that bore this one."""
        if self.plan.evasion is None:
            return {}
        sources = {"white_box": keys[-1]}
        if len(keys) > 1:
            sources |= {"transfer_parent": keys[0], **({"transfer_twin": twin} if twin else {})}
        made = {metric: self._evade(source, data) for metric, source in sources.items()}
        return {**made, **surrogates, **({"parent": keys[0]} if len(keys) > 1 else {})}

    def _measure(self, model: str, data: str, trigger: str | None, attacked: Mapping[str, str]) -> str:
        parents = {"model": model, "data": data, **({"trigger": trigger} if trigger else {}), **attacked}
        args = {"retuned": True} if RETUNED in self.plan.metrics and trigger else {}
        return self._add("measure", args=args, parents=parents)

    def _add(
        self,
        stage: str,
        choice: Choice | None = None,
        args: Mapping[str, Any] | None = None,
        seed: int = 0,
        parents: Mapping[str, str] | None = None,
        dtype: str = "float32",
    ) -> str:
        uses = {"uses": choice.uses} if choice and choice.uses else {}
        node = Node(
            stage=stage,
            method=choice.name if choice else "",
            args={**(args or {}), **uses},
            seed=seed,
            parents=parents or {},
            threads=self.plan.threads,
            device="cpu" if stage == "data" else self.plan.device,
            dtype=dtype,
            stage_version=STAGES[stage][1],
            method_version=choice.version if choice else 0,
        )
        self.nodes.setdefault(node.key, node)
        return node.key


def _limits(data: DataPlan) -> dict[str, Any]:
    return {"reserve": max(data.clean), "train_limit": data.train_limit, "test_limit": data.test_limit}
