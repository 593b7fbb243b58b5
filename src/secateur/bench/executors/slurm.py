"""On a Slurm cluster: nodes that are ready together become one job array; its tasks leave their outcomes in the store's queue.

The store must be a path that every machine sees, and so must the Python that runs this. Tasks outlive a driver that is killed:
the next run on the same store takes up those that Slurm still lists.

    store/queue/<stamp>/{array.sh, keys.txt, id, <key>.json, <key>.outcome.json, <task>.log}
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import MethodError, SecateurError
from ..nodes import STAGES, Node, canonical_json, from_config
from ..store import Store, read_result
from ..work import Job, Outcome, Status, run_job, warm

COMMANDS = ("sbatch", "squeue", "scancel")
MOST = 1000  # tasks in one array, Slurm's own default
STEP = 0.5  # seconds between looks for outcomes
LOOK = 10.0  # seconds between calls of squeue
PATIENCE = 60.0  # seconds that a network disk may take to show a file
HANGS = 120.0  # seconds after which a Slurm command counts as failed
START_UP = 300.0  # seconds beyond a job's timeout that Slurm grants: the task itself watches the timeout
BASE = {"cpu": 2 * 2**30, "cuda": 6 * 2**30}  # bytes that Python and torch take before a job's own memory
OURS = ("--array", "-a", "--clusters", "-M")  # options of sbatch that would break the bookkeeping
PASSING = ("timed out", "emporarily", "nable to contact")  # complaints of sbatch that may not be there a moment later
PAUSES = (5.0, 30.0, 120.0)  # seconds before sbatch is tried again after one of those
TELLING: dict[str, Status] = {  # what Slurm writes into the log of a task that it kills
    **dict.fromkeys(("oom_kill", "oom-kill", "memory limit"), "memory"),
    "DUE TO TIME LIMIT": "timeout",
}
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
        gpus: int | None = None,
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

    def room(self, node: Node) -> bool:
        """Return whether one more job may be in Slurm's queue."""
        del node
        return len(self._collected) + len(self._tasks) < self._most

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
        for _, group in groupby(jobs, key=_order):
            alike = list(group)
            for start in range(0, len(alike), MOST):
                self._send_array(alike[start : start + MOST])

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
            (folder / "id").write_text(number, "utf-8")
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
        for task, outcome in outcomes:
            if outcome is not None and outcome.status == "done":
                _tidy(task)
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
        if task.gone is None:
            return None
        store = Store(task.job.store)
        if store.done(key):
            result = read_result(store.folder(key))
            return Outcome(key, "done", seconds=result["cost"]["seconds"], host=result["environment"]["host"])
        if time.monotonic() - task.gone < self._patience:
            return None
        _cancel([task.id])  # should it run after all, it must not run beside its successor
        log = _log(task)
        told: list[Status] = [status for words, status in TELLING.items() if words in log]
        last = log.strip().rpartition("\n")[2][:300]
        why = f"Slurm's task {task.id} ended without an outcome" + (f": {last}" if last else "")
        return Outcome(key, told[0] if told else "lost", why, log, time.monotonic() - task.submitted)


def script(folder: Path, jobs: Sequence[Job], options: Iterable[str] = ()) -> str:
    """Return the array script of jobs that need the same of a machine; its task number i does line i of ``keys.txt``."""
    node, timeout, memory = jobs[0].node, jobs[0].timeout, jobs[0].memory
    lines = ["--job-name=secateur", f"--array=1-{len(jobs)}", "--ntasks=1", f"--cpus-per-task={node.threads}"]
    if node.device == "cuda":
        lines.append("--gres=gpu:1")
    if timeout is not None:
        lines.append(f"--time={math.ceil((timeout + START_UP) / 60)}")
    if memory is not None:
        lines.append(f"--mem={math.ceil((memory + BASE[node.device]) / 2**20)}M")
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*lines, *options)),
            f"export OMP_NUM_THREADS={node.threads}",
            f"folder={shlex.quote(str(folder))}",
            'key=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$folder/keys.txt")',
            f'exec {shlex.quote(sys.executable)} -P -m {__name__} "$folder" "$key"',
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
    warm()
    watch = None if job.timeout is None else threading.Timer(job.timeout, _expire, (folder, job))
    if watch is not None:
        watch.daemon = True
        watch.start()
    outcome = run_job(job)
    if watch is not None:
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
    values = {name: value for name, value in vars(job).items() if name in FIELDS}
    return canonical_json({**values, "node": job.node.config, "source": dict(job.source)}) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _leave(folder: Path, outcome: Outcome) -> None:
    """Write an outcome whole or not at all."""
    temporary = folder / f"{outcome.key}.{secrets.token_hex(4)}.tmp"
    temporary.write_text(canonical_json(asdict(outcome)), "utf-8")
    temporary.replace(folder / f"{outcome.key}.outcome.json")


def _expire(folder: Path, job: Job) -> None:
    """End this process because its job's time is up."""
    why = f"it took longer than {job.timeout:g} s and was killed"
    try:
        _leave(folder, Outcome(job.node.key, "timeout", why, "", job.timeout or 0.0, socket.gethostname(), os.getpid()))
    finally:
        os._exit(OUT_OF_TIME)


def _sbatch(folder: Path) -> str:
    """Hand an array to Slurm and return its number."""
    pauses = list(PAUSES)
    log = str(folder).replace("%", "%%") + "/%a.log"  # Slurm fills in patterns in folders too
    while True:
        done = _run("sbatch", "--parsable", f"--output={log}", "array.sh", folder=folder)
        if done.returncode == 0:
            return done.stdout.strip().partition(";")[0]
        complaint = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        if not pauses or not any(words in complaint for words in PASSING):
            script = folder / "array.sh"
            raise SecateurError(f"sbatch refused {script}: {complaint}; check --slurm, --workers and the plan's limits")
        time.sleep(pauses.pop(0))


def _listed() -> set[str] | None:
    """Return the tasks that Slurm has of this user, or None when it does not answer."""
    done = _run("squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}")
    return set(done.stdout.split()) if done.returncode == 0 else None


def _cancel(tasks: Sequence[str]) -> None:
    for start in range(0, len(tasks), MOST):
        _run("scancel", *tasks[start : start + MOST])


def _run(*command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} timed out")


def _log(task: _Task) -> str:
    """Return the end of what a task printed."""
    return _read(task.folder / f"{task.id.rpartition('_')[2]}.log")[-4000:]


def _tidy(task: _Task) -> None:
    """Remove what a finished task left in the queue, and its array's folder after the last one."""
    key = task.job.node.key
    for name in (f"{key}.json", f"{key}.outcome.json", f"{task.id.rpartition('_')[2]}.log"):
        (task.folder / name).unlink(missing_ok=True)
    if not any(task.folder.glob("*.json")):
        shutil.rmtree(task.folder, ignore_errors=True)


def _left_over(queue: Path) -> dict[str, tuple[Path, str]]:
    """Return key -> folder and task of what a killed driver left in Slurm's queue; remove folders of which nothing is left."""
    folders = [path for path in sorted(queue.glob("*")) if path.is_dir()]
    listed = _listed() if folders else None
    found: dict[str, tuple[Path, str]] = {}
    for folder in folders if listed is not None else ():
        number = _read(folder / "id")
        tasks = {key: f"{number}_{i}" for i, key in enumerate(_read(folder / "keys.txt").split(), start=1)}
        ended = {path.name.partition(".")[0] for path in folder.glob("*.outcome.json")}
        live = {key: (folder, task) for key, task in tasks.items() if task in (listed or ()) and key not in ended}
        if not live:
            shutil.rmtree(folder, ignore_errors=True)
        found |= live
    return found


if __name__ == "__main__":
    run_node(Path(sys.argv[1]), sys.argv[2])
