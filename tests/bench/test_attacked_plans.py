"""Plans that attack: somebody's checkpoint as the victim, images made on each network and on others, and what they leave."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from secateur.bench.driver import run
from secateur.bench.executors import make
from secateur.bench.layout import render
from secateur.bench.nodes import expand
from secateur.bench.plan import read_plan
from secateur.bench.source import digest as digest_of
from secateur.bench.store import Store
from secateur.bench.tables import rows
from secateur.data import load_data
from secateur.errors import DataError, SecateurError
from secateur.measure import correct
from secateur.models import core, load_bundle, quantisation_of, save
from secateur.prune.edits import adaptives
from secateur.runs import evading, new_network
from secateur.state import generator
from secateur.train import Recipe, train

PLAN = """
format = 1
[data]
name = "fashion-mini"
clean = 0.2
train_limit = 400
test_limit = 150
[[model]]
checkpoint = "net"
label = "theirs"
[[backdoor]]
name = "none"
[[repair]]
name = "fine-tuning"
epochs = 1
[measure]
metrics = ["accuracy"]
[evasion]
name = "pgd"
eps = "24/255"
steps = 4
images = 60
twin = true
[[surrogate]]
name = "convnet"
width = 4
label = "Another one"
seed = 3
[train]
epochs = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("plans"), load_data("fashion-mini:train", limit=600)
    network = new_network(images, "convnet", kwargs={"width": 4}, generator=generator(0))
    save(train(network, images, Recipe(epochs=4, batch_size=32), generator=generator(0)), folder / "net")
    return folder


@pytest.fixture
def plan(home):
    return _written(home, PLAN)


def _written(home, text):
    (home / "plan.toml").write_text(text, "utf-8")
    return read_plan(home / "plan.toml")


def test_what_each_network_is_attacked_by(plan):
    graph = expand(plan, digest_of)
    assert plan.metrics == (
        "accuracy", "white_box", "transfer_parent", "transfer_another_one", "transfer_twin", "worst_transfer", "to_parent",
    )  # fmt: skip
    before, after = graph.cells
    victim, repaired = after.keys[:2]
    measured = graph.nodes[after.keys[-1]].parents
    assert measured["parent"] == victim
    sources = {metric: graph.nodes[graph.nodes[key].parents["model"]] for metric, key in measured.items() if "_" in metric}
    assert {metric: (node.stage, node.method, node.seed) for metric, node in sources.items()} == {
        "white_box": ("repair", "fine-tuning", 0),
        "transfer_parent": ("victim", "none", 0),
        "transfer_another_one": ("victim", "none", 3),
        "transfer_twin": ("repair", "fine-tuning", 1),
    }
    assert sources["white_box"].key == repaired
    assert sources["transfer_another_one"].args["recipe"]["epochs"] == 2
    assert sources["transfer_parent"].args["recipe"] == {}
    assert graph.nodes[measured["white_box"]].args["settings"]["eps"] == pytest.approx(24 / 255)
    assert set(graph.nodes[before.keys[-1]].parents) == {"model", "data", "white_box", "transfer_another_one"}


def test_a_surrogate_is_attacked_once_for_all_victim_seeds(home):
    graph = expand(_written(home, PLAN.replace("format = 1", "format = 1\nvictim_seeds = [0, 1]")), digest_of)
    attacked = {graph.nodes[cell.keys[-1]].parents["transfer_another_one"] for cell in graph.cells}
    assert len(graph.cells) == 4
    assert len(attacked) == 1


def test_rates_under_attack_are_those_of_the_images_kept(plan, tmp_path):
    store = Store(tmp_path / "store")
    graph = expand(plan, digest_of)
    assert not run(graph, store, make("inline"), plan).failed
    before, after = rows(graph, store)
    node = graph.nodes[after.cell.keys[-1]]
    model = load_bundle(store.folder(after.cell.keys[1]) / "model")
    parent = load_bundle(store.folder(after.cell.keys[0]) / "model")
    made = {name: load_data(store.folder(key) / "adversarial.npz") for name, key in node.parents.items() if "_" in name}
    assert {len(images) for images in made.values()} == {60}
    right = {name: correct(model, images) for name, images in made.items()}
    assert {name: after.rates[name]["value"] for name in right} == {
        name: pytest.approx(float(answers.double().mean())) for name, answers in right.items()
    }
    others = [answers for name, answers in right.items() if name != "white_box"]
    assert after.rates["worst_transfer"]["value"] == pytest.approx(float(torch.stack(others).all(dim=0).double().mean()))
    assert after.rates["to_parent"]["value"] == pytest.approx(float(correct(parent, made["white_box"]).double().mean()))
    assert after.rates["white_box"]["n"] == 60
    assert after.rates["white_box"]["value"] < after.rates["accuracy"]["value"]
    assert set(before.rates) == {"accuracy", "white_box", "transfer_another_one"}
    text = render([before, after], plan, markdown=True)
    [line] = [line for line in text.splitlines() if line.startswith("| fine-tuning")]
    assert [float(cell) for cell in line.strip("| ").split(" | ")[1:]] == [
        pytest.approx(100 * after.rates[metric]["value"], abs=0.06) for metric in plan.metrics
    ]
    test = load_data(store.folder(node.parents["data"]) / "test.npz")
    originals = {image.numpy().tobytes() for image in test.x}
    assert not originals & {image.numpy().tobytes() for image in made["white_box"].x}
    nearest = (made["white_box"].x[:, None].int() - test.x[None].int()).flatten(2).abs().amax(dim=2).amin(dim=1)
    assert int(nearest.max()) <= 24


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "none"', 'name = "badnets"', r"cannot be given a backdoor"),
        ('eps = "24/255"', 'eps = "24/0"', r"eps of \[evasion\] must be a number or a fraction"),
        ('eps = "24/255"', "eps = [0.1, 0.2]", r"\[evasion\] is one attack"),
        ("steps = 4", "targeted = true", r"\[evasion\] is untargeted"),
        ("twin = true", 'twin = "yes"', r"twin of \[evasion\] must be true or false"),
        ('label = "Another one"', 'label = "parent"', r"labels of their own, other than parent and twin"),
        ('label = "theirs"', "mean = 0.5", r"mean of \[\[model\]\] must be a list of numbers"),
        ('label = "theirs"', 'name = "resnet2"', r"unknown architecture 'resnet2'"),
        ("seed = 3", "seed = -1", r"seed must be whole numbers"),
        ('label = "theirs"', 'name = "own.py:make"', r"is a network of the zoo, got name 'own.py:make'"),
        ('name = "pgd"', 'name = "none"', r"\[evasion\] needs an attack"),
        ('name = "convnet"\nwidth = 4', 'checkpoint = "net"', r"'Another one' is a \[\[model\]\] of the table itself"),
        (PLAN[PLAN.index("[evasion]") : PLAN.index("[[surrogate]]")], "", r"\[\[surrogate\]\] is for \[evasion\]"),
    ],
)  # fmt: skip
def test_mistakes_are_told(home, old, new, said):
    assert old in PLAN
    with pytest.raises(SecateurError, match=said):
        _written(home, PLAN.replace(old, new, 1))


def test_a_quantised_network_is_attacked_with_every_gradient_known(home, tmp_path, monkeypatch):
    plan = _written(
        home, PLAN.replace('[[repair]]\nname = "fine-tuning"\nepochs = 1', '[[compress]]\nname = "quantisation"\nbits = 4')
    )
    plan = replace(plan, evasion=replace(plan.evasion, twin=False))
    graph, store = expand(plan, digest_of), Store(tmp_path / "store")
    tried = []
    monkeypatch.setattr(evading, "adaptives", lambda model: tried.append(adaptives(model)) or tried[-1])
    assert not run(graph, store, make("inline"), plan).failed
    assert max(map(len, tried)) == 3
    [row] = rows(graph, store)
    model = load_bundle(store.folder(row.cell.keys[1]) / "model")
    images = load_data(store.folder(graph.nodes[row.cell.keys[-1]].parents["white_box"]) / "adversarial.npz")
    left = float(correct(model, images).double().mean())
    assert row.rates["white_box"]["value"] == pytest.approx(left)
    assert left < row.rates["accuracy"]["value"]


CHAINED = """[[compress]]
name = "pruning"
label = "small"
target = [2.0, 4.0]
epochs = 1
[[compress]]
name = "quantisation"
label = "8 bit"
after = ["small"]
"""


def test_compressors_one_after_the_other(home, tmp_path):
    plan = _written(home, PLAN.replace('[[repair]]\nname = "fine-tuning"\nepochs = 1\n', CHAINED))
    graph, store = expand(plan, digest_of), Store(tmp_path / "store")
    cells = {cell.compress: cell for cell in graph.cells}
    assert list(cells) == ["small (target=2)", "small (target=4)", "small (target=2), 8 bit", "small (target=4), 8 bit"]
    float_keys, keys = (cells[name].keys for name in ("small (target=4)", "small (target=4), 8 bit"))
    assert keys[:2] == float_keys[:2]
    assert [graph.nodes[key].method for key in keys] == ["none", "pruning", "quantisation", ""]
    measured = graph.nodes[keys[-1]].parents
    assert measured["parent"] == keys[0]
    twin = graph.nodes[graph.nodes[measured["transfer_twin"]].parents["model"]]
    assert (twin.method, twin.seed) == ("quantisation", 1)
    assert (graph.nodes[twin.parents["model"]].method, graph.nodes[twin.parents["model"]].seed) == ("pruning", 1)
    assert not run(graph, store, make("inline"), plan).failed
    before, after = (load_bundle(store.folder(each[-2]) / "model") for each in (float_keys, keys))
    assert quantisation_of(before) is None
    assert quantisation_of(after).weight_bits == 8
    zeros = {name: weight == 0 for name, weight in core(before).named_parameters()}
    assert sum(int(zero.sum()) for zero in zeros.values()) > 0
    for name, weight in core(after).named_parameters():
        assert not weight[zeros[name]].any(), name


def test_rows_that_come_after_leave_the_others_alone(home):
    def keys(text):
        return set(
            expand(_written(home, PLAN.replace('[[repair]]\nname = "fine-tuning"\nepochs = 1\n', text)), digest_of).nodes
        )

    assert keys(CHAINED[: CHAINED.rindex("[[compress]]")]) < keys(CHAINED)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ('["big"]', r"unknown label in after of \[\[compress\]\] 'big'"),
        ("[]", r"after of \[\[compress\]\] needs a method, and at least one label of a table above it"),
        ("[1]", r"after must be text, got 1"),
    ],
)
def test_what_comes_after_must_be_there(home, after, said):
    text = CHAINED.replace('["small"]', after)
    with pytest.raises(SecateurError, match=said):
        _written(home, PLAN.replace('[[repair]]\nname = "fine-tuning"\nepochs = 1\n', text))


def test_a_checkpoint_with_its_digest_is_pinned_and_may_be_missing(home, tmp_path):
    digest = next(iter(_written(home, PLAN).models[0].files))
    pinned = PLAN.replace('checkpoint = "net"', f'checkpoint = "net"\nsha256 = "{digest}"')
    known = expand(_written(home, PLAN), str).nodes.keys()
    assert expand(_written(home, pinned), str).nodes.keys() == known
    (tmp_path / "plan.toml").write_text(pinned, "utf-8")
    elsewhere = read_plan(tmp_path / "plan.toml")
    assert expand(elsewhere, str).nodes.keys() == known
    with pytest.raises(DataError, match=rf"must have sha256 0{{64}}, got {digest}; it is another file"):
        _written(home, pinned.replace(digest, "0" * 64))
    graph, store = expand(elsewhere, digest_of), Store(tmp_path / "store")
    failed = run(graph, store, make("inline"), elsewhere).failed
    assert any(f"put the file with sha256 {digest} there" in outcome.message for outcome in failed.values())


def test_a_surrogate_is_another_network(home):
    text = PLAN.replace('checkpoint = "net"\nlabel = "theirs"', 'name = "convnet"\nwidth = 4').replace("seed = 3", "seed = 0")
    with pytest.raises(SecateurError, match=r"'Another one' is a \[\[model\]\] of the table itself; give it another seed"):
        _written(home, text)


def test_a_checkpoint_that_changed_under_a_run_is_noticed(home, tmp_path):
    shutil.copytree(home / "net", tmp_path / "net")
    (tmp_path / "plan.toml").write_text(PLAN, "utf-8")
    plan = read_plan(tmp_path / "plan.toml")
    graph, store = expand(plan, digest_of), Store(tmp_path / "store")
    (tmp_path / "net" / "README.md").write_text("other", "utf-8")
    failed = run(graph, store, make("inline"), plan).failed
    assert any("changed after the plan was read" in outcome.message for outcome in failed.values())


def test_a_twin_that_is_the_network_itself_says_nothing(home, tmp_path):
    plan = _written(home, PLAN.replace('[[repair]]\nname = "fine-tuning"\nepochs = 1', '[[compress]]\nname = "quantisation"'))
    graph, store = expand(plan, digest_of), Store(tmp_path / "store")
    assert not run(graph, store, make("inline"), plan).failed
    [row] = rows(graph, store)
    assert "transfer_twin" not in row.rates
    assert {"white_box", "transfer_parent", "worst_transfer"} <= set(row.rates)


def test_a_checkpoint_that_is_not_there(home):
    with pytest.raises(DataError, match=r"cannot read .*gone"):
        _written(home, PLAN.replace('"net"', '"gone"'))
