"""How far a plan is, and how long the rest may take."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .index import STALE, durations, read_index
from .nodes import STAGES, Graph, Node
from .store import Store

STATES = ("done", "running", "failed", "skipped", "todo")


@dataclass(frozen=True)
class Status:
    """The states of a plan's nodes.

    Attributes:
        states: Key -> ``done``, ``running``, ``failed``, ``skipped`` (a node it needs failed) or ``todo``.
        failures: Key -> one line, for the failed nodes.
        driven: Whether a driver is at work on the store.
    """

    states: Mapping[str, str]
    failures: Mapping[str, str]
    driven: bool

    def count(self, state: str) -> int:
        """Return how many nodes are in a state."""
        return sum(found == state for found in self.states.values())


def status(graph: Graph, store: Store) -> Status:
    """Return what state each node of a plan is in; only looks, while a driver may be at work."""
    failures = store.failures()
    driven = store.driven()
    now = time.time()
    running = {
        key
        for key, entry in read_index(store).items()
        if entry.state == "running" and driven and now - (entry.heartbeat or 0) < STALE
    }
    states: dict[str, str] = {}
    for key, node in graph.nodes.items():
        if store.done(key):
            states[key] = "done"
        elif key in running:
            states[key] = "running"
        elif key in failures:
            states[key] = "failed"
        else:
            blocked = any(states[parent] in ("failed", "skipped") for parent in node.parents.values())
            states[key] = "skipped" if blocked else "todo"
    messages = {key: str(failures[key].get("message", "")) for key, state in states.items() if state == "failed"}
    return Status(states, messages, driven)


@dataclass
class Estimate:
    """How long nodes take, from those that finished: of the same settings, else of the same method, else of the stage."""

    known: dict[tuple[str, str], float]
    own: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Estimate:
        """Read a store's past."""
        return cls(durations(store))

    def observe(self, node: Node, seconds: float) -> None:
        """Take a node into account that has just finished."""
        name = node.kin
        count, mean = self.own.get(name, (0, 0.0))
        self.own[name] = count + 1, mean + (seconds - mean) / (count + 1)

    def seconds(self, node: Node) -> float | None:
        """Return how long a node may take; None when nothing like it has finished yet."""
        name = node.kin
        if name in self.own:
            return self.own[name][1]
        for place in (("kin", name), ("method", f"{node.stage} {node.method}"), ("stage", node.stage)):
            if place in self.known:
                return self.known[place]
        return None

    def left(self, nodes: Iterable[Node], graph: Graph, workers: int) -> tuple[float, int]:
        """Return the seconds that nodes need on so many workers, parents first, and how many of them nothing is known of."""
        keys = {node.key: node for node in nodes}
        free = [0.0] * max(1, workers)
        ends: dict[str, float] = {}
        unknown = 0
        order = {stage: i for i, stage in enumerate(STAGES)}
        for key, node in sorted(keys.items(), key=lambda item: order.get(item[1].stage, len(order))):
            expected = self.seconds(node)
            unknown += expected is None
            parents = max((ends.get(parent, 0.0) for parent in node.parents.values()), default=0.0)
            ends[key] = max(heapq.heappop(free), parents) + (expected or 0.0)
            heapq.heappush(free, ends[key])
        return max(ends.values(), default=0.0), unknown


def duration(seconds: float) -> str:
    """Return a time span in words: ``40 s``, ``12 min``, ``1 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
