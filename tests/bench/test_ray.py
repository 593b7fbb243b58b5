"""What only Ray can do: lose a whole node, keep jobs waiting, and start a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from faulty import chain, drive, gone, parent, pids, ran, until

from secateur.bench.executors import make
from secateur.bench.store import Store, read_result
from secateur.errors import MethodError

pytestmark = pytest.mark.ray


def test_a_node_that_is_lost_costs_one_attempt(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from ray_cluster import two_nodes

    log, gate, store = tmp_path / "ran.log", tmp_path / "gate", Store(tmp_path / "store")
    pairs = chain(log, 2, do="wait", gate=str(gate))
    with two_nodes() as cluster:
        leaver = next(iter(cluster.worker_nodes))
        raylet = leaver.all_processes["raylet"][0].process.pid

        def leave() -> None:
            try:
                until(lambda: raylet in map(parent, pids(log)))
                there = [pid for pid in pids(log) if parent(pid) == raylet]
                cluster.remove_node(leaver, allow_graceful=False)
                until(lambda: all(map(gone, there)))  # a worker outlives its node for a moment
            finally:
                gate.touch()

        thread = threading.Thread(target=leave)
        thread.start()
        end = drive(store.root, pairs, "ray")
        thread.join()
    assert (end.done, end.failed) == (4, {})
    assert sorted(store.finished()) == sorted(pairs.nodes)
    assert sorted(read_result(store.folder(key))["attempt"] for key in pairs.nodes) == [1, 1, 1, 2]
    assert len(ran(log)) == 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened to a Ray that the executor started itself, with one slot and three patient jobs."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    folder = tmp_path_factory.mktemp("alone")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    script = Path(__file__).with_name("ray_alone.py")
    done = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text("utf-8"))


def test_time_in_the_queue_is_not_the_jobs(alone):
    assert [status for status, _, _ in alone["queued"].values()] == ["done"] * 3
    status, message, _ = alone["doomed"]["doomed"]
    assert status == "lost", "it waited longer than its timeout, but it did not run so long"
    assert message.startswith("its worker died: ")


def test_a_hang_that_holds_the_interpreter_ends_at_its_timeout(alone):
    status, message, trace = alone["hold"]["hold"]
    assert (status, message) == ("timeout", "it took longer than 1 s and was killed")
    assert "ray_alone.py" in trace
    assert alone["left"] == []


def test_a_ray_that_is_started_here_listens_on_loopback_alone(alone):
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert alone["listening"]
    assert set(alone["listening"]) <= loopback


def test_close_ends_every_process_of_it(alone):
    assert alone["alive"] == []


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MethodError, match=r'^the executor ray needs Ray; pip install "secateur\[ray\]", or use --executor local$'
    ):
        make("ray")
