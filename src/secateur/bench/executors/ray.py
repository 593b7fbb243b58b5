"""On a Ray cluster: one Ray Core task per node. Only configurations and paths travel; results go through the shared store.

The store must be a path that every machine sees. Ray ends a task when its driver dies; what it had committed by then counts.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MethodError, SecateurError
from ..nodes import Node
from ..store import Store
from ..work import Job, Outcome, run_job, warm

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do one day; until then it warns
}
ALONE = {  # for a Ray that is started here
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes it listen on loopback alone, which no address that it is given does
    "RAY_AUTH_MODE": "token",
}
REFRESH = 5.0  # seconds between looks at the size of the cluster


@dataclass
class _Task:
    job: Job
    reference: Any
    submitted: float


class Ray:
    """Runs as many jobs at once as the cluster has CPUs for.

    Args:
        workers: For a Ray that is started here: how many jobs at once, by default as many as fit on this machine's cores; on
            a cluster: at most so many.
        threads: CPU threads of each job.
        gpus: GPUs of a Ray that is started here.
        address: A running cluster, ``HOST:PORT`` or ``auto``; by default ``RAY_ADDRESS``, else one is started here and ends
            with `close`. A connection that this process has already is used and left open.

    Raises:
        MethodError: Ray is not installed.
        SecateurError: The cluster cannot be reached.
    """

    def __init__(
        self, *, workers: int | None = None, threads: int = 1, gpus: int | None = None, address: str | None = None
    ) -> None:
        address = address or os.environ.get("RAY_ADDRESS")
        alone = address is None and "ray" not in sys.modules  # Ray reads its environment when it is imported
        for name, value in {**ENVIRONMENT, **(ALONE if alone else {})}.items():
            os.environ.setdefault(name, value)
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise MethodError('the executor ray needs Ray; pip install "secateur[ray]", or use --executor local') from None
        self._ray, self._errors = ray, ray.exceptions
        self._threads, self._most = threads, workers
        self._ours = not ray.is_initialized()
        if self._ours:
            self._connect(address, gpus)
        self._call = ray.remote(max_retries=0)(_serve)
        self._tasks: dict[Any, _Task] = {}
        self._size, self._looked = 0, -REFRESH

    def _connect(self, address: str | None, gpus: int | None) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if address is None:
            cores = self._most * self._threads if self._most else len(os.sched_getaffinity(0))
            options |= {
                "address": "local",
                "num_cpus": max(cores, self._threads),
                "num_gpus": gpus or None,
                "include_dashboard": False,
            }
        else:
            options["address"] = address
        try:
            self._ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            place = address or "this machine"
            raise SecateurError(f"cannot reach a Ray cluster at {place}: {_first_line(error)}; check --address") from None

    def room(self, node: Node) -> bool:
        """Return whether the cluster has CPUs for one more job; Ray itself shares out the GPUs.

        Raises:
            MethodError: The node wants a GPU and the cluster has none.
        """
        if node.device == "cuda" and not self._ray.cluster_resources().get("GPU"):
            raise MethodError('the plan wants a GPU and the Ray cluster has none; write device = "cpu", or give it GPUs')
        if time.monotonic() - self._looked >= REFRESH:
            self._looked = time.monotonic()
            slots = int(self._ray.cluster_resources().get("CPU", 0)) // self._threads
            self._size = min(slots, self._most or slots)
        return len(self._tasks) < self._size

    def submit(self, job: Job) -> None:
        """Hand the job to Ray."""
        gpus = 1 if job.node.device == "cuda" else 0
        reference = self._call.options(num_cpus=job.node.threads, num_gpus=gpus, name=job.node.label).remote(job)
        self._tasks[reference] = _Task(job, reference, time.monotonic())

    def poll(self, seconds: float) -> Sequence[Outcome]:
        """Wait until a task ends or is lost with its worker or machine."""
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [self._outcome(self._tasks.pop(reference)) for reference in {*ready, *more}]

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster if this executor joined it."""
        for task in self._tasks.values():
            self._ray.cancel(task.reference, force=True)
        self._tasks.clear()
        if self._ours:
            self._ray.shutdown()

    def _outcome(self, task: _Task) -> Outcome:
        errors = self._errors
        elapsed = time.monotonic() - task.submitted
        key = task.job.node.key
        try:
            return self._ray.get(task.reference)
        except errors.OutOfMemoryError:
            outcome = Outcome(key, "memory", "Ray killed it because its machine ran out of memory", seconds=elapsed)
        except (errors.WorkerCrashedError, errors.TaskCancelledError) as error:
            outcome = Outcome(key, "lost", f"its worker died: {_first_line(error)}", seconds=elapsed)
        except errors.RayTaskError as error:
            why = f"its worker could not start it: {_first_line(error)}"
            outcome = Outcome(key, "failed", why, str(error)[-4000:], elapsed)
        except errors.RayError as error:
            outcome = Outcome(key, "lost", f"its machine was lost: {_first_line(error)}", seconds=elapsed)
        if trace := _expired(task.job):
            limit = task.job.timeout or 0.0
            return Outcome(key, "timeout", f"it took longer than {limit:g} s and was killed", trace, limit)
        return outcome


def _serve(job: Job) -> Outcome:
    """Run one job in a Ray worker, which ends itself when the time is up: only it knows when the job really began.

    Its last act is to write where it was, by which the driver knows that it was the time.
    """
    warm()
    if job.timeout is None:
        return run_job(job)
    with _last_words(job).open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(job.timeout, exit=True, file=file)  # needs no GIL, so that no hang escapes it
        try:
            return run_job(job)
        finally:
            faulthandler.cancel_dump_traceback_later()
            _last_words(job).unlink(missing_ok=True)


def _last_words(job: Job) -> Path:
    return Store(job.store).tmp / f"{job.node.key}-{job.attempt}.timeout"


def _expired(job: Job) -> str:
    """Return where a job was when its time was up, and forget it; nothing if it did not run out of time."""
    path = _last_words(job)
    try:
        text = path.read_text("utf-8")
        path.unlink()
    except OSError:
        return ""
    return text[:4000]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
