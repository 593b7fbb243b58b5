"""What a run survives: killed drivers, full disks, rivals, Ctrl-C. Every test really does it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import faulty
import pytest
from faulty import PATIENCE, chain, drive, gone, graph, node, pids, ran, until

from secateur.bench.driver import run
from secateur.bench.index import Index, read_index
from secateur.bench.nodes import Node
from secateur.bench.progress import status
from secateur.bench.store import Store, read_result
from secateur.bench.work import Job, Outcome
from secateur.errors import SecateurError

COUNT = 6


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ran.log"


@pytest.fixture
def start(tmp_path: Path, log: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a driver of ``COUNT`` pairs of nodes in a process group of its own."""
    started = []

    def begin(sleep: float = 0.3) -> subprocess.Popen:
        command = [sys.executable, faulty.__file__, str(tmp_path / "store"), str(log), str(COUNT), str(sleep)]
        started.append(subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def finish(store: Path, log: Path, sleep: float = 0.3) -> None:
    """Run the rest and check that nothing was lost and nothing counted twice."""
    nodes = chain(log, COUNT, sleep=sleep)
    before = {key for key in nodes.nodes if Store(store).done(key)}
    stamps = {key: (Store(store).folder(key) / "result.json").stat().st_mtime_ns for key in before}
    end = drive(store, nodes, workers=2)
    assert (end.done, end.cached, end.failed) == (2 * COUNT, len(before), {})
    assert sorted(Store(store).finished()) == sorted(nodes.nodes)
    assert {key: (Store(store).folder(key) / "result.json").stat().st_mtime_ns for key in before} == stamps
    assert {entry.state for entry in read_index(Store(store)).values()} == {"done"}
    assert len(read_index(Store(store))) == 2 * COUNT
    assert list(Store(store).tmp.iterdir()) == []


def test_workers_die_with_a_driver_that_is_killed_alone(start, tmp_path, log):
    driver = start(sleep=30.0)
    until(lambda: len(pids(log)) == 2)
    driver.kill()
    driver.wait()
    killed = time.monotonic()
    until(lambda: all(gone(pid) for pid in pids(log)))
    assert time.monotonic() - killed < 10, "the orphans went on with their nodes"
    assert len(ran(log)) == 2
    assert list(Store(tmp_path / "store").finished()) == []


def test_a_whole_group_that_is_killed_can_go_on(start, tmp_path, log):
    driver = start()
    until(lambda: len(ran(log)) >= 4)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finish(tmp_path / "store", log)


def test_a_driver_restarted_at_once_shares_the_store_with_its_orphans(start, tmp_path, log):
    driver = start()
    until(lambda: len(ran(log)) >= 3)
    driver.kill()
    driver.wait()
    finish(tmp_path / "store", log)
    times = Counter(ran(log))
    assert max(times.values()) <= 2, "only what ran when the driver died may run again"
    assert sum(count == 2 for count in times.values()) <= 2


def test_an_orphan_cannot_commit_after_its_folder_was_swept(tmp_path, log):
    store = Store(tmp_path / "store")
    store.make()
    one = node(log, "one")
    folder = store.begin(one.key)
    (folder / "file.txt").write_text("half")
    (folder / "owner.json").write_text('{"host": "elsewhere", "pid": 1}')
    os.utime(folder / "owner.json", (0, 0))
    store.sweep()
    assert list(store.tmp.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        store.commit(folder, one, {})
    assert not store.done(one.key)


def test_the_second_of_two_writers_is_thrown_away(tmp_path, log):
    store = Store(tmp_path / "store")
    store.make()
    one = node(log, "one")
    first, second = store.begin(one.key), store.begin(one.key)
    assert store.commit(first, one, {"who": "first"})
    assert not store.commit(second, one, {"who": "second"})
    assert '"first"' in (store.folder(one.key) / "result.json").read_text("utf-8")
    assert list(store.tmp.iterdir()) == []


def test_a_second_driver_is_refused(start, tmp_path, log):
    first = start(sleep=1.5)
    until(lambda: len(ran(log)) >= 1)
    second = start()
    assert second.wait(PATIENCE) != 0
    assert f"is in use by process {first.pid} on" in second.stderr.read()
    with pytest.raises(SecateurError, match=r"in use by process \d+ on .*; wait, or use another --store"):
        drive(tmp_path / "store", chain(log, 1))
    assert first.wait(PATIENCE) == 0
    assert sorted(ran(log)) == sorted(n.args["name"] for n in chain(log, COUNT).nodes.values())


def test_ctrl_c_leaves_a_store_that_goes_on(start, tmp_path, log):
    driver = start(sleep=0.5)
    until(lambda: len(ran(log)) >= 3)
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal does
    assert driver.wait(PATIENCE) != 0
    until(lambda: all(gone(pid) for pid in pids(log)))
    assert not {"running"} & {entry.state for entry in read_index(Store(tmp_path / "store")).values()}
    finish(tmp_path / "store", log, sleep=0.5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_full_disk_stops_the_run_and_loses_nothing(small_disk, log, executor):
    store = small_disk / "store"
    small = [node(log, f"small{i}") for i in range(3)]
    big = [node(log, f"big{i}", do="fill", megabytes=3, parents=[small[i]]) for i in range(3)]
    after = node(log, "after", parents=big)
    with pytest.raises(SecateurError, match=r"cannot write the store .*No space left.*free some space and run again: \d of 7"):
        drive(store, graph(*small, *big, after), executor)
    kept = sorted(Store(store).finished())
    assert {one.key for one in small} <= set(kept)
    assert len(kept) == 5
    with pytest.raises(SecateurError, match="5 of 7 nodes are done and stay done"):
        drive(store, graph(*small, *big, after), executor)
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    end = drive(store, graph(*small, *big, after), executor)
    assert (end.done, end.cached) == (7, 5)


def test_a_damaged_index_is_written_anew(tmp_path, log):
    store = Store(tmp_path / "store")
    nodes = chain(log, 2)
    drive(store.root, nodes)
    good = {key: (entry.state, entry.attempt, entry.seconds) for key, entry in read_index(store).items()}
    for part in store.root.glob("index.sqlite*"):
        part.unlink()
    (store.root / "index.sqlite").write_bytes(b"this is no database" * 100)
    assert read_index(store) == {}
    assert drive(store.root, nodes).cached == 4
    again = {key: (entry.state, entry.attempt, entry.seconds) for key, entry in read_index(store).items()}
    assert {key: row[:2] for key, row in again.items()} == {key: row[:2] for key, row in good.items()}
    with Index.open(store) as index:
        assert index.rebuild(store) == 4
    assert read_index(store).keys() == good.keys()


class Elsewhere:
    """An executor whose workers see another disk."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def room(self, node: Node) -> bool:
        return True

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def poll(self, seconds: float) -> list[Outcome]:
        jobs, self.jobs = self.jobs, []
        return [Outcome(job.node.key, "done", host="far-away") for job in jobs]

    def close(self) -> None: ...


def test_a_store_that_is_not_shared_is_named(tmp_path, log, monkeypatch):
    monkeypatch.setattr("secateur.bench.driver.PATIENCE", 0.2)
    with pytest.raises(SecateurError, match=r"a node that ended on far-away left no result in .*put the store on a disk"):
        run(chain(log, 1), Store(tmp_path / "store"), Elsewhere(), faulty.plan(), stages=faulty.STAGES)


def test_an_executor_without_room_is_given_up(tmp_path, log, monkeypatch):
    monkeypatch.setattr("secateur.bench.driver.STALL", 1)
    with pytest.raises(SecateurError, match="the executor had no room for a node of 1 threads for 1 s"):
        drive(tmp_path / "store", chain(log, 1), workers=0)


def test_a_folder_that_is_no_store_is_left_alone(tmp_path, log):
    precious = tmp_path / "project" / "tmp" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(SecateurError, match=r"project is no store and not empty; name a new or empty folder with --store"):
        drive(tmp_path / "project", chain(log, 1))
    assert precious.read_text() == "years of work"
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["tmp"]


def test_a_store_of_a_newer_version_is_refused(tmp_path, log):
    drive(tmp_path / "store", chain(log, 1))
    (tmp_path / "store" / "store.json").write_text('{"format": 2}')
    with pytest.raises(SecateurError, match="has format 2, and this version reads 1; update secateur"):
        drive(tmp_path / "store", chain(log, 1))


def test_half_a_node_is_replaced(tmp_path, log):
    store, nodes = Store(tmp_path / "store"), chain(log, 1)
    drive(store.root, nodes)
    hurt = next(iter(nodes.nodes))
    (store.folder(hurt) / "result.json").unlink()
    assert drive(store.root, nodes).done == 2
    assert store.done(hurt)
    assert len(ran(log)) == 3


@pytest.mark.parametrize("content", ["", "{}", "[]", '"x"', '{"values": {"rates": null}}'])
def test_a_damaged_result_is_named_and_stops_nobody_else(tmp_path, log, content):
    store, nodes = Store(tmp_path / "store"), chain(log, 2)
    drive(store.root, nodes, "inline")
    path = store.folder(next(iter(nodes.nodes))) / "result.json"
    path.write_text(content)
    (store.root / "index.sqlite").unlink()
    assert drive(store.root, nodes, "inline").cached == 4
    with pytest.raises(SecateurError, match=f"the result {path} is damaged; delete its folder and run the plan again"):
        read_result(path.parent)


@pytest.mark.parametrize("content", ["", "[]", '"x"'])
def test_a_damaged_failure_is_still_a_failure(tmp_path, log, content):
    store, bad = Store(tmp_path / "store"), node(log, "bad", do="raise")
    drive(store.root, graph(bad), "inline")
    (store.root / "failed" / f"{bad.key}.json").write_text(content)
    assert status(graph(bad), store).states[bad.key] == "failed"
    assert "unreadable record" in status(graph(bad), store).failures[bad.key]


def test_an_index_with_damaged_pages_or_another_schema_is_written_anew(tmp_path, log):
    store, nodes = Store(tmp_path / "sto#re"), chain(log, 20)
    drive(store.root, nodes, "inline")
    assert len(read_index(store)) == 40, "the path of the index may hold any character"
    path = store.root / "index.sqlite"
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 8192)
    assert drive(store.root, nodes, "inline").cached == 40
    assert len(read_index(store)) == 40
    for part in store.root.glob("index.sqlite*"):
        part.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE nodes (key TEXT PRIMARY KEY, something TEXT)")
    assert drive(store.root, nodes, "inline").cached == 40
    assert len(read_index(store)) == 40


def test_looking_at_a_store_writes_nothing(tmp_path, log):
    store, nodes = Store(tmp_path / "empty"), chain(log, 1)
    store.root.mkdir()
    assert not status(nodes, store).driven
    assert list(store.root.iterdir()) == []
