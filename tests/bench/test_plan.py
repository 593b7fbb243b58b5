"""Plans are checked before anything runs, and become graphs whose keys say what a result depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import methods
from secateur.bench.nodes import STAGES, Node, canonical_json, expand, from_config
from secateur.bench.plan import read_plan
from secateur.bench.source import digest
from secateur.errors import DataError, MethodError, ModelError

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.toml"))
PLAN = """
format = 1
victim_seeds = [0, 1]
repair_seeds = [0, 1]
[data]
name = "fashion-mini"
clean = [0.1, 0.05]
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
rate = [0.1, 0.2]
[[backdoor]]
name = "none"
[train]
epochs = 1
[[repair]]
name = "fine-tuning"
epochs = 1
[[repair]]
name = "norm-pruning"
layers = ["late", "all"]
fraction = 0.5
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str = PLAN, name: str = "test.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return to_file


def graph_of(path):
    return expand(read_plan(path), lambda path: f"digest of {path}")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_plans_that_are_shipped_can_be_read(path):
    plan = read_plan(path)
    assert plan.name == path.name.partition(".")[0]
    nodes = expand(plan, lambda path: path).nodes
    assert len(nodes) > 10
    assert all(parent in nodes for node in nodes.values() for parent in node.parents.values())


def test_the_smoke_plan_has_the_data_and_sixteen_more_nodes():
    graph = expand(read_plan(PLANS[[p.name for p in PLANS].index("smoke.toml")]), digest)
    assert Counter(node.stage for node in graph.nodes.values()) == {"data": 1, "victim": 2, "repair": 6, "measure": 8}


def test_lists_are_axes_and_labels_tell_the_points_apart(write):
    plan = read_plan(write())
    assert [choice.label for choice in plan.backdoors] == ["badnets (rate=0.1)", "badnets (rate=0.2)", "none"]
    assert [choice.label for choice in plan.repairs] == [
        "fine-tuning (epochs=1)",
        "norm-pruning (layers=late, fraction=0.5)",
        "norm-pruning (layers=all, fraction=0.5)",
    ]
    assert plan.repairs[1].settings["norm"] == "l1", "every default is written out"
    labelled = read_plan(write(PLAN.replace('name = "norm-pruning"', 'name = "norm-pruning"\nlabel = "pruning"')))
    assert [choice.label for choice in labelled.repairs[1:]] == ["pruning (layers=late)", "pruning (layers=all)"]


def test_a_setting_that_is_always_a_list_needs_a_list_of_lists_to_vary(write):
    one = read_plan(write(PLAN.replace("rate = [0.1, 0.2]", "sources = [1, 2]")))
    assert [choice.settings["sources"] for choice in one.backdoors[:-1]] == [[1, 2]]
    two = read_plan(write(PLAN.replace("rate = [0.1, 0.2]", "sources = [[1, 2], [3]]")))
    assert [choice.settings["sources"] for choice in two.backdoors[:-1]] == [[1, 2], [3]]


def test_the_graph_shares_what_it_can(write):
    graph = graph_of(write())
    count = Counter(node.stage for node in graph.nodes.values())
    seeds, victims, repairs = 2, 3, 3 * 2 * 2  # victims per seed; repairs x clean shares x repair seeds per victim
    assert count["data"] == seeds
    assert count["victim"] == seeds * victims
    assert count["repair"] == seeds * victims * repairs
    triggers = 1 + 1 + 2  # the benign network is measured under each attack's trigger
    assert count["measure"] == seeds * triggers * (1 + repairs)
    assert len(graph.cells) == count["measure"]
    assert list(graph.nodes) == [node.key for node in graph.nodes.values()]


def test_parents_stand_before_children_and_a_repair_never_reads_the_trigger(write):
    seen: set[str] = set()
    for key, node in graph_of(write()).nodes.items():
        assert set(node.parents.values()) <= seen
        assert node.stage in ("data", "victim", "measure") or set(node.parents) == {"model", "data"}
        seen.add(key)


def test_the_benign_control_is_measured_under_every_trigger(write):
    cells = [cell for cell in graph_of(write()).cells if cell.backdoor == "none"]
    assert {cell.trigger for cell in cells} == {"badnets (rate=0.1)", "badnets (rate=0.2)"}
    without = [cell for cell in cells if cell.repair == "none"]
    assert all(cell.clean is None and cell.repair_seed is None for cell in without)
    assert len(without) == 2 * 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("epochs = 1\n[[repair]]", "epochs = 2\n[[repair]]"), {"data"}),  # the recipe: every victim is another one
        (("fraction = 0.5", "fraction = 0.25"), {"data", "victim"}),
        (("clean = [0.1, 0.05]", "clean = [0.1]"), {"data", "victim", "repair", "measure"}),
        (("clean = [0.1, 0.05]", "clean = [0.2, 0.05]"), set()),  # what is held out decides what victims are trained on
        (("format = 1", "format = 1\nthreads = 2"), set()),
        (("format = 1", "format = 1\ntimeout = 5\nmemory = '1 GiB'"), {"data", "victim", "repair", "measure"}),
    ],
)
def test_a_change_makes_new_exactly_what_depends_on_it(write, change, same):
    before, after = graph_of(write()), graph_of(write(PLAN.replace(*change), "other.toml"))
    shared = before.nodes.keys() & after.nodes.keys()
    for stage in ("data", "victim"):
        kept = {key for key in shared if before.nodes[key].stage == stage}
        everything = {key for key, node in before.nodes.items() if node.stage == stage}
        assert kept == (everything if stage in same else set()), stage
    repairs = {before.nodes[key].method for key in shared if before.nodes[key].stage == "repair"}
    expected = {"fine-tuning", "norm-pruning"} if "repair" in same else {"fine-tuning"} if "victim" in same else set()
    assert repairs == expected


@pytest.mark.parametrize("field", ["seed", "stage_version", "method_version", "threads"])
def test_every_field_is_part_of_the_key(field):
    node = Node("victim", "badnets", {"a": 1})
    assert replace(node, **{field: 7}).key != node.key
    assert replace(node, device="cuda").key != replace(node, dtype="bfloat16").key != node.key
    assert replace(node, parents={"data": "x"}).key != replace(node, parents={"data": "y"}).key
    assert from_config(json.loads(canonical_json(node.config))).key == node.key


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()))
def test_canonical_json_does_not_know_the_order(values):
    backwards = dict(reversed(list(values.items())))
    assert canonical_json(values) == canonical_json(backwards)
    assert json.loads(canonical_json(values)) == values


def test_a_new_version_of_a_score_is_a_new_node_for_repairs_that_name_it(write, monkeypatch):
    before = graph_of(write())
    scores = [replace(row, version=2) if row.name == "l1" else row for row in methods.table("score")]
    monkeypatch.setattr("secateur.bench.choices.table_of", lambda kind: scores)
    after = graph_of(write())
    changed = {
        before.nodes[key].method for key in before.nodes.keys() - after.nodes.keys() if before.nodes[key].stage == "repair"
    }
    assert changed == {"norm-pruning"}


def test_whole_numbers_and_floats_are_one_node(write):
    one = graph_of(write(PLAN.replace("fraction = 0.5", "fraction = 1")))
    other = graph_of(write(PLAN.replace("fraction = 0.5", "fraction = 1.0"), "b.toml"))
    assert one.nodes.keys() == other.nodes.keys()


def test_keys_of_victims_are_those_of_the_first_results():
    """Computed before recipes knew adversarial training: what is at its default is no part of a key."""
    nodes = graph_of(PLANS[[p.name for p in PLANS].index("smoke.toml")]).nodes
    victims = {node.method: key for key, node in nodes.items() if node.stage == "victim"}
    assert victims == {
        "badnets": "ed39230ace1143841a5cda02954da1dfe9eaada8972f58b455c604089f4990f6",
        "none": "f27809b6c813f9e098286ea634111729ee00e50882132a35e1775ee6cc675152",
    }


def test_adversarial_training_is_part_of_a_victims_key_and_a_fraction_is_its_number(write):
    def victims(more: str) -> set[str]:
        nodes = graph_of(write(PLAN.replace("epochs = 1\n[[repair]]", f"epochs = 1\n{more}\n[[repair]]", 1))).nodes
        return {key for key, node in nodes.items() if node.stage == "victim"}

    robust = victims('adversarial = "pgd"\neps = "8/255"')
    assert robust == victims(f'adversarial = "pgd"\neps = {8 / 255}')
    assert not robust & victims('adversarial = "pgd"\neps = "4/255"')
    assert not robust & victims('adversarial = "none"')
    assert victims('adversarial = "none"') == victims("")


def test_keys_are_the_same_in_another_process(write):
    path = write()
    code = (
        "import sys; from secateur.bench.nodes import expand; from secateur.bench.plan import read_plan\n"
        "print(*expand(read_plan(sys.argv[1]), lambda path: f'digest of {path}').nodes); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert out.split() == list(graph_of(path).nodes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("format = 1", "format = 2"), MethodError, "format must be 1, got 2; update secateur"),
        (("format = 1\n", ""), MethodError, "format must be 1, got None"),
        (("victim_seeds", "victim_seed"), MethodError, "unknown key 'victim_seed'; did you mean 'victim_seeds'?"),
        (("[0, 1]\nrepair", "[0, 0]\nrepair"), MethodError, "victim_seeds must be different seeds, got 0 2 times"),
        (("[0, 1]\nrepair", "[-1]\nrepair"), MethodError, "victim_seeds must be whole numbers in [0, 2147483647], got -1"),
        (('"badnets"', '"badnet"'), MethodError, "unknown backdoor method 'badnet'; did you mean 'badnets'?"),
        (('"norm-pruning"', '"norm-prunning"'), MethodError, "'norm-prunning'; did you mean 'norm-pruning'?"),
        (("fraction = 0.5", "fractoin = 0.5"), MethodError, "setting of 'norm-pruning' 'fractoin'; did you mean 'fraction'?"),
        (("fraction = 0.5", "fraction = 'half'"), MethodError, "fraction must be of type float | None, got 'half'"),
        (("fraction = 0.5", "fraction = []"), MethodError, "fraction must hold at least one value, got []"),
        (('"convnet"', '"convnett"'), ModelError, "unknown architecture 'convnett'; did you mean 'convnet'?"),
        (("width = 4", "widht = 4"), ModelError, "unknown argument of convnet 'widht'; did you mean 'width'?"),
        (("width = 4", "classes = 4"), MethodError, "classes of a [[model]] follows from the data; leave it out"),
        (("epochs = 1\n[[repair]]", "epoch = 1\n[[repair]]"), MethodError, "setting of train 'epoch'; did you mean 'epochs'?"),
        (("epochs = 1\n[[repair]]", "epochs = -1\n[[repair]]"), MethodError, "epochs must lie in [0, 100000], got -1"),
        (("clean = [0.1, 0.05]", "clean = 1.5"), MethodError, "clean must be different shares in (0, 1), got 1.5"),
        (('name = "fashion-mini"', 'path = "a"\nname = "b"'), MethodError, "[data] needs name, or path, or train and test"),
        (('name = "fashion-mini"', 'name = "fashionmini"'), MethodError, "unknown name of [data] 'fashionmini'; did you mean"),
        (("format = 1", "format = 1\nmemory = 4"), MethodError, "memory must be text, got 4"),
        (("format = 1", "format = 1\nmemory = '4 GB'"), MethodError, "memory must be like '4 GiB' or '512 MiB', got '4 GB'"),
        (("format = 1", "format = 1\ntimeout = 0"), MethodError, "timeout must be more than 0 seconds, got 0"),
        (("format = 1", "format = 1\ndevice = 'gpu'"), MethodError, "unknown device 'gpu'"),
        (("[[model]]", "[[modle]]"), MethodError, "unknown key 'modle'; did you mean 'model'?"),
        (('[[repair]]\nname = "fine', '[[repair]]\nname = "none"\n[[repair]]\nname = "fine'), MethodError, "always part"),
        (("layers = [", 'label = "x"\nlayers = ["late", "late"] # '), MethodError, "[[repair]] are called 'x (layers=late)'"),
        (("format = 1", "format = "), DataError, "test.toml is not valid TOML: Invalid value"),
        (("[train]", "[measure]\nmetrics = ['acuracy']\n[train]"), MethodError, "metric 'acuracy'; did you mean 'accuracy'?"),
        (("[train]", "[measure]\nmetrics = []\n[train]"), MethodError, "metrics must be a list of accuracy, attack_success"),
        (('"fine-tuning"', '"fine-tuning"\nlabel = "none"'), MethodError, "a [[repair]] cannot be called 'none'"),
        (('"badnets"\nrate = [0.1, 0.2]', '"badnets"\nlabel = "none"'), MethodError, "a [[backdoor]] cannot be called 'none'"),
        (('name = "none"', 'name = "none"\nlabel = ["a"]'), MethodError, "label must be text, got ['a']"),
        (("rate = [0.1, 0.2]", "rate = [nan]"), MethodError, "rate must be text, true, false or a finite number, got nan"),
        (("rate = [0.1, 0.2]", "rate = 2020-01-01"), MethodError, "rate must be text, true, false or a finite number"),
        (("clean = [0.1, 0.05]", "clean = [0.1, 0.1]"), MethodError, "clean must be different shares in (0, 1)"),
        (("fraction = 0.5", 'norm = "l3"'), MethodError, "unknown norm 'l3'; choose from: l1, l2, random"),
        (("fraction = 0.5", 'scope = "globl"'), MethodError, "unknown scope 'globl'; did you mean 'global'?"),
        (('layers = ["late", "all"]', "layers = true"), MethodError, "layers must be of type str | Sequence[str], got True"),
        (("format = 1", "format = true"), MethodError, "format must be 1, got True"),
        (("format = 1", "format = 1\ntimeout = nan"), MethodError, "timeout must be more than 0 seconds, got nan"),
        (("[train]", "[reported]\nfile = 'no.toml'\n[train]"), DataError, "cannot read the reported numbers"),
    ],
)  # fmt: skip
def test_mistakes_are_named(write, change, error, message):
    assert change[0] in PLAN
    with pytest.raises(error) as caught:
        read_plan(write(PLAN.replace(change[0], change[1], 1)))
    assert message in str(caught.value)
    assert "test.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the plan .*no\.toml: No such file or directory; name a TOML file"):
        read_plan(tmp_path / "no.toml")


def test_reported_numbers_are_read(write, tmp_path):
    text = '[[reported]]\nsource = "Somebody 2020"\nwhere = { backdoor = "none" }\naccuracy = 0.5\n'
    (tmp_path / "numbers.toml").write_text(text, "utf-8")
    [row] = read_plan(write(PLAN + '[reported]\nfile = "numbers.toml"\n')).reported
    assert (row.source, dict(row.where), dict(row.values)) == ("Somebody 2020", {"backdoor": "none"}, {"accuracy": 0.5})
    (tmp_path / "numbers.toml").write_text(text.replace("backdoor", "attack"), "utf-8")
    with pytest.raises(MethodError, match=r"unknown column in where of \[\[reported\]\] 'attack'"):
        read_plan(write(PLAN + '[reported]\nfile = "numbers.toml"\n'))
    (tmp_path / "numbers.toml").write_text(text.replace("0.5", "50"), "utf-8")
    with pytest.raises(MethodError, match=r"a \[\[reported\]\] row of numbers.toml needs .* in \[0, 1\]"):
        read_plan(write(PLAN + '[reported]\nfile = "numbers.toml"\n'))


def test_the_digest_follows_the_bytes_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.bin").write_bytes(b"images")
    assert digest(f"{tmp_path}/a/x.bin:train") == digest(f"{tmp_path}/b/x.bin:train") != digest(f"{tmp_path}/a/x.bin:test")
    assert digest(f"{tmp_path}/a") == digest(f"{tmp_path}/b")
    (tmp_path / "b" / "x.bin").write_bytes(b"other images")
    assert digest(f"{tmp_path}/a/x.bin:train") != digest(f"{tmp_path}/b/x.bin:train")
    assert digest(f"{tmp_path}/a") != digest(f"{tmp_path}/b")
    with pytest.raises(DataError, match=r"cannot read the images at .*nothing.*; check"):
        digest(f"{tmp_path}/nothing.npz:train")


def test_stages_exist():
    from secateur.bench import stages

    assert all(callable(getattr(stages, target.partition(":")[2])) for target, _ in STAGES.values())
