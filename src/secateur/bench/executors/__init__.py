"""Where nodes run. Every executor obeys one protocol and passes one conformance suite.

| name | where | isolates crashes | timeouts | memory limit |
|---|---|---|---|---|
| ``inline`` | in the driver, one at a time | no | no | yes |
| ``local`` | one process per node, forked from a warm one | yes | yes | yes |
| ``ray`` | a Ray cluster (extra ``ray``) | yes | yes | yes |
| ``slurm`` | job arrays of a Slurm cluster | yes | yes | yes |
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ...errors import MethodError, unknown
from ..nodes import Node
from ..work import Job, Outcome

EXECUTORS: Mapping[str, str] = {
    "inline": "secateur.bench.executors.inline:Inline",
    "local": "secateur.bench.executors.local:Local",
    "ray": "secateur.bench.executors.ray:Ray",
    "slurm": "secateur.bench.executors.slurm:Slurm",
}


class Executor(Protocol):
    """Runs jobs. Used by one thread; `close` must be called, and kills what still runs."""

    def room(self, node: Node) -> bool:
        """Return whether it would start this node now."""
        ...

    def submit(self, job: Job) -> None:
        """Start a job, or queue it; called only after `room` said yes."""
        ...

    def poll(self, seconds: float) -> Sequence[Outcome]:
        """Wait at most so long for jobs to end; return how those did that ended, each exactly once."""
        ...

    def close(self) -> None:
        """Kill what still runs and give everything back."""
        ...


def make(name: str, **options: Any) -> Executor:
    """Return an executor.

    Args:
        name: A name of `EXECUTORS`.
        options: ``workers``: how many nodes at once; ``threads``: CPU threads of a node; ``gpus``: how many GPUs to share out,
            one per node; further ones by executor.

    Raises:
        MethodError: There is no such executor, or what it needs is not installed.
    """
    if name not in EXECUTORS:
        raise MethodError(unknown("executor", name, EXECUTORS))
    module, _, kind = EXECUTORS[name].partition(":")
    return getattr(importlib.import_module(module), kind)(**options)
