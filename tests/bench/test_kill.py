"""Killed ten times at random moments, a run ends with the table of one that was never disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.bench.store import Store

PLAN = """
format = 1
victim_seeds = [0, 1]
[data]
name = "fashion-mini"
clean = 0.2
train_limit = 1500
test_limit = 300
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
[[backdoor]]
name = "none"
[train]
epochs = 4
lr = 0.2
[[repair]]
name = "fine-tuning"
epochs = 2
[[repair]]
name = "norm-pruning"
fraction = [0.25, 0.5]
epochs = 2
[[repair]]
name = "norm-pruning"
label = "cannot be resolved, fails"
drop = 0.0
granularity = "weight"
layers = "last-layer"
"""
SECATEUR = (sys.executable, "-c", "from secateur.cli import main; main()")
KILLS = 10
PATIENCE = 240.0


def bench(verb: str, plan: Path, store: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [*SECATEUR, "bench", verb, str(plan), "--store", str(store), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def begun(store: Store) -> set[str]:
    """Return the working folders there are: one for every node that has begun and not ended."""
    return {path.name for path in store.tmp.glob("*-*") if path.is_dir()} if store.tmp.exists() else set()


@pytest.mark.slow
def test_ten_kills_do_not_change_the_table(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN, "utf-8")
    undisturbed, store = tmp_path / "undisturbed", Store(tmp_path / "store")
    first = bench("run", plan, undisturbed)
    assert first.returncode in (0, 3), first.stderr
    dice = random.Random(20)
    before: set[str] = set()
    done = []
    for kill in range(KILLS):
        command = [*SECATEUR, "bench", "run", str(plan), "--store", str(store.root)]
        driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + PATIENCE
        while not begun(store) - before and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert driver.poll() is None, "the run ended before it could be killed ten times: make the plan larger"
        time.sleep(dice.uniform(0.0, 1.0))
        os.killpg(driver.pid, signal.SIGKILL) if kill % 2 else driver.kill()
        driver.communicate()
        before = begun(store)
        done.append(len(list(store.finished())))
    last = bench("run", plan, store.root)
    assert last.returncode == first.returncode, last.stderr
    table = bench("report", plan, store.root, "--format", "csv")
    assert table.returncode == 0
    assert table.stdout == bench("report", plan, undisturbed, "--format", "csv").stdout
    assert len(table.stdout.splitlines()) > 20
    assert done == sorted(done), "a finished result was lost"
    assert "nodes done" in last.stderr
