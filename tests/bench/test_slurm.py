"""The Slurm executor, driven through stand-ins for sbatch, squeue and scancel that really start and kill processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import PATIENCE, gone, until

from secateur.bench.driver import Progress, run
from secateur.bench.executors import make
from secateur.bench.executors.slurm import Slurm, read_job, run_node, script
from secateur.bench.nodes import Graph, Node, canonical_json, expand
from secateur.bench.plan import Plan, read_plan
from secateur.bench.source import digest
from secateur.bench.store import Store, read_result
from secateur.bench.work import Job, Outcome
from secateur.errors import MethodError, SecateurError

PLAN = """
format = 1
[data]
name = "fashion-mini"
train_limit = 200
test_limit = 50
clean = 0.2
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
[train]
epochs = 1
"""
SBATCH = r"""
number = len(list(HERE.glob("*.sbatch"))) + 1
assert sys.argv[1] == "--parsable" and sys.argv[3] == "array.sh", sys.argv
output = sys.argv[2].removeprefix("--output=").replace("%a", "{task}").replace("%%", "%")
(HERE / f"{number}.sbatch").write_text(Path("array.sh").read_text())
if (HERE / "refuse").exists():
    complaint = (HERE / "refuse").read_text()
    if complaint.startswith("once "):
        (HERE / "refuse").unlink()
    sys.exit(f"sbatch: a first line\nsbatch: error: {complaint}")
count = int(re.search(r"#SBATCH --array=1-(\d+)$", Path("array.sh").read_text(), re.M)[1])
for task in range(1, count + 1):
    if (HERE / "swallow").exists():
        (HERE / "swallow").rename(output.format(task=task))
        continue
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    with open(output.format(task=task), "w") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        child = subprocess.Popen(["bash", "array.sh"], env=environment, start_new_session=True, **streams)
    (HERE / f"{number}_{task}.pid").write_text(str(child.pid))
print(number)
"""
SQUEUE = r"""
if (HERE / "silent").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
assert sys.argv[1:] == ["--noheader", "--array", "--format=%i", f"--user={os.getuid()}"], sys.argv
for path in HERE.glob("*.pid"):
    try:
        state = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        continue
    if state not in "ZX":
        print(path.stem)
"""
SCANCEL = r"""
for task in sys.argv[1:]:
    with open(HERE / "cancelled", "a") as file:
        file.write(task + "\n")
    try:
        os.killpg(int((HERE / f"{task}.pid").read_text()), 9)
    except OSError:
        pass
"""
HEADER = "#!{python} -IS\nimport os, re, subprocess, sys\nfrom pathlib import Path\nHERE = Path({here!r})\n"


class Cluster:
    """The stand-ins' folder: what they wrote, and how they are told to misbehave."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name, body in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            path = home / name
            path.write_text(HEADER.format(python=sys.executable, here=str(home)) + body, "utf-8")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def tell(self, name: str, text: str = "") -> None:
        (self.home / name).write_text(text, "utf-8")

    def scripts(self) -> list[str]:
        return [path.read_text("utf-8") for path in sorted(self.home.glob("*.sbatch"), key=lambda path: int(path.stem))]

    def cancelled(self) -> list[str]:
        path = self.home / "cancelled"
        return path.read_text("utf-8").split() if path.exists() else []

    def pids(self) -> list[int]:
        return [int(path.read_text("utf-8")) for path in self.home.glob("*.pid")]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    home = tmp_path / "cluster"
    home.mkdir()
    monkeypatch.setenv("PATH", str(home), prepend=os.pathsep)
    found = Cluster(home)
    yield found
    for pid in found.pids():
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(PLAN, "utf-8")
    return read_plan(path)


@pytest.fixture(scope="module")
def nodes(plan: Plan) -> Graph:
    return expand(plan, digest)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store whose path no shell should see unquoted."""
    store = Store(tmp_path / "a 'st$ore' %j; \"#1")
    store.make()
    return store


@pytest.fixture
def job(nodes: Graph, plan: Plan, store: Store) -> Job:
    """The data node's: light, and without parents."""
    node = next(node for node in nodes.nodes.values() if node.stage == "data")
    source = {"train": plan.data.train, "test": plan.data.test}
    return Job(node, "secateur.bench.stages:data", str(store.root), source)


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Slurm]:
    """An executor without patience."""
    executor = Slurm(patience=0.2)
    yield executor
    executor.close()


def drive(nodes: Graph, store: Store, plan: Plan, executor: Slurm) -> Progress:
    try:
        return run(nodes, store, executor, plan)
    finally:
        executor.close()


def one(executor: Slurm, job: Job) -> Outcome:
    executor.submit(job)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if outcomes := executor.poll(0.5):
            [outcome] = outcomes
            return outcome
    raise AssertionError("waited in vain")


def test_a_plan_runs_to_its_end_in_arrays(cluster, slurm, store, plan, nodes):
    end = drive(nodes, store, plan, slurm)
    assert (end.done, end.total, end.failed, end.skipped) == (len(nodes.nodes), len(nodes.nodes), {}, 0)
    assert sorted(store.finished()) == sorted(nodes.nodes)
    assert len(cluster.scripts()) == 3, "data, victim, measure"
    assert list(store.queue.iterdir()) == [], "nothing is left in the queue"
    assert list(store.tmp.iterdir()) == []
    assert cluster.cancelled() == []
    again = drive(nodes, store, plan, Slurm())
    assert (again.done, again.cached, len(cluster.scripts())) == (end.done, end.done, 3)


def test_nodes_that_are_ready_together_are_one_array(cluster, slurm, job):
    jobs = [other_seed(job, seed) for seed in range(2)] + [replace(other_seed(job, 2), memory=2**33)]
    for ready in jobs:
        assert slurm.room(ready.node)
        slurm.submit(ready)
    found: list[Outcome] = []
    until(lambda: found.extend(slurm.poll(0.5)) or len(found) == 3)
    assert {outcome.key: outcome.status for outcome in found} == {job.node.key: "done" for job in jobs}
    assert [text.count("--array=1-2\n") for text in cluster.scripts()] == [1, 0]
    assert [text.count("--mem=10240M\n") for text in cluster.scripts()] == [0, 1]


def test_room_ends_at_the_number_of_workers(cluster, job):
    executor = Slurm(workers=2)
    executor.submit(job)
    assert executor.room(job.node)
    executor.submit(other_seed(job, 1))
    assert not executor.room(job.node)
    executor.close()


def test_a_script_says_what_its_nodes_need():
    node = Node("victim", threads=4, device="cuda")
    job = Job(node, "secateur.bench.stages:victim", "/store", timeout=90.0, memory=2**30)
    text = script(Path("/it's $HOME/`x`/%j"), [job, job], ["--partition=long", "--account=a b"])
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        *("--job-name=secateur", "--array=1-2", "--ntasks=1", "--cpus-per-task=4", "--gres=gpu:1"),
        *("--time=7", "--mem=7168M", "--partition=long", "--account=a b"),
    ]
    assert "export OMP_NUM_THREADS=4\n" in text
    shell = text.partition("key=")[0] + 'printf "%s" "$folder"'
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout == "/it's $HOME/`x`/%j"
    plain = script(Path("/store"), [replace(job, node=Node("measure"), timeout=None, memory=None)])
    assert not any(word in plain for word in ("--gres", "--time", "--mem"))


def test_a_node_that_raises_says_why(slurm, job):
    outcome = one(slurm, replace(job, source={"train": "nowhere.npz", "test": "nowhere.npz"}))
    assert outcome.status == "failed"
    assert outcome.message.startswith("DataError: ")
    assert "nowhere.npz" in outcome.message
    assert "stages.py" in outcome.traceback
    assert outcome.pid not in (0, os.getpid())


def test_a_node_ends_itself_at_its_timeout(slurm, job):
    outcome = one(slurm, replace(job, timeout=0.001))
    assert (outcome.status, outcome.message) == ("timeout", "it took longer than 0.001 s and was killed")
    assert not Store(job.store).done(job.node.key)


def test_a_task_that_disappears_costs_one_attempt(cluster, slurm, store, plan, nodes):
    cluster.tell("swallow")
    [(key, node)] = [(key, node) for key, node in nodes.nodes.items() if node.stage == "data"]
    end = drive(Graph({key: node}, ()), store, plan, slurm)
    assert (end.done, end.failed) == (1, {})
    assert read_result(store.folder(key))["attempt"] == 2
    assert cluster.cancelled() == ["1_1"], "it must not come back to life beside its successor"


def test_a_killed_task_is_lost(cluster, slurm, job):
    slurm.submit(job)
    assert slurm.poll(0.1) == []
    [pid] = cluster.pids()
    os.killpg(pid, signal.SIGKILL)
    found: list[Outcome] = []
    until(lambda: found.extend(slurm.poll(0.5)) or found)
    assert (found[0].status, found[0].message) == ("lost", "Slurm's task 1_1 ended without an outcome")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks have been OOM Killed.",
            "memory",
        ),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in step 7.batch cgroup.", "memory"),
        ("slurmstepd-a: error: StepId=7.batch exceeded memory limit (236019712 > 104857600), being killed", "memory"),
        ("slurmstepd-a: error: *** JOB 7 ON a CANCELLED AT 2026-11-21T08:25:38 DUE TO TIME LIMIT ***", "timeout"),
        ("slurmstepd-a: error: *** JOB 7 ON a CANCELLED AT 2026-11-21T08:25:38 DUE TO NODE FAILURE ***", "lost"),
    ],
)
def test_what_slurm_writes_into_the_log_tells_why_it_killed_a_task(cluster, slurm, job, words, status):
    cluster.tell("swallow", f"an earlier line\n{words}\n")
    outcome = one(slurm, job)
    assert (outcome.status, outcome.message) == (status, f"Slurm's task 1_1 ended without an outcome: {words}")


def test_nothing_is_lost_while_squeue_does_not_answer(cluster, slurm, job):
    cluster.tell("silent")
    cluster.tell("swallow")
    slurm.submit(job)
    assert slurm.poll(1.5) == []
    (cluster.home / "silent").unlink()
    found: list[Outcome] = []
    until(lambda: found.extend(slurm.poll(0.5)) or found)
    assert found[0].status == "lost"


def test_a_result_without_an_outcome_counts(cluster, slurm, job, nodes):
    slurm.submit(job)
    assert slurm.poll(0.0) == []
    [folder] = Store(job.store).queue.iterdir()
    (folder / f"{job.node.key}.outcome.json").mkdir()  # so that the task cannot leave one
    until(lambda: all(gone(pid) for pid in cluster.pids()))
    (folder / f"{job.node.key}.outcome.json").rmdir()
    [outcome] = slurm.poll(5.0)
    assert outcome.status == "done"
    assert outcome.seconds > 0
    assert outcome.host


def test_close_kills_what_runs(cluster, slurm, job):
    slurm.submit(replace(job, source={"train": "fashion-mini:train", "test": "fashion-mini:test"}))
    slurm.poll(0.0)
    [pid] = cluster.pids()
    assert not gone(pid)
    slurm.close()
    until(lambda: gone(pid))
    assert cluster.cancelled() == ["1_1"]
    assert not any(Store(job.store).queue.glob("*/id"))


def test_the_tasks_of_a_killed_driver_are_taken_up(cluster, slurm, job):
    other = other_seed(job, 1)
    for each in (job, other):
        slurm.submit(each)
    slurm.poll(0.0)
    heir = Slurm(patience=0.2)
    heir.submit(job)
    heir.submit(replace(other, batch_scale=0.5))
    found: list[Outcome] = []
    until(lambda: found.extend(heir.poll(0.5)) or len(found) == 2)
    assert {outcome.status for outcome in found} == {"done"}
    assert cluster.cancelled() == ["1_2"], "what would do something else is cancelled"
    assert [text.count("--array=1-1\n") for text in cluster.scripts()] == [0, 1]


def test_what_a_killed_driver_left_is_removed_once_its_tasks_are_gone(cluster, slurm, job):
    cluster.tell("swallow")
    slurm.submit(job)
    slurm.poll(0.0)
    [old] = Store(job.store).queue.iterdir()
    heir = Slurm(patience=0.2)
    heir.submit(job)
    assert not old.exists()


def test_what_sbatch_refuses_ends_the_run_with_its_words(cluster, slurm, store, plan, nodes):
    cluster.tell("refuse", "Batch job submission failed: Invalid partition name specified")
    with pytest.raises(
        SecateurError,
        match=r"^sbatch refused .*array\.sh: sbatch: error: Batch job submission failed: "
        r"Invalid partition name specified; check --slurm, --workers and the plan's limits$",
    ):
        drive(nodes, store, plan, slurm)
    assert len(cluster.scripts()) == 1


def test_sbatch_is_asked_again_after_a_passing_fault(cluster, slurm, job, monkeypatch):
    monkeypatch.setattr("secateur.bench.executors.slurm.PAUSES", (0.1,))
    cluster.tell("refuse", "once Socket timed out on send/recv operation")
    slurm.submit(job)
    slurm.poll(0.0)
    assert len(cluster.pids()) == 1
    cluster.tell("refuse", "Socket timed out on send/recv operation")
    with pytest.raises(SecateurError, match=r"^sbatch refused .*Socket timed out"):
        one(slurm, other_seed(job, 1))
    assert len(cluster.scripts()) == 4


def test_missing_commands_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    remedy = "run it on a login node of the cluster, or use --executor local"
    with pytest.raises(MethodError, match=f"^the executor slurm needs sbatch, squeue, scancel on the PATH; {remedy}$"):
        make("slurm", workers=2, threads=1)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("partition=long", "an option for sbatch must be like '--partition=long', got 'partition=long'"),
        ("--comment=x\nrm -rf /", "an option for sbatch must be like"),
        ("--array=1-5", "--array of sbatch is not for you to set here; leave it out"),
        ("-a 1-5", "-a of sbatch is not for you to set here"),
        ("-a1-5", "-a1-5 of sbatch is not for you to set here"),
        ("--clusters=all", "--clusters of sbatch is not for you to set here"),
    ],
)
def test_options_for_sbatch_are_checked(cluster, option, words):
    with pytest.raises(MethodError) as caught:
        Slurm(options=[option])
    assert str(caught.value).startswith(words)


def test_only_secateurs_own_stages_run(slurm, job):
    with pytest.raises(MethodError, match=r"runs Secateur's own stages, got 'os:system'; use --executor local"):
        slurm.submit(replace(job, target="os:system"))


def test_a_file_in_the_queue_cannot_name_code(cluster, slurm, job, tmp_path):
    slurm.submit(job)
    slurm.poll(0.0)
    [folder] = Store(job.store).queue.iterdir()
    key = job.node.key
    read = read_job(folder, key)
    assert (replace(read, node=job.node), read.node.config) == (job, job.node.config)
    path = folder / f"{key}.json"
    good = json.loads(path.read_text("utf-8"))
    bad = [
        ({**good, "target": "os:system"}, "its fields must be"),
        ({**good, "node": {**good["node"], "seed": 7}}, "it describes another node"),
        ({**good, "node": {**good["node"], "target": "os:system"}}, "unexpected keyword argument"),
        (["target"], "its fields must be"),
    ]
    for content, words in bad:
        path.write_text(canonical_json(content), "utf-8")
        with pytest.raises(SecateurError, match=words):
            run_node(folder, key)
    foreign = Node("work", args={"log": str(tmp_path)})
    (folder / f"{foreign.key}.json").write_text(canonical_json({**good, "node": foreign.config}), "utf-8")
    with pytest.raises(SecateurError, match="it describes another node"):
        run_node(folder, foreign.key)
    with pytest.raises(SecateurError, match=r"cannot run the job .*No such file.*; run secateur bench run again"):
        run_node(folder, "0" * 64)


def other_seed(job: Job, seed: int) -> Job:
    return replace(job, node=replace(job.node, seed=100 + seed))
