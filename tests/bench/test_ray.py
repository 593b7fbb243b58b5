"""What only Ray can do: lose a whole node."""

from __future__ import annotations

import threading
import time

import pytest
from faulty import chain, drive, ran

from secateur.bench.store import Store, read_result

pytestmark = pytest.mark.ray


def test_a_node_that_is_lost_costs_one_attempt(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from ray_cluster import two_nodes

    log, store = tmp_path / "ran.log", Store(tmp_path / "store")
    pairs = chain(log, 2, sleep=3.0)
    with two_nodes() as cluster:
        leaver = next(iter(cluster.worker_nodes))

        def leave() -> None:
            end = time.monotonic() + 60
            while len(ran(log)) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            cluster.remove_node(leaver, allow_graceful=False)

        thread = threading.Thread(target=leave)
        thread.start()
        end = drive(store.root, pairs, "ray")
        thread.join()
    assert (end.done, end.failed) == (4, {})
    assert sorted(store.finished()) == sorted(pairs.nodes)
    assert sorted(read_result(store.folder(key))["attempt"] for key in pairs.nodes) == [1, 1, 1, 2]
    assert len(ran(log)) == 5
