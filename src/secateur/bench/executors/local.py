"""On this machine: one process per node, forked from a server that has torch loaded, so that a node costs little to start.

A node that crashes takes nobody along. A worker ends by itself when its driver dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from ...errors import MethodError
from ..nodes import Node
from ..work import PRELOAD, Job, Outcome, run_job

ORPHANED = 9


@dataclass
class _Worker:
    job: Job
    process: ForkServerProcess
    answer: Connection
    started: float
    gpu: str | None
    kills: int  # of the kernel for want of memory, before it started

    @property
    def deadline(self) -> float:
        return float("inf") if self.job.timeout is None else self.started + self.job.timeout


class Local:
    """Runs up to ``workers`` jobs at once.

    Args:
        workers: How many; by default as many as threads fit on the CPU cores this process may use.
        threads: CPU threads of each job.
        gpus: How many GPUs to share out to jobs that ask for one, each to one job at a time; by default all there are.
    """

    def __init__(self, *, workers: int | None = None, threads: int = 1, gpus: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._slots = workers if workers is not None else max(1, cores // threads)
        here = _gpus_here()
        self._all_gpus = here if gpus is None else here[:gpus] or [str(i) for i in range(gpus)]
        self._gpus = list(self._all_gpus)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._workers: list[_Worker] = []

    def room(self, node: Node) -> bool:
        """Return whether a slot is idle, and a GPU if the node wants one.

        Raises:
            MethodError: The node wants a GPU and there is none.
        """
        if node.device == "cuda" and not self._all_gpus:
            raise MethodError('the plan wants a GPU and none was found here; write device = "cpu", or name them with --gpus')
        return len(self._workers) < self._slots and (node.device != "cuda" or bool(self._gpus))

    def submit(self, job: Job) -> None:
        """Start a process for the job."""
        gpu = self._gpus.pop(0) if job.node.device == "cuda" else None
        answer, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(job, sender, gpu), daemon=True)
        process.start()
        sender.close()
        self._workers.append(_Worker(job, process, answer, time.monotonic(), gpu, _memory_kills()))

    def poll(self, seconds: float) -> Sequence[Outcome]:
        """Wait until a worker answers, dies or runs out of time."""
        if not self._workers:
            return []
        until = min(worker.deadline for worker in self._workers) - time.monotonic()
        wait([worker.answer for worker in self._workers], timeout=max(0.0, min(seconds, until)))
        outcomes = [(worker, self._outcome(worker)) for worker in self._workers]
        ended = [(worker, outcome) for worker, outcome in outcomes if outcome is not None]
        for worker, _ in ended:
            self._end(worker)
        return [outcome for _, outcome in ended]

    def close(self) -> None:
        """Kill the workers that still run."""
        for worker in list(self._workers):
            self._end(worker)

    def _outcome(self, worker: _Worker) -> Outcome | None:
        elapsed = time.monotonic() - worker.started
        if worker.answer.poll():
            try:
                return worker.answer.recv()
            except (EOFError, OSError):
                worker.process.join()
                code = worker.process.exitcode or 0
                why = (
                    f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
                )
                status = "memory" if code == -signal.SIGKILL and _memory_kills() > worker.kills else "lost"
                return Outcome(worker.job.node.key, status, why, seconds=elapsed)
        if time.monotonic() >= worker.deadline:
            return Outcome(
                worker.job.node.key, "timeout", f"it took longer than {worker.job.timeout:g} s and was killed", seconds=elapsed
            )
        return None

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        worker.answer.close()
        self._workers.remove(worker)
        if worker.gpu is not None:
            self._gpus.append(worker.gpu)


def _memory_kills() -> int:
    """Return how often the kernel has killed a process of this machine because memory ran out (Linux)."""
    try:
        lines = Path("/proc/vmstat").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _gpus_here() -> list[str]:
    """Return the numbers of this machine's NVIDIA GPUs, without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in found if number.isdecimal()), key=int)


def _serve(job: Job, sender: Connection, gpu: str | None) -> None:
    """Run one job in a process of its own and send how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    threading.Thread(target=_die_with_driver, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    sender.send(run_job(job))
    sender.close()


def _die_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(ORPHANED)
