"""One node's work, in whatever process an executor runs it: results appear whole in the store, or an outcome says why not."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .nodes import Node
from .store import Store

Status = Literal["done", "failed", "memory", "disk", "timeout", "lost"]
TAIL = 20  # lines of a traceback worth keeping
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "DefaultCPUAllocator")
HALF = 0.5
# What nodes import. The last is what torch loads at the first convolution on the meta device: a second's work.
PRELOAD = (
    *("secateur.bench.stages", "secateur.poison", "secateur.repair"),
    "torch.fx.experimental.symbolic_shapes",
)


@dataclass(frozen=True)
class Job:
    """A node on its way to an executor.

    Attributes:
        node: What to do.
        target: ``module:function`` that does it.
        store: The store's folder, the same path for every process.
        source: ``train`` and ``test`` -> where the images lie.
        attempt: 1 for the first.
        batch_scale: Factor on every batch size; 0.5 after a node ran out of memory.
        timeout: Seconds it may take.
        memory: Bytes of memory it may take beyond what the process has at the start.
    """

    node: Node
    target: str
    store: str
    source: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    batch_scale: float = 1.0
    timeout: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        key: The node.
        status: ``done``; ``failed`` (it raised), ``memory``, ``disk`` (full), ``timeout``, or ``lost`` (its process died).
        message: One line for people.
        traceback: The end of the traceback, if there is one.
        seconds: How long it took.
        host: Where.
        pid: In which process.
    """

    key: str
    status: Status
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    host: str = ""
    pid: int = 0


def warm() -> None:
    """Import what nodes need, once per process, so that no node's time includes it."""
    for name in PRELOAD:
        importlib.import_module(name)


def run_job(job: Job) -> Outcome:
    """Do a node's work; never raises, so that one node's fault stays its own."""
    start = time.perf_counter()
    store = Store(job.store)
    key = job.node.key

    def outcome(status: Status, message: str = "", trace: str = "") -> Outcome:
        return Outcome(key, status, message, trace, time.perf_counter() - start, socket.gethostname(), os.getpid())

    if store.done(key):
        return outcome("done")
    folder: Path | None = None
    try:
        folder = store.begin(key)
        values = _values(job, store, folder)
        store.commit(folder, job.node, _result(job, values, time.perf_counter() - start))
        shutil.rmtree(_checkpoint(job, store).parent, ignore_errors=True)
    except Exception as error:  # noqa: BLE001 -- a stage may raise anything
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return outcome(_status(error), message[:1000], "".join(traceback.format_exception(error)[-TAIL:])[-4000:])
    return outcome("done")


def _values(job: Job, store: Store, folder: Path) -> dict[str, Any]:
    from .. import state
    from .stages import Work

    module, _, name = job.target.partition(":")
    stage = getattr(importlib.import_module(module), name)
    parents = {role: store.folder(key) for role, key in job.node.parents.items()}
    work = Work(job.node, folder, parents, job.source, _checkpoint(job, store))
    with _limited(job.memory), state.threads(job.node.threads), state.smaller_batches(job.batch_scale):
        return stage(work)


def _checkpoint(job: Job, store: Store) -> Path:
    """Return where training may resume, in a folder of the node's own, for an attacker who trains in stages.

    It is another one for another batch size, since the weights would not be the same.
    """
    name = job.node.key if job.batch_scale == 1 else f"{job.node.key}-{job.batch_scale:g}"
    return store.checkpoints / name / "training"


def _result(job: Job, values: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    from .. import runs

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "schema_version": 1,
        "kind": "node",
        "key": job.node.key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": runs.tool(),
        "environment": {**runs.software(), "host": socket.gethostname()},
        "attempt": job.attempt,
        "batch_scale": job.batch_scale,
        "cost": {"seconds": seconds, "peak_memory_bytes": peak},
        "values": dict(values),
    }


@contextmanager
def _limited(memory: int | None) -> Iterator[None]:
    """Let the process take at most ``memory`` bytes more of private data than it has now; beyond it allocations fail."""
    if memory is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _private_bytes() + memory
    hard = before[1]
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _status(error: BaseException) -> Status:
    """Tell a full disk and missing memory from every other fault; a library may have wrapped either."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk"
        if "No space left on device" in text or "os error 28" in text:
            return "disk"
        if isinstance(seen, MemoryError) or any(words in text for words in NO_MEMORY):
            return "memory"
        seen = seen.__cause__ or seen.__context__
    return "failed"
