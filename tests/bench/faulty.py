"""Stages that misbehave on purpose, and graphs of them. Imported by worker processes by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.bench.driver import Progress, run
from secateur.bench.executors import make
from secateur.bench.nodes import Graph, Node
from secateur.bench.plan import Plan, read_plan
from secateur.bench.stages import Work
from secateur.bench.store import Store
from secateur.state import batch_size

SMOKE = Path(__file__).parents[2] / "plans" / "smoke.toml"
STAGES = {"work": "faulty:work"}
PATIENCE = 300.0  # seconds until a test gives up waiting: a busy machine may take minutes to start Ray's workers


def work(work: Work) -> dict[str, Any]:
    args = work.node.args
    log = Path(args["log"])
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{args['name']} {os.getpid()}\n")
    first = sum(line.split()[0] == args["name"] for line in log.read_text("utf-8").splitlines()) == 1
    (work.folder / "file.txt").write_text(args["name"], "utf-8")
    for parent in work.parents.values():
        assert (parent / "file.txt").read_text("utf-8")
    time.sleep(args.get("sleep", 0.0))
    match args.get("do", "nothing"):
        case "raise":
            raise ValueError("this node raises\non two lines")
        case "raise once" if first:
            raise ValueError("only the first time")
        case "hang":
            time.sleep(60)
        case "wait":
            until(Path(args["gate"]).exists)
        case "die" | "die once" if args["do"] == "die" or first:
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory" if batch_size(512) == 512:
            bytearray(4 * args["megabytes"] * 2**20)
        case "memory always":
            bytearray(4 * args["megabytes"] * 2**20)
        case "wrapped memory" if batch_size(512) == 512:
            raise RuntimeError("layer 3 failed") from MemoryError()
        case "fill":
            (work.folder / "big.bin").write_bytes(bytes(args["megabytes"] * 2**20))
        case "spin":
            end = time.process_time() + args["seconds"]
            while time.process_time() < end:
                sum(range(1000))
    told = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")} if args.get("do") == "tell gpu" else {}
    return {"name": args["name"], "batch": batch_size(512), **told}


def node(log: Path, name: str, *, parents: Iterable[Node] = (), **args: Any) -> Node:
    roles = {f"parent{i}": parent.key for i, parent in enumerate(parents)}
    return Node("work", args={"log": str(log), "name": name, **args}, parents=roles)


def graph(*nodes: Node) -> Graph:
    return Graph({node.key: node for node in nodes}, ())


def chain(log: Path, count: int, **args: Any) -> Graph:
    """Return pairs of nodes, the second of which needs the first."""
    firsts = [node(log, f"first{i}", **args) for i in range(count)]
    return graph(*firsts, *(node(log, f"second{i}", parents=[first], **args) for i, first in enumerate(firsts)))


def plan(**limits: Any) -> Plan:
    return replace(read_plan(SMOKE), **limits)


def drive(
    store: Path,
    nodes: Graph,
    executor: str = "local",
    *,
    real: Plan | None = None,
    limits: Mapping[str, Any] | None = None,
    **options: Any,
) -> Progress:
    """Run a graph, of this file's stage or of the real ones of a plan."""
    runner = make(executor, **options)
    try:
        return run(nodes, Store(store), runner, real or plan(**(limits or {})), stages=None if real else STAGES)
    finally:
        runner.close()


def ran(log: Path) -> list[str]:
    """Return the name of every node that began, once for each time."""
    return [line.split()[0] for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def pids(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    found = _stat(pid)
    return not found or found[0] in "ZX"


def parent(pid: int) -> int | None:
    """Return the process that started a running one."""
    found = _stat(pid)
    return int(found[1]) if found else None


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":  # python faulty.py STORE LOG COUNT SLEEP: a driver that tests can kill
    drive(Path(sys.argv[1]), chain(Path(sys.argv[2]), int(sys.argv[3]), sleep=float(sys.argv[4])), workers=2)
