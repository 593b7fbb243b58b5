"""Whole runs: the record tells the truth, and nothing a defence must not see reaches it."""

import inspect
import json
from dataclasses import replace

import pytest
import torch

from secateur import methods, runs
from secateur.errors import InconclusiveError, MethodError, ModelError
from secateur.measure import evaluate
from secateur.models import load_bundle, save
from secateur.report import render, to_json
from secateur.runs import repairing, training
from secateur.train import Recipe
from secateur.types import ImageSet, NeuronGraph, Repaired

QUICK = {"fraction": 0.3, "epochs": 2, "lr": 0.02}


def spy(monkeypatch):
    """Replace the repair by one that remembers what it was given and changes nothing."""
    seen = {}

    def fake(model, clean, *, on_step, **settings):
        seen.update(model=model, clean=clean, on_step=on_step, **settings)
        return Repaired(model, None)

    monkeypatch.setattr(methods.Method, "load", lambda self: fake)
    return seen


def test_a_repair_is_measured_before_and_after(victim):
    run = runs.repair(victim.model, victim.clean, arguments=QUICK, test=victim.test, trigger=victim.trigger)
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    after = evaluate(run.model, victim.test, trigger=victim.trigger)
    for record, truth in ((run.result.before, before), (run.result.after, after)):
        assert record["accuracy"]["value"] == truth.accuracy.value
        assert record["attack_success"]["value"] == truth.attack_success.value
        assert record["attack_success"]["n"] == truth.attack_success.n == 80
    assert run.result.after["parameters"] < run.result.before["parameters"]
    assert run.result.method["args"] == methods.settings(methods.get("repair", "norm-pruning"), QUICK)


def test_pruned_channels_left_the_network_without_changing_an_answer(victim):
    run = runs.repair(victim.model, victim.clean, arguments=QUICK, test=victim.test)
    [check] = run.result.checks
    assert check["id"] == "masked-equals-removed"
    assert check["metrics"] == {"same": 1.0, "n": len(victim.test)}


def test_without_test_images_the_method_does_not_see_those_it_is_measured_on(victim, monkeypatch):
    seen = spy(monkeypatch)
    run = runs.repair(victim.model, victim.clean)
    assert len(seen["clean"]) == 48
    assert run.result.after["accuracy"]["n"] == 12
    assert run.result.data["clean"]["sha256"] != run.result.data["test"]["sha256"]
    shown = {x.numpy().tobytes() for x in seen["clean"].x}
    all_of_them = {x.numpy().tobytes() for x in victim.clean.x}
    assert len(shown) == 48
    assert len(all_of_them - shown) == 12


def test_a_repair_sees_the_model_the_clean_images_and_its_settings(victim, monkeypatch):
    seen = spy(monkeypatch)
    runs.repair(victim.model, victim.clean, method="fine-tuning", test=victim.test, trigger=victim.trigger)
    assert seen.keys() == {"model", "clean", "epochs", "lr", "on_step", "generator"}
    assert seen["clean"].sha256 == victim.clean.sha256


def test_the_record_says_how_a_repair_learned_and_what_it_cut(victim, monkeypatch, schema):
    history = ({"evaluations": 8.0, "reward": -1.0}, {"evaluations": 16.0, "reward": float("nan")})
    graph = NeuronGraph(("1", "4"), 4, ((0, 1), (1, 3)), (1,))
    learned = Repaired(victim.model, None, history=history, graphs=(graph,))
    monkeypatch.setattr(methods.Method, "load", lambda self: lambda model, clean, **settings: learned)
    record = json.loads(to_json(runs.repair(victim.model, victim.clean, test=victim.test).result))
    schema.validate(record)
    assert record["details"]["history"] == [{"evaluations": 8.0, "reward": -1.0}, {"evaluations": 16.0}]
    assert record["details"]["graphs"] == [{"sites": ["1", "4"], "size": 4, "edges": [[0, 1], [1, 3]], "cut": [1]}]
    assert all("Neurons cut, layer by layer".lower() in render(record, name).lower() for name in ("html", "md", "text"))


def test_notes_of_a_repair_reach_who_watches_it(victim, monkeypatch):
    def noting(model, clean, *, on_note=None, **settings):
        on_note("a note")
        return Repaired(model, None)

    told = []
    monkeypatch.setattr(methods.Method, "load", lambda self: noting)
    runs.repair(victim.model, victim.clean, method="clp", test=victim.test, on_note=told.append)
    assert told == ["a note"]


def test_the_record_of_a_repair_that_does_not_learn_has_no_history(victim, monkeypatch):
    spy(monkeypatch)
    assert not {"history", "graphs"} & runs.repair(victim.model, victim.clean, test=victim.test).result.details.keys()


def test_a_record_keeps_a_long_history_from_end_to_end_and_as_many_edges_as_it_has_room_for(monkeypatch):
    kept = repairing._history([{"games": float(i)} for i in range(1237)])
    numbers = [entry["games"] for entry in kept]
    assert len(numbers) == len(set(numbers)) == repairing.ENTRIES
    assert (numbers[0], numbers[-1]) == (0.0, 1236.0)
    rewarded = repairing._history([{"games": float(i), "reward": float(i == 1001)} for i in range(1237)])
    assert {"games": 1001.0, "reward": 1.0} in rewarded
    monkeypatch.setattr(repairing, "EDGES", 5)
    ring = ((0, 1), (1, 2), (2, 3), (0, 3))
    small, large, none = (NeuronGraph(("a",), 4, ring, cut) for cut in ((0,), (0, 1, 2, 3), ()))
    assert [graph["edges"] for graph in repairing._graphs([small, large])] == [[], [list(edge) for edge in ring]]
    monkeypatch.setattr(repairing, "EDGES", 3)
    assert [graph["edges"] for graph in repairing._graphs([none, small])] == [[], [[0, 1], [0, 3]]]


def test_a_network_at_chance_is_inconclusive(victim):
    shuffled = replace(victim.test, y=victim.test.y.roll(1))
    with pytest.raises(InconclusiveError, match="no better than always answering the commonest class") as error:
        runs.repair(victim.model, victim.clean, arguments=QUICK, test=shuffled)
    assert error.value.exit_code == 3


def test_images_that_do_not_fit_are_refused(victim):
    wide = replace(victim.test, x=torch.zeros(len(victim.test), 1, 12, 14, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"takes images of shape \(1, 12, 12\), got \(1, 12, 14\)"):
        runs.repair(victim.model, victim.clean, test=wide)
    more = replace(victim.test, classes=(*victim.test.classes, "more"))
    with pytest.raises(ModelError, match="3 classes, the images have 4"):
        runs.repair(victim.model, victim.clean, test=more)


def test_unknown_methods_and_settings_are_named(victim):
    with pytest.raises(MethodError, match="did you mean 'norm-pruning'"):
        runs.repair(victim.model, victim.clean, method="norm-prunning")
    with pytest.raises(MethodError, match="did you mean 'epochs'"):
        runs.repair(victim.model, victim.clean, arguments={"epochss": 1})


@pytest.mark.parametrize("trigger", [True, False])
def test_the_record_obeys_the_schema_and_renders(victim, trigger, schema):
    run = runs.repair(
        victim.model, victim.clean, arguments=QUICK, test=victim.test, trigger=victim.trigger if trigger else None
    )
    record = json.loads(to_json(run.result))
    schema.validate(record)
    assert (record["after"]["attack_success"] is None) is not trigger
    assert any("No trigger was given" in text for text in record["limitations"]) is not trigger
    for name in ("html", "md", "text"):
        assert f"{100 * run.result.after['accuracy']['value']:.2f}" in render(record, name)


def test_a_repaired_network_survives_saving_and_a_second_repair(victim, tmp_path):
    first = runs.repair(victim.model, victim.clean, arguments=QUICK, test=victim.test)
    save(first.model, tmp_path / "first", masks=first.mask, steps=[first.step])
    again = load_bundle(tmp_path / "first")
    second = runs.repair(again, victim.clean, arguments={**QUICK, "layers": "all"}, test=victim.test)
    save(second.model, tmp_path / "second", masks=second.mask, steps=[first.step, second.step])
    final = load_bundle(tmp_path / "second")
    pixels = torch.rand(8, 1, 12, 12)
    with torch.inference_mode():
        assert torch.equal(final(pixels), second.model(pixels))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (victim.model, again, final)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_training_a_victim_records_itself(images, bars, schema):
    recipe = Recipe(epochs=2, lr=0.1, batch_size=40)
    run = runs.train(images, arch="convnet", kwargs={"width": 4}, recipe=recipe, test=bars(60, 9), seed=1)
    model, result = run.model, run.result
    schema.validate(json.loads(to_json(result)))
    assert result.after["accuracy"]["value"] == evaluate(model, bars(60, 9)).accuracy.value
    assert model.arch["kwargs"]["classes"] == 3
    assert abs(float(model.mean[0]) - float(images.x.float().mean() / 255)) < 1e-6
    again = runs.train(images, arch="convnet", kwargs={"width": 4}, recipe=recipe, test=bars(60, 9), seed=1).model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("backdoor", "chosen"), [("badnets", {"target": 1}), ("lira", {"target": 0, "sources": [1], "width": 2})]
)
def test_what_cannot_be_measured_is_told_before_the_training(backdoor, chosen, images, bars, monkeypatch):
    monkeypatch.setattr(training, "train_victim", lambda *given, **more: pytest.fail("it trained"))
    test = bars(60, 9)
    settings = {"arch": "convnet", "kwargs": {"width": 4}, "recipe": Recipe(epochs=1), "backdoor": backdoor}
    middle = test.subset(test.y == (1 if backdoor == "badnets" else 2))
    with pytest.raises(InconclusiveError, match=r"^no test image is of a class that the attacker wants to move"):
        runs.train(images, test=middle, backdoor_settings=chosen, **settings)
    padded = ImageSet(torch.nn.functional.pad(test.x, (2, 2, 2, 2)), test.y, test.classes)
    with pytest.raises(ModelError, match=r"^the network takes images of shape \(1, 12, 12\), got \(1, 16, 16\)"):
        runs.train(images, test=padded, backdoor_settings=chosen, **settings)


@pytest.mark.parametrize("row", methods.table("repair"), ids=lambda row: row.name)
def test_every_repair_makes_a_whole_run(row, victim, schema, tmp_path):
    """As the command line calls it, with progress, and with a bundle and a report in the end."""
    steps = []
    run = runs.repair(
        victim.model,
        victim.clean,
        method=row.name,
        arguments=row.quick,
        test=victim.test,
        trigger=victim.trigger,
        suspect=victim.test if "suspect" in row.needs else None,
        on_step=lambda step, total: steps.append(step),
    )
    schema.validate(json.loads(to_json(run.result)))
    assert run.result.method["name"] == row.name
    assert bool(steps) == ("on_step" in inspect.signature(row.load()).parameters)
    assert ("suspect" in run.result.data) == ("suspect" in row.needs)
    save(run.model, tmp_path / "bundle", masks=run.mask, steps=[run.step])
    assert torch.equal(load_bundle(tmp_path / "bundle")(torch.zeros(1, 1, 12, 12)), run.model(torch.zeros(1, 1, 12, 12)))
    assert "html" in render(json.loads(to_json(run.result)), "html")
