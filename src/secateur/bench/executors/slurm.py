"""On a Slurm cluster: nodes that are ready together become one job array, whose tasks leave their outcomes in the store's queue.

The store must be a path that every machine sees, and so must the Python that runs this. Tasks outlive a driver that is killed:
the next run on the same store takes up those that Slurm still lists.

    store/queue/<stamp>/{array.sh, keys.txt, id, <key>.json, <key>.outcome.json, <task>.log}
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from pathlib import Path
from typing import Any, Literal

from ...errors import MethodError, SecateurError
from ..nodes import STAGES, canonical_json, from_config
from ..work import Job, Outcome, run_job

COMMANDS = ("sbatch", "squeue", "scancel")
MOST = 1000  # tasks in one array, Slurm's own default
STEP = 0.5  # seconds between looks for outcomes
LOOK = 10.0  # seconds between calls of squeue
PATIENCE = 60.0  # seconds that a network disk may take to show a file
HANGS = 120.0  # seconds after which a Slurm command counts as failed
START_UP = 300.0  # seconds beyond a job's timeout that Slurm grants: the task itself watches the timeout
BASE = {"cpu": 2 * 2**30, "cuda": 6 * 2**30}  # bytes that Python and torch take before a job's own memory
OURS = ("--array", "-a", "--clusters", "-M")  # options of sbatch that would break the bookkeeping
VERDICTS: dict[str, Literal["timeout", "memory"]] = {"TIMEOUT": "timeout", "DEADLINE": "timeout", "OUT_OF_MEMORY": "memory"}
OUT_OF_TIME = 97
FIELDS = ("node", "source", "attempt", "batch_scale", "timeout", "memory")


@dataclass
class _Task:
    job: Job
    folder: Path
    id: str
    submitted: float
    gone: float | None = None  # since when squeue does not list it


class Slurm:
    """Keeps up to ``workers`` jobs in Slurm's queue, waiting or running.

    Args:
        workers: How many at once; by default 1000.
        threads: Ignored: every job says itself how many CPU threads it takes.
        gpus: Ignored: Slurm knows its GPUs, and a job that needs one asks for one.
        options: Further lines for sbatch, such as ``--partition=long``.
        patience: Seconds between a task's disappearance from squeue without an outcome and its loss.

    Raises:
        MethodError: Slurm's commands are not here, or an option is not one for sbatch.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        threads: int = 1,
        gpus: int = 0,
        options: Sequence[str] = (),
        patience: float = PATIENCE,
    ) -> None:
        del threads, gpus
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            raise MethodError(
                f"the executor slurm needs {', '.join(missing)} on the PATH; "
                "run it on a login node of the cluster, or use --executor local"
            )
        for option in options:
            _check(option)
        self._most = workers or MOST
        self._options, self._patience = tuple(options), patience
        self._collected: list[Job] = []
        self._tasks: list[_Task] = []
        self._left: dict[str, tuple[Path, str]] | None = None
        self._looked = -math.inf

    def free(self) -> int:
        """Return how many more jobs may be in Slurm's queue."""
        return self._most - len(self._collected) - len(self._tasks)

    def submit(self, job: Job) -> None:
        """Keep the job for the next array, unless a task of a killed driver does it already.

        Raises:
            MethodError: The job is not one of Secateur's own stages: nothing else may be named from outside.
        """
        if STAGES.get(job.node.stage, ("",))[0] != job.target:
            raise MethodError(f"the executor slurm runs Secateur's own stages, got '{job.target}'; use --executor local")
        if self._left is None:
            self._left = _left_over(Path(job.store) / "queue")
        folder, task = self._left.pop(job.node.key, (None, ""))
        if folder is not None and _read(folder / f"{job.node.key}.json") == _written(job):
            self._tasks.append(_Task(job, folder, task, time.monotonic()))
            return
        if task:
            _cancel([task])
        self._collected.append(job)

    def poll(self, seconds: float) -> Sequence[Outcome]:
        """Hand what was collected to Slurm, then wait until tasks leave an outcome or disappear.

        Raises:
            SecateurError: sbatch refuses the array, or the store cannot be written.
        """
        self._send()
        until = time.monotonic() + seconds
        while self._tasks:
            ended = self._ended()
            left = until - time.monotonic()
            if ended or left <= 0:
                return ended
            time.sleep(min(STEP, left))
        return []

    def close(self) -> None:
        """Cancel what waits or runs."""
        _cancel([task.id for task in self._tasks])
        for folder in {task.folder for task in self._tasks}:
            (folder / "id").unlink(missing_ok=True)
        self._tasks.clear()
        self._collected.clear()

    def _send(self) -> None:
        jobs, self._collected = sorted(self._collected, key=_order), []
        for _, alike in groupby(jobs, key=_order):
            for array in batched(alike, MOST):
                self._send_array(array)

    def _send_array(self, jobs: Sequence[Job]) -> None:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = Path(jobs[0].store) / "queue" / stamp
        try:
            folder.mkdir(parents=True)
            (folder / "keys.txt").write_text("".join(f"{job.node.key}\n" for job in jobs), "utf-8")
            (folder / "array.sh").write_text(script(folder, jobs, self._options), "utf-8")
            for job in jobs:
                (folder / f"{job.node.key}.json").write_text(_written(job), "utf-8")
            number = _sbatch(folder)
            (folder / "id").write_text(f"{number}\n", "utf-8")
        except OSError as error:
            raise SecateurError(f"cannot write {folder} ({error.strerror}); free some space and run again") from None
        now = time.monotonic()
        self._tasks += [_Task(job, folder, f"{number}_{i}", now) for i, job in enumerate(jobs, start=1)]

    def _ended(self) -> list[Outcome]:
        """Return the outcomes of tasks that ended, and forget them."""
        self._look()
        written = {path for folder in {task.folder for task in self._tasks} for path in folder.glob("*.outcome.json")}
        outcomes = [(task, self._outcome(task, written)) for task in self._tasks]
        self._tasks = [task for task, outcome in outcomes if outcome is None]
        return [outcome for _, outcome in outcomes if outcome is not None]

    def _look(self) -> None:
        """Note which tasks squeue does not list any more."""
        if time.monotonic() - self._looked < min(LOOK, self._patience):
            return
        self._looked = time.monotonic()
        listed = _listed()
        for task in self._tasks if listed is not None else ():
            if task.id in (listed or ()):
                task.gone = None
            elif task.gone is None:
                task.gone = time.monotonic()

    def _outcome(self, task: _Task, written: Collection[Path]) -> Outcome | None:
        key = task.job.node.key
        path = task.folder / f"{key}.outcome.json"
        if path in written:
            return Outcome(**json.loads(path.read_text("utf-8")))
        if task.gone is None or time.monotonic() - task.gone < self._patience:
            return None
        _cancel([task.id])  # should it run after all, it must not run beside its successor
        verdict = _verdict(task.id)
        status = VERDICTS.get(verdict, "lost")
        why = f"Slurm ended task {task.id}{f' ({verdict})' if verdict else ''}{_last_line(task)}"
        return Outcome(key, status, why, seconds=time.monotonic() - task.submitted)


def script(folder: Path, jobs: Sequence[Job], options: Iterable[str] = ()) -> str:
    """Return the array script of jobs that need the same of a machine; its task number i does line i of ``keys.txt``."""
    node, timeout, memory = jobs[0].node, jobs[0].timeout, jobs[0].memory
    lines = ["--job-name=secateur", f"--array=1-{len(jobs)}", "--ntasks=1", f"--cpus-per-task={node.threads}"]
    lines.append("--output=%a.log")
    if node.device == "cuda":
        lines.append("--gres=gpu:1")
    if timeout is not None:
        lines.append(f"--time={math.ceil((timeout + START_UP) / 60)}")
    if memory is not None:
        lines.append(f"--mem={math.ceil((memory + BASE[node.device]) / 2**20)}M")
    command = f"{shlex.quote(sys.executable)} -P -m {__spec__.name if __spec__ else __name__}"
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*lines, *options)),
            f"export OMP_NUM_THREADS={node.threads}",
            f"folder={shlex.quote(str(folder))}",
            'key=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$folder/keys.txt")',
            f'exec {command} "$folder" "$key"',
            "",
        ]
    )


def run_node(folder: Path, key: str) -> Outcome:
    """Do one job of an array in this process and write its outcome beside its description.

    What is done follows from the stage alone: a file in the queue cannot name code to run.

    Args:
        folder: The array's folder in the store's queue.
        key: Which node.

    Raises:
        SecateurError: The job's description is not what `Slurm` writes, or describes another node.
    """
    job = read_job(folder, key)
    if job.timeout is None:
        outcome = run_job(job)
    else:
        watch = threading.Timer(job.timeout, _expire, (folder, job))
        watch.daemon = True
        watch.start()
        outcome = run_job(job)
        watch.cancel()
    _leave(folder, outcome)
    return outcome


def read_job(folder: Path, key: str) -> Job:
    """Return a job that `Slurm` described in a file."""
    path = folder / f"{key}.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        if sorted(raw) != sorted(FIELDS):
            raise ValueError(f"its fields must be {', '.join(FIELDS)}, got {', '.join(sorted(raw))}")
        node = from_config(raw.pop("node"))
        if node.key != key or node.stage not in STAGES:
            raise ValueError("it describes another node")
    except (OSError, ValueError, TypeError) as error:
        raise SecateurError(f"cannot run the job {path}: {error}; run secateur bench run again") from None
    return Job(node, STAGES[node.stage][0], str(folder.parents[1]), **raw)


def _check(option: str) -> None:
    name = option.partition("=")[0].partition(" ")[0]
    if not option.startswith("-") or not option.isprintable():
        raise MethodError(f"an option for sbatch must be like '--partition=long', got {option!r}")
    if name in OURS or (name[:2] in OURS and not name.startswith("--")):
        raise MethodError(f"{name} of sbatch is not for you to set here; leave it out")


def _order(job: Job) -> tuple[Any, ...]:
    """Return what jobs of one array share."""
    return job.node.device, job.node.threads, job.timeout or 0.0, job.memory or 0


def _written(job: Job) -> str:
    """Return the description of a job: everything but its target, which follows from its stage, and the store."""
    values = {name: value for name, value in asdict_shallow(job).items() if name in FIELDS}
    return canonical_json({**values, "node": job.node.config, "source": dict(job.source)}) + "\n"
