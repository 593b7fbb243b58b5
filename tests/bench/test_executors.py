"""The conformance suite: every executor must pass it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import faulty
import pytest
from faulty import chain, graph, node, ran

from secateur.bench.driver import Progress
from secateur.bench.executors import EXECUTORS, make
from secateur.bench.nodes import Graph, Node, canonical_json, expand
from secateur.bench.plan import Plan, read_plan
from secateur.bench.source import digest
from secateur.bench.store import Store, read_result
from secateur.errors import MethodError

ISOLATED = ("local", pytest.param("ray", marks=pytest.mark.ray))
ALL = ("inline", *ISOLATED)
Drive = Callable[..., Progress]
TINY = """
format = 1
[data]
name = "fashion-mini"
clean = 0.2
train_limit = 600
test_limit = 200
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
[[backdoor]]
name = "none"
[train]
epochs = 1
[[repair]]
name = "norm-pruning"
fraction = 0.25
epochs = 1
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a real Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from ray_cluster import two_nodes

    with two_nodes() as found:
        yield found.address


@pytest.fixture
def drive(request: pytest.FixtureRequest, tmp_path: Path) -> Drive:
    """Run a graph on the executor that the test is parametrised with."""
    name = request.param
    options = {"address": request.getfixturevalue("cluster")} if name == "ray" else {} if name == "inline" else {"workers": 2}

    def run(nodes: Graph, *, real: Plan | None = None, **limits: object) -> Progress:
        return faulty.drive(tmp_path / "store", nodes, name, real=real, limits=limits, **options)

    return run


everywhere = pytest.mark.parametrize("drive", ALL, indirect=True)
where_isolated = pytest.mark.parametrize("drive", ISOLATED, indirect=True)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ran.log"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@everywhere
def test_every_node_runs_once_and_after_its_parents(drive, store, log):
    nodes = chain(log, 5)
    end = drive(nodes)
    assert (end.done, end.total, end.cached, end.failed, end.skipped) == (10, 10, 0, {}, 0)
    assert sorted(ran(log)) == sorted(node.args["name"] for node in nodes.nodes.values())
    for key, one in nodes.nodes.items():
        result = read_result(store.folder(key))
        assert result["values"] == {"name": one.args["name"], "batch": 512}
        assert (result["attempt"], result["batch_scale"]) == (1, 1.0)
        assert json.loads((store.folder(key) / "config.json").read_text("utf-8")) == one.config
        assert sorted(path.name for path in store.folder(key).iterdir()) == ["config.json", "file.txt", "result.json"]
    assert list(store.tmp.iterdir()) == []


@everywhere
def test_a_second_run_does_nothing_and_a_wider_plan_only_what_is_new(drive, log):
    drive(chain(log, 2))
    again = drive(chain(log, 2))
    assert (again.done, again.cached, len(ran(log))) == (4, 4, 4)
    wider = drive(chain(log, 3))
    assert (wider.done, wider.cached) == (6, 4)
    assert sorted(ran(log)[4:]) == ["first2", "second2"]


@everywhere
def test_a_node_that_raises_fails_alone(drive, store, log):
    bad = node(log, "bad", do="raise")
    after = node(log, "after", parents=[bad])
    end = drive(graph(bad, after, *chain(log, 2).nodes.values()))
    assert (end.done, list(end.failed), end.skipped) == (4, [bad.key], 1)
    failure = store.failures()[bad.key]
    assert failure["message"] == "ValueError: this node raises on two lines"
    assert "faulty.py" in failure["traceback"]
    assert failure["attempt"] == 1
    assert ran(log).count("bad") == 1
    assert "after" not in ran(log)


@everywhere
def test_the_next_run_tries_failed_nodes_again(drive, store, log):
    bad = node(log, "bad", do="raise once")
    nodes = graph(bad, node(log, "after", parents=[bad]))
    assert drive(nodes).done == 0
    assert drive(nodes).done == 2
    assert store.failures() == {}


@everywhere
def test_out_of_memory_is_tried_once_more_at_half_batch(drive, store, log):
    greedy = node(log, "greedy", do="memory", megabytes=256)
    wrapped = node(log, "wrapped", do="wrapped memory")
    end = drive(graph(greedy, wrapped), memory=256 * 2**20)
    assert end.done == 2
    for one in (greedy, wrapped):
        result = read_result(store.folder(one.key))
        assert (result["attempt"], result["batch_scale"], result["values"]["batch"]) == (2, 0.5, 256)


@everywhere
def test_out_of_memory_twice_is_a_failure(drive, store, log):
    greedy = node(log, "greedy", do="memory always", megabytes=256)
    end = drive(graph(greedy, node(log, "modest")), memory=256 * 2**20)
    assert (end.done, list(end.failed)) == (1, [greedy.key])
    assert store.failures()[greedy.key]["status"] == "memory"
    assert ran(log).count("greedy") == 2


@where_isolated
def test_a_killed_worker_costs_one_attempt(drive, store, log):
    unlucky = node(log, "unlucky", do="die once")
    end = drive(graph(unlucky, *chain(log, 2).nodes.values()))
    assert (end.done, end.failed) == (5, {})
    assert read_result(store.folder(unlucky.key))["attempt"] == 2
    assert ran(log).count("unlucky") == 2


@where_isolated
def test_a_node_that_always_dies_fails_at_last(drive, store, log):
    doomed = node(log, "doomed", do="die")
    end = drive(graph(doomed, node(log, "fine")))
    assert (end.done, list(end.failed)) == (1, [doomed.key])
    assert ran(log).count("doomed") == 3
    assert store.failures()[doomed.key]["status"] == "lost"


@where_isolated
def test_a_node_that_hangs_is_killed_at_its_timeout(drive, store, log):
    slow = node(log, "slow", do="hang")
    end = drive(graph(slow, node(log, "after", parents=[slow]), node(log, "fine")), timeout=1.5)
    assert (end.done, list(end.failed), end.skipped) == (1, [slow.key], 1)
    assert store.failures()[slow.key]["message"] == "it took longer than 1.5 s and was killed"
    assert 1.0 < store.failures()[slow.key]["seconds"] < 20


def test_an_unknown_executor_is_named():
    with pytest.raises(MethodError, match=r"unknown executor 'locl'; did you mean 'local'\?"):
        make("locl")
    assert set(EXECUTORS) == {"inline", "local", "ray", "slurm"}


@everywhere
def test_real_stages_give_the_same_files_everywhere(drive, store, tiny_results):
    plan, graph, expected = tiny_results
    assert drive(graph, real=plan).done == len(graph.nodes)
    assert contents(store, graph) == expected


@pytest.fixture(scope="module")
def tiny_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Graph, dict[str, bytes]]:
    """A small plan of real stages, and what the inline executor makes of it."""
    home = tmp_path_factory.mktemp("tiny")
    (home / "tiny.toml").write_text(TINY, "utf-8")
    plan = read_plan(home / "tiny.toml")
    graph = expand(plan, digest)
    faulty.drive(home / "store", graph, "inline", real=plan)
    return plan, graph, contents(Store(home / "store"), graph)


def contents(store: Store, graph: Graph) -> dict[str, bytes]:
    """Return what every node wrote, and of its result the values."""
    found = {}
    for key in graph.nodes:
        folder = store.folder(key)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        files["result.json"] = canonical_json(read_result(folder)["values"]).encode()
        found.update({f"{key}/{name}": content for name, content in files.items() if not name.endswith(".npz")})
    return found


def test_gpus_are_shared_out_one_to_a_node(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    local = make("local", workers=4)
    on_gpu, on_cpu = Node("work", device="cuda"), Node("work")
    assert local.room(on_gpu)
    assert local._gpus == ["3", "5"]
    local._gpus.clear()  # as when both are in use
    assert not local.room(on_gpu)
    assert local.room(on_cpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MethodError, match='the plan wants a GPU and none was found here; write device = "cpu"'):
        make("local").room(on_gpu)
    assert make("local", gpus=2)._gpus == ["0", "1"]


def test_a_node_sees_the_gpu_it_was_given(store, log, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    one = replace(node(log, "one", do="tell gpu"), device="cuda")
    faulty.drive(store.root, graph(one), "local")
    assert read_result(store.folder(one.key))["values"]["gpu"] == "7"
