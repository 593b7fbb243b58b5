"""What nodes do with real images: roles kept apart, checkpoints that fit, sources that did not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from secateur.bench import stages
from secateur.bench.nodes import expand
from secateur.bench.plan import read_plan
from secateur.bench.source import digest
from secateur.bench.stages import Work
from secateur.bench.store import Store
from secateur.bench.work import Job, run_job
from secateur.data import load_data, save_npz
from secateur.errors import InconclusiveError, SecateurError
from secateur.poison import victim as victims
from secateur.state import generator
from secateur.train import train

PLAN = """
format = 1
[data]
name = "fashion-mini"
clean = [0.2, 0.1]
train_limit = 300
test_limit = 100
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
[train]
epochs = 3
[[repair]]
name = "fine-tuning"
epochs = 1
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN, "utf-8")
    return read_plan(tmp_path / "plan.toml")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    made.make()
    return made


def job(plan, store, stage, **facts):
    node = next(node for node in expand(plan, digest).nodes.values() if node.stage == stage)
    return replace(Job(node, f"secateur.bench.stages:{stage}", str(store.root), plan.sources), **facts)


def test_roles_are_disjoint_and_smaller_shares_lie_within_the_larger(plan, store):
    first = job(plan, store, "data")
    assert run_job(first).status == "done"
    folder = store.folder(first.node.key)
    clean = load_data(folder / "clean.npz")
    assert len(clean) == 60
    victim = job(plan, store, "victim")
    work = Work(victim.node, Path(), {"data": folder}, victim.source, Path())
    seen = {image.numpy().tobytes() for image in stages._training_images(work).x}
    assert not seen & {image.numpy().tobytes() for image in clean.x}
    assert len(seen) > 230
    smaller = {image.numpy().tobytes() for image in stages._clean(work, 0.1).x}
    assert len(smaller) == 30
    assert smaller < {image.numpy().tobytes() for image in clean.x}


def test_test_images_that_were_seen_before_are_refused(plan, store):
    same = replace(plan, data=replace(plan.data, train="fashion-mini:test", test="fashion-mini:test"))
    outcome = run_job(job(same, store, "data"))
    assert outcome.status == "failed"
    assert outcome.message.startswith("DataError: ")
    assert "test images are also training or clean images; give others in [data]" in outcome.message


def test_images_that_changed_under_a_run_are_noticed(plan, store, tmp_path):
    images = load_data("fashion-mini:train", limit=300)
    test = load_data("fashion-mini:test", limit=100)
    save_npz(images, tmp_path / "train.npz")
    save_npz(test, tmp_path / "test.npz")
    own = replace(plan, data=replace(plan.data, train=f"{tmp_path}/train.npz", test=f"{tmp_path}/test.npz"))
    assert run_job(job(own, store, "data")).status == "done"
    victim = job(own, store, "victim")
    save_npz(images.subset(torch.randperm(300, generator=generator(9))), tmp_path / "train.npz")
    outcome = run_job(victim)
    assert (outcome.status, "changed after the data node ran" in outcome.message) == ("failed", True)


def test_a_checkpoint_of_another_batch_size_is_not_resumed(plan, store, monkeypatch):
    """Out of memory, half a batch, killed, run again: the weights must be those of a full batch or of a half, never of both."""
    assert run_job(job(plan, store, "data")).status == "done"
    half = job(plan, store, "victim", batch_scale=0.5)

    def stop(epoch: int, *_: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(victims, "train", lambda *args, **kwargs: train(*args, **kwargs, on_epoch=stop))
        with pytest.raises(KeyboardInterrupt):
            run_job(half)
    [left] = store.checkpoints.iterdir()
    assert left.name.endswith("-0.5")
    assert (left / "training").is_file()
    full = job(plan, store, "victim")
    assert run_job(full).status == "done"
    undisturbed = Store(store.root.parent / "undisturbed")
    undisturbed.make()
    for stage in ("data", "victim"):
        assert run_job(job(plan, undisturbed, stage)).status == "done"
    weights = [(s.folder(full.node.key) / "model" / "model.safetensors").read_bytes() for s in (store, undisturbed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_costs_only_time(plan, store, content):
    assert run_job(job(plan, store, "data")).status == "done"
    victim = job(plan, store, "victim")
    folder = store.checkpoints / victim.node.key
    folder.mkdir()
    (folder / "training").write_bytes(content)
    (folder / "training-1").write_bytes(content)  # of an earlier part of an attacker's training
    assert run_job(victim).status == "done"
    assert list(store.checkpoints.iterdir()) == []


def test_the_digest_follows_links_as_the_reader_does(tmp_path):
    for place, pixel in (("a", b"cat"), ("b", b"dog")):
        real = tmp_path / f"real-{place}"
        real.mkdir()
        (real / "x.png").write_bytes(pixel)
        (tmp_path / place).mkdir()
        (tmp_path / place / "class").symlink_to(real, target_is_directory=True)
    assert digest(str(tmp_path / "a")) != digest(str(tmp_path / "b"))


def test_a_share_of_no_image_is_inconclusive(plan, store):
    assert run_job(job(plan, store, "data")).status == "done"
    victim = job(plan, store, "victim")
    work = Work(victim.node, Path(), {"data": store.folder(victim.node.parents["data"])}, victim.source, Path())
    with pytest.raises(InconclusiveError, match=r"a clean share of 0\.0001 is no image at all; raise it"):
        stages._clean(work, 0.0001)


OWN = """
from torch import nn
def make():
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 10))
"""


@pytest.fixture
def own_plan(tmp_path):
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    (tmp_path / "plan.toml").write_text(PLAN.replace('"convnet"\nwidth = 4', '"own.py:make"'), "utf-8")
    return read_plan(tmp_path / "plan.toml")


def test_networks_of_ones_own(own_plan, store):
    for stage in ("data", "victim", "repair", "measure"):
        outcome = run_job(job(own_plan, store, stage))
        assert outcome.status == "done", outcome.message
    assert own_plan.models[0].label == "own.py:make"


def test_code_is_run_only_if_the_plan_names_it(own_plan, store):
    for stage in ("data", "victim"):
        assert run_job(job(own_plan, store, stage)).status == "done"
    plain = job(own_plan, store, "repair", source={"train": own_plan.data.train, "test": own_plan.data.test})
    outcome = run_job(plain)
    assert outcome.status == "failed"
    assert "needs its author's code" in outcome.message


def test_changed_code_is_another_network(own_plan, tmp_path):
    before = set(expand(own_plan, digest).nodes)
    (tmp_path / "own.py").write_text(OWN + "# changed\n", "utf-8")
    after = set(expand(read_plan(tmp_path / "plan.toml"), digest).nodes)
    assert len(before & after) == 1  # the data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"missing.py:make"', "cannot read missing.py"),
        ('"own.py:make"\nwidth = 4', "unknown key of ..model.. own.py:make 'width'"),
    ],
)
def test_own_networks_are_checked_before_anything_runs(own_plan, tmp_path, line, message):
    (tmp_path / "bad.toml").write_text(PLAN.replace('"convnet"\nwidth = 4', line), "utf-8")
    with pytest.raises(SecateurError, match=message):
        read_plan(tmp_path / "bad.toml")


def test_suspect_images_carry_the_trigger_as_the_training_set_does(tmp_path, store):
    text = PLAN.replace('name = "fine-tuning"\nepochs = 1', 'name = "ep"').replace("epochs = 3", "epochs = 1")
    (tmp_path / "plan.toml").write_text(text, "utf-8")
    plan = read_plan(tmp_path / "plan.toml")
    for stage in ("data", "victim", "repair"):
        assert run_job(job(plan, store, stage)).status == "done"
    repair = job(plan, store, "repair")
    parents = {role: store.folder(key) for role, key in repair.node.parents.items()}
    work = Work(repair.node, Path(), parents, repair.source, Path())
    suspect, images = stages._suspect(work, 60), stages._training_images(work)
    known = {image.numpy().tobytes() for image in images.x}
    changed = [image.numpy().tobytes() not in known for image in suspect.x]
    assert len(suspect) == 60
    assert sum(changed) == 6  # a rate of 0.1
    assert suspect.y[torch.tensor(changed)].unique().tolist() == [0]


def patched(folder, name, value):
    folder.mkdir()
    Image.new("RGB", (3, 3), (value, 0, 0)).save(folder / name)
    text = PLAN.replace('name = "badnets"', f'name = "badnets"\npattern = "{name}"\nlabel = "p"')
    (folder / "plan.toml").write_text(text, "utf-8")
    return read_plan(folder / "plan.toml")


def test_a_file_that_a_setting_names_counts_by_what_is_in_it(tmp_path, store):
    """Not by where it lies; and a node gets it from there."""
    one, same, other = (patched(tmp_path / folder, f"{folder}.png", value) for folder, value in (("a", 9), ("b", 9), ("c", 8)))
    keys = [{key for key, node in expand(plan, digest).nodes.items() if node.stage == "victim"} for plan in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
    node = next(node for node in expand(one, digest).nodes.values() if node.stage == "victim")
    work = Work(node, tmp_path, {}, one.sources, tmp_path / "checkpoint")
    assert work.settings["pattern"] == str(tmp_path / "a" / "a.png")
    assert {name: value for name, value in work.settings.items() if name != "pattern"} == {
        name: value for name, value in node.args["settings"].items() if name != "pattern"
    }


def test_a_folder_that_a_setting_names_counts_by_all_files_in_it(tmp_path):
    text = PLAN.replace('name = "fine-tuning"\nepochs = 1', 'name = "onp"\npolicy = "p"\nlabel = "o"')
    (tmp_path / "plan.toml").write_text(text, "utf-8")

    def key():
        nodes = expand(read_plan(tmp_path / "plan.toml"), digest).nodes
        return next(key for key, node in nodes.items() if node.stage == "repair")

    assert read_plan(tmp_path / "plan.toml").repairs[0].settings["policy"] == "p"  # nothing is there
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "policy.json").write_text("{}")
    first = key()
    assert key() == first
    (tmp_path / "p" / "policy.safetensors").write_bytes(b"1")
    assert key() != first


@pytest.mark.parametrize("value", ["5", '"a\\u0000b"', '""'])
def test_what_can_be_no_path_is_no_file(tmp_path, value):
    (tmp_path / "plan.toml").write_text(PLAN.replace('name = "badnets"', f'name = "badnets"\npattern = {value}'), "utf-8")
    assert read_plan(tmp_path / "plan.toml").backdoors[0].files == {}


def test_a_setting_that_is_called_like_a_role_is_no_file(tmp_path, plan):
    node = next(node for node in expand(plan, digest).nodes.values() if node.stage == "repair")
    node = replace(node, args={"settings": {"a": "train", "b": 1}})
    assert Work(node, tmp_path, {}, plan.sources, tmp_path).settings == {"a": "train", "b": 1}
