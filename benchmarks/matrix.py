"""What the benchmark matrix itself costs: scaling over workers, overhead per node, and ten thousand nodes.

    python benchmarks/matrix.py [scaling] [overhead] [many]

Runs on an otherwise idle machine only mean something. Results: ``benchmarks/README.md``.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from secateur.bench.driver import run
from secateur.bench.executors import make
from secateur.bench.nodes import STAGES, Graph, Node, expand
from secateur.bench.plan import read_plan
from secateur.bench.source import digest
from secateur.bench.stages import Work
from secateur.bench.store import Store

SMOKE = Path(__file__).parents[1] / "plans" / "smoke.toml"
SECATEUR = Path(sys.executable).with_name("secateur")
NODES, MATMULS, SIZE = 16, 260, 512  # about three seconds of one core a node
EMPTY = 200
MANY = """
format = 1
name = "many"
victim_seeds = {seeds}
repair_seeds = [0, 1, 2, 3, 4]
[data]
name = "fashion-mini"
[[model]]
name = "convnet"
[[backdoor]]
name = "badnets"
[[repair]]
name = "norm-pruning"
fraction = [0.1, 0.2, 0.3, 0.4]
"""


def compute(work: Work) -> dict[str, Any]:
    """Multiply matrices: a fixed amount of work on one thread."""
    import torch

    a = torch.full((SIZE, SIZE), 1 / SIZE)
    for _ in range(MATMULS):
        a = a @ a.clamp(0, 1)
    return {"sum": float(a.sum())}


def empty(work: Work) -> dict[str, Any]:
    """Do nothing, and answer as a measuring node would."""
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    rates = dict.fromkeys(("accuracy", "attack_success", "triggered_accuracy"), rate)
    return {"rates": rates, "cost": {"parameters": 1, "nonzero": 1}, "log": {}}


def timed(target: str, count: int, workers: int) -> float:
    """Return the seconds that a warm executor of so many workers takes for equal nodes."""
    runner = make("local", workers=workers)
    plan = read_plan(SMOKE)

    def seconds(nodes: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            graph = Graph({n.key: n for n in (Node("work", args={"i": i}) for i in range(nodes))}, ())
            start = time.perf_counter()
            assert run(graph, Store(folder), runner, plan, stages={"work": target}).done == nodes
            return time.perf_counter() - start

    try:
        seconds(workers)
        return seconds(count)
    finally:
        runner.close()


def scaling() -> None:
    """Compare one worker with two, in turns."""
    rounds = [{workers: timed("matrix:compute", NODES, workers) for workers in (1, 2)} for _ in range(2)]
    for times in rounds:
        print(f"{NODES} nodes: 1 worker {times[1]:.1f} s, 2 workers {times[2]:.1f} s, ratio {times[1] / times[2]:.2f}")


def overhead() -> None:
    """Time nodes that do nothing."""
    print(f"overhead per node, 1 worker, warm: {timed('matrix:empty', EMPTY, 1) / EMPTY:.3f} s")


def many() -> None:
    """Run ten thousand nodes, then ask for status and report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.toml"
        path.write_text(MANY.format(seeds=list(range(233))), "utf-8")
        plan = replace(read_plan(path), timeout=60.0)
        graph = expand(plan, digest)
        store = Path(folder) / "store"
        runner = make("local", workers=2)
        start = time.perf_counter()
        end = run(graph, Store(store), runner, plan, stages=dict.fromkeys(STAGES, "matrix:empty"))
        runner.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{end.done} nodes: {time.perf_counter() - start:.0f} s with 2 workers, driver's peak memory {peak:.0f} MiB")
        for command in (["status"], ["report", "--format", "text"], ["report", "--format", "csv"], ["run", "--dry-run"]):
            verb, *flags = command
            start = time.perf_counter()
            subprocess.run([SECATEUR, "bench", verb, path, "--store", store, *flags], check=True, stdout=subprocess.DEVNULL)
            print(f"bench {' '.join(command)}: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["scaling", "overhead", "many"]
    for name in chosen:
        {"scaling": scaling, "overhead": overhead, "many": many}[name]()
