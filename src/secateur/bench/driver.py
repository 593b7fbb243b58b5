"""The driver: it walks a plan's graph, hands ready nodes to an executor and keeps the index. Running it again resumes.

What is done is asked of the store's files. A lost process is tried again, a node out of memory once more at half batch, a node
that raises or runs out of time fails and its descendants are skipped; the next run tries failed nodes anew.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..errors import SecateurError
from .executors import Executor
from .index import Index
from .nodes import STAGES, Graph, Node
from .plan import Plan
from .store import Store
from .work import HALF, Job, Outcome

Event = Literal["start", "done", "retry", "failed", "tick"]
OnEvent = Callable[[Event, Node | None, "Progress"], None]
ATTEMPTS = 3  # of a node whose process was lost
TICK = 1.0  # seconds between heartbeats
PATIENCE = 10.0  # seconds until a finished node's result must be seen
STALL = 120  # seconds without room for any node after which a run gives up
ORDER = tuple(STAGES)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: Nodes of the plan.
        done: Finished, earlier runs included.
        cached: Finished before this run began.
        running: Keys that run now.
        failed: Key -> outcome of those that failed in this run.
        skipped: Nodes that wait for a failed one.
        last: Seconds that the node finished last took.
        started: When the run began, `time.monotonic`.
    """

    total: int
    done: int = 0
    cached: int = 0
    running: set[str] = field(default_factory=set)
    failed: dict[str, Outcome] = field(default_factory=dict)
    skipped: int = 0
    last: float = 0.0
    started: float = field(default_factory=time.monotonic)


def run(
    graph: Graph,
    store: Store,
    executor: Executor,
    plan: Plan,
    *,
    stages: Mapping[str, str] | None = None,
    on_event: OnEvent | None = None,
) -> Progress:
    """Run every node of a plan that has no result yet.

    Args:
        graph: The plan's nodes.
        store: Where results are and go.
        executor: Runs the nodes; the caller closes it.
        plan: For the paths of its images, its timeout and its memory limit.
        stages: Stage -> ``module:function``; by default those of `STAGES`.
        on_event: Told of everything that happens.

    Raises:
        SecateurError: Another driver holds the store, or its disk is full. Finished nodes stay finished.
    """
    store.make()
    with store.driving(), Index.open(store) as index:
        store.sweep()
        try:
            return _Run(graph, store, executor, plan, index, stages, on_event).run()
        finally:
            store.sweep()


class _Run:
    def __init__(
        self,
        graph: Graph,
        store: Store,
        executor: Executor,
        plan: Plan,
        index: Index,
        stages: Mapping[str, str] | None,
        on_event: OnEvent | None,
    ) -> None:
        self.graph, self.store, self.executor, self.index = graph, store, executor, index
        self.plan = plan
        self.targets = stages or {name: target for name, (target, _) in STAGES.items()}
        self.tell = on_event or (lambda event, node, progress: None)
        self.jobs: dict[str, Job] = {}
        self.children: dict[str, list[str]] = {}
        self.waiting: dict[str, int] = {}
        self.ready: dict[str, list[tuple[int, int, str]]] = {}  # device -> heap
        self.rank = {key: i for i, key in enumerate(graph.nodes)}
        self.progress = Progress(len(graph.nodes))
        self.beaten = 0.0
        self.idle = 0

    def run(self) -> Progress:
        done = {key for key in self.graph.nodes if self.store.done(key)}
        self.progress.done = self.progress.cached = len(done)
        with _disk(self.store, self.progress):
            self.index.adopt(self.store, [self.graph.nodes[key] for key in done])
        for key, node in self.graph.nodes.items():
            if key in done:
                continue
            missing = [parent for parent in node.parents.values() if parent not in done]
            self.waiting[key] = len(missing)
            for parent in missing:
                self.children.setdefault(parent, []).append(key)
            if not missing:
                self._enqueue(key)
        try:
            while any(self.ready.values()) or self.jobs:
                self._submit()
                self._check_stalled()
                for outcome in self.executor.poll(TICK):
                    self._handle(outcome)
                self._beat()
        finally:
            for key in self.jobs:
                with suppress(sqlite3.Error):
                    self.index.put(self.graph.nodes[key], "todo")
        self.progress.skipped = len(self.waiting) - len(self.progress.failed)
        return self.progress

    def _enqueue(self, key: str) -> None:
        node = self.graph.nodes[key]
        order = ORDER.index(node.stage) if node.stage in ORDER else len(ORDER)
        heapq.heappush(self.ready.setdefault(node.device, []), (order, self.rank[key], key))

    def _submit(self) -> None:
        for heap in self.ready.values():
            while heap and self.executor.room(node := self.graph.nodes[heap[0][-1]]):
                heapq.heappop(heap)
                job = Job(node, self.targets[node.stage], str(self.store.root), self.plan.sources)
                self._start(replace(job, timeout=self.plan.timeout, memory=self.plan.memory))

    def _check_stalled(self) -> None:
        """Wait a little when nothing runs because the executor has no room, and not for ever."""
        if self.jobs:
            self.idle = 0
            return
        self.idle += 1
        if self.idle > STALL:
            raise SecateurError(
                f"the executor had no room for a node of {self.plan.threads} threads for {STALL} s; "
                "give it more CPUs, or lower threads"
            )
        time.sleep(TICK)

    def _start(self, job: Job) -> None:
        self.jobs[job.node.key] = job
        self.progress.running.add(job.node.key)
        self._write(job.node, "running", attempt=job.attempt)
        self.executor.submit(job)
        self.tell("start", job.node, self.progress)

    def _handle(self, outcome: Outcome) -> None:
        job = self.jobs.pop(outcome.key)
        self.progress.running.discard(outcome.key)
        if outcome.status != "done" and self.store.done(outcome.key):
            outcome = replace(outcome, status="done")  # it was killed after its last step
        if outcome.status == "done":
            self._check_shared(outcome)
            self._finish(job, outcome)
        elif outcome.status == "disk":
            raise _full(self.store, self.progress, outcome.message)
        elif again := _again(job, outcome):
            self.tell("retry", job.node, self.progress)
            self._start(again)
        else:
            self.progress.failed[outcome.key] = outcome
            self._write(job.node, "failed", attempt=job.attempt, seconds=outcome.seconds, message=outcome.message)
            record = {**asdict(outcome), "attempt": job.attempt, "config": job.node.config}
            with _disk(self.store, self.progress):
                self.store.record_failure(outcome.key, record)
            self.tell("failed", job.node, self.progress)

    def _check_shared(self, outcome: Outcome) -> None:
        """Make sure that what a worker wrote is here; a network disk may take a moment to show it."""
        end = time.monotonic() + PATIENCE
        while not self.store.done(outcome.key):
            if time.monotonic() > end:
                raise SecateurError(
                    f"a node that ended on {outcome.host} left no result in {self.store.root}; "
                    "put the store on a disk that all machines share"
                )
            time.sleep(TICK / 10)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self.progress.done += 1
        self.progress.last = outcome.seconds
        self.waiting.pop(outcome.key, None)
        self._write(job.node, "done", attempt=job.attempt, seconds=outcome.seconds, host=outcome.host, pid=outcome.pid)
        for child in self.children.get(outcome.key, ()):
            self.waiting[child] -= 1
            if self.waiting[child] == 0:
                self._enqueue(child)
        self.tell("done", job.node, self.progress)

    def _write(self, node: Node, state: str, **facts: Any) -> None:
        with _disk(self.store, self.progress):
            self.index.put(node, state, **facts)

    def _beat(self) -> None:
        if time.monotonic() - self.beaten >= TICK:
            self.beaten = time.monotonic()
            self.tell("tick", None, self.progress)
            with _disk(self.store, self.progress):
                self.index.beat(self.jobs)


def _again(job: Job, outcome: Outcome) -> Job | None:
    """Return the job to try next: as it is after a lost process, once at half batch when memory ran out; None to give up."""
    if outcome.status == "lost" and job.attempt < ATTEMPTS:
        return replace(job, attempt=job.attempt + 1)
    if outcome.status == "memory" and job.batch_scale == 1.0:
        return replace(job, attempt=job.attempt + 1, batch_scale=HALF)
    return None


@contextmanager
def _disk(store: Store, progress: Progress) -> Iterator[None]:
    """Turn what a full disk does to the driver's own files into one clear error."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise _full(store, progress, str(error)) from None


def _full(store: Store, progress: Progress, why: str) -> SecateurError:
    kept = f"{progress.done} of {progress.total} nodes are done and stay done"
    return SecateurError(f"cannot write the store {store.root} ({why}); free some space and run again: {kept}")
