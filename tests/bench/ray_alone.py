"""python ray_alone.py FOLDER: start a Ray of one slot, put jobs through it, close it, and write what happened to report.json.

A process of its own, because Ray reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from faulty import node

from secateur.bench.executors.ray import Ray
from secateur.bench.stages import Work
from secateur.bench.store import Store
from secateur.bench.work import Job

PATIENCE = 120.0


def hold(work: Work) -> dict[str, Any]:
    """Never let go of the interpreter."""
    return {"sum": sum(range(10**13))}


def run(executor: Ray, *jobs: Job) -> dict[str, list[Any]]:
    names = {job.node.key: job.node.args["name"] for job in jobs}
    for job in jobs:
        executor.submit(job)
    outcomes, end = [], time.monotonic() + PATIENCE
    while len(outcomes) < len(jobs) and time.monotonic() < end:
        outcomes += executor.poll(1.0)
    return {names[outcome.key]: [outcome.status, outcome.message, outcome.traceback] for outcome in outcomes}


def family() -> set[int]:
    """Return this process and all that descend from it."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    parents = {int(line.split()[0]): int(line.split()[1]) for line in lines}
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> list[str]:
    """Return the addresses at which any of these processes listens."""
    own = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            own.add(os.readlink(handle) if handle.is_symlink() else "")
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text("utf-8").splitlines()[1:]]
    return sorted({row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own})


def main(folder: Path) -> None:
    store, log = Store(folder / "store"), folder / "ran.log"
    store.make()

    def job(name: str, target: str = "faulty:work", timeout: float | None = 2.0, **args: Any) -> Job:
        return Job(node(log, name, **args), target, str(store.root), timeout=timeout)

    executor = Ray(workers=1)
    report: dict[str, Any] = {"warm": run(executor, job("warm", timeout=None))}
    report["queued"] = run(executor, *(job(f"queued{i}", sleep=1.2) for i in range(3)))
    report["doomed"] = run(executor, job("before", sleep=1.5), job("doomed", do="die", sleep=0.7))
    report["hold"] = run(executor, job("hold", "ray_alone:hold", timeout=1.0))
    report["left"] = [path.name for path in store.tmp.glob("*.timeout")]
    executor.submit(job("never", do="hang", timeout=None))
    executor.poll(1.0)
    family_of_ray = family()
    report["listening"] = listening(family_of_ray)
    executor.close()
    end = time.monotonic() + 20
    while (
        alive := [pid for pid in family_of_ray - {os.getpid()} if Path(f"/proc/{pid}/exe").exists()]
    ) and time.monotonic() < end:
        time.sleep(0.2)
    report["alive"] = alive
    (folder / "report.json").write_text(json.dumps(report), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
