"""Whole measurements of robustness: the record says what the library measured, and a broken network establishes nothing."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from secateur import runs
from secateur.attack import pgd, square
from secateur.errors import InconclusiveError, MethodError, ModelError
from secateur.measure import wilson
from secateur.measure.adversarial import ThreatModel, bind
from secateur.measure.robustness import robustness
from secateur.measure.sanity import RULES, Check, Sanity, sanity
from secateur.report import render, to_json
from secateur.runs import attacking, evading
from secateur.runs import robust_records as told
from secateur.runs.evading import Entry, chosen
from secateur.state import generator
from secateur.types import to_float

EPS = 0.1
QUICK = {"steps": 3, "queries": 10}


class Rounded(nn.Module):
    """A network that sees three grey levels, and no gradient through them."""

    def __init__(self, net, detach):
        super().__init__()
        self.net, self.detach = net, detach

    def forward(self, x):
        seen = (2 * x).round() / 2
        return self.net(seen.detach() if self.detach else seen)


def scaled(model, factor=1000.0):
    """Return a copy whose logits are a thousand times as large."""
    broken = copy.deepcopy(model)
    last = [module for module in broken.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)
    return broken


@pytest.fixture(scope="module")
def measured(trained, bars):
    return runs.attack(trained, bars(60, 2), eps=EPS, arguments=QUICK, surrogate=trained, train=bars(30, 9), images=40)


def test_the_numbers_are_those_of_the_library(trained, bars, measured):
    attacks = {
        "pgd (cross-entropy)": bind(pgd, eps=EPS, steps=3, restarts=2),
        "pgd (margin)": bind(pgd, eps=EPS, steps=3, loss="margin"),
        "square": bind(square, eps=EPS, queries=10),
    }
    # Attacks do not change what others find, so that the transfer attack may be left out here.
    truth = robustness(trained, bars(60, 2), attacks, ThreatModel(EPS), generator=generator(0))
    record = measured.result
    rows = {row["name"]: row for row in record.details["robustness"]["attacks"]}
    assert [*rows] == [*attacks, "transfer (mi-fgsm)"]
    for name in attacks:
        for kind, rates in (("returned", truth.by_attack[name]), ("stored", truth.stored_by_attack[name])):
            told = {key: value for key, value in asdict(rates).items() if key != "target_reached"}
            assert rows[name][kind] == told
        assert rows[name]["budget"] == truth.budgets[name]
    worst = measured.robustness.worst
    assert record.before["adversarial_accuracy"] == asdict(worst.remnant_accuracy)
    assert record.before["accuracy"] == asdict(worst.clean_accuracy)
    assert record.after == {}
    assert worst.remnant_accuracy.value <= min(rates.remnant_accuracy.value for rates in truth.by_attack.values())
    assert 0 < worst.remnant_accuracy.value < worst.clean_accuracy.value


def test_the_checks_are_those_of_the_library(trained, bars, measured):
    own = chosen((), QUICK, eps=EPS, norm="linf")
    truth = sanity(
        trained, bars(60, 2), eps=EPS, images=40, attacks={f"{entry.name} as measured": entry.bound for entry in own},
        surrogate=trained, train=bars(30, 9), measured=measured.robustness, generator=generator(0),
    )  # fmt: skip
    words = {"PASS": ("ok", None), "WARN": ("finding", "medium"), "FAIL": ("finding", "high"), "SKIPPED": ("skipped", None)}
    told = [(row["id"], row["status"], row.get("severity"), row["why"]) for row in measured.result.checks]
    assert told == [(check.id, *words[check.status], check.message) for check in truth.checks]
    assert {row["rule"] for row in measured.result.findings} == {c.id for c in truth.checks if c.status in ("WARN", "FAIL")}


def test_a_sound_network_is_established_and_its_record_obeys_the_schema(measured, schema):
    assert measured.sanity.established
    record = json.loads(to_json(measured.result))
    schema.validate(record)
    assert (record["kind"], record["verdict"]) == ("attack", "established")
    assert record["data"].keys() == {"test", "train"}
    assert record["cost"]["seconds"] >= record["cost"]["attacks_seconds"] > 0
    assert all(render(record, format) for format in ("text", "html", "md"))


def test_the_curve_starts_at_no_budget_and_has_the_one_attacked(measured):
    points = measured.result.details["robustness"]["curve"]["points"]
    assert [point["eps"] for point in points] == pytest.approx([0, EPS / 4, EPS / 2, EPS, 2 * EPS, 4 * EPS])
    assert points[0]["accuracy"]["value"] > points[-1]["accuracy"]["value"]
    assert {point["accuracy"]["n"] for point in points} == {40}


def test_the_surrogate_is_a_row_of_the_attacks_and_of_the_matrix(measured):
    cells = measured.result.details["robustness"]["transfer"]["cells"]
    assert [(cell["source"], cell["target"]) for cell in cells] == [
        (a, b) for a in ("network", "surrogate") for b in ("network", "surrogate")
    ]
    assert len({json.dumps(cell["success"]) for cell in cells}) == 1  # the surrogate is the network here


@pytest.mark.parametrize("kind", ["scaled", "rounded", "detached"])
def test_a_network_that_hides_its_gradient_establishes_nothing(trained, bars, kind, schema):
    broken = scaled(trained) if kind == "scaled" else copy.deepcopy(trained)
    if kind != "scaled":
        broken.net = Rounded(broken.net, kind == "detached")
    run = runs.attack(broken, bars(60, 2), eps=0.05, arguments=QUICK, images=40, sweep=(0.05,))
    record = json.loads(to_json(run.result))
    schema.validate(record)
    assert record["verdict"] == "not-established"
    failed = {row["rule"] for row in record["findings"] if row["severity"] == "high"}
    assert failed >= {"scaled": {"ADV-010"}, "rounded": {"ADV-010", "ADV-011"}, "detached": {"ADV-020"}}[kind]
    text = " ".join(render(record, "text").split())
    assert text.startswith("Robustness not established: ")
    assert ("COULD NOT RUN" in text) == (kind == "detached")


def test_settings_belong_to_all_attacks_or_to_one():
    entries = chosen(("pgd", "square"), {"batch_size": 8, "pgd.steps": 3}, eps=0.1, norm="l2")
    assert [entry.bound.settings["batch_size"] for entry in entries] == [8, 8]
    assert entries[0].bound.settings["steps"] == 3
    assert [(entry.bound.settings["eps"], entry.bound.settings["norm"]) for entry in entries] == [(0.1, "l2")] * 2
    assert [entry.name for entry in chosen((), {"loss": "margin"}, eps=0.1, norm="linf")] == ["pgd (margin)", "square"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0.5}, r"'eps' is the same for all attacks"),
        ({"pgd.targeted": True}, r"'pgd.targeted' is the same for all attacks"),
        ({"stesp": 3}, r"did you mean 'steps'"),
        ({"square.steps": 3}, r"unknown setting of these attacks 'square.steps'"),
        ({"steps": "many"}, r"steps must be of type int"),
    ],
)
def test_settings_that_are_none_are_refused(arguments, message):
    with pytest.raises(MethodError, match=message):
        chosen((), arguments, eps=0.1, norm="linf")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"eps": 0.0}, MethodError, r"eps must be above 0"),
        ({"eps": 8.0}, MethodError, r"eps must lie in \[0, 1\], got 8"),
        ({"eps": 0.1, "sweep": (0.0,)}, MethodError, r"a curve starts at 0 by itself"),
        ({"eps": 0.1, "images": 9}, InconclusiveError, r"at least 10 images, got 9"),
    ],
)
def test_what_cannot_be_measured_is_refused(trained, bars, changed, error, message):
    with pytest.raises(error, match=message):
        runs.attack(trained, bars(30, 2), **changed)


def test_wrong_labels_are_inconclusive(trained, bars):
    data = bars(30, 2)
    data.y.copy_(data.y.roll(1))
    with pytest.raises(InconclusiveError, match=r"no better than always answering the commonest class"):
        runs.attack(trained, data, eps=EPS)


def test_an_attack_that_fails_only_where_the_checks_do_not_look_is_a_finding(trained, bars, monkeypatch):
    from secateur.errors import ModelError
    from secateur.runs import evading

    def moody(model, x, y, *, generator, **settings):
        if len(x) != 40:
            raise ModelError("no gradient today")
        return x

    monkeypatch.setattr(
        evading, "bind", lambda attack, **settings: bind(moody) if attack is square else bind(attack, **settings)
    )
    run = runs.attack(trained, bars(60, 2), eps=EPS, arguments={"steps": 3}, images=40, sweep=())
    assert run.result.verdict == "not-established"
    assert "no gradient today" in run.result.details["notes"][0]
    assert "could not run on 60 of the images measured" in next(c["why"] for c in run.result.checks if c["id"] == "ADV-020")
    assert [row["severity"] for row in run.result.findings if row["rule"] == "ADV-020"] == ["high"]


@pytest.mark.parametrize(
    ("method", "arguments", "knowledge"),
    [("random-noise", {}, "none"), ("pgd", {"steps": 1, "step_size": 0.001, "random_start": False}, "white-box")],
)
def test_a_figure_of_a_weak_attack_is_not_established(trained, bars, method, arguments, knowledge):
    found = runs.attack(trained, bars(120, 2), eps=0.15, methods=[method], arguments=arguments, sweep=(), images=120)
    assert found.result.verdict == "not-established"
    assert "ADV-026" in {row["rule"] for row in found.result.findings if row["severity"] == "high"}
    assert found.result.details["robustness"]["threat"]["knowledge"] == knowledge


class Standardised(nn.Module):
    """Divides each image by its deviation: a constant one has no answer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x / x.std(dim=(1, 2, 3), keepdim=True) * 0.2)


def test_an_image_without_an_answer_does_not_save_its_batch(trained, bars):
    entry = chosen(["fgsm"], {}, eps=0.1, norm="linf")[0]
    x, y = to_float(bars(60, 2).x), bars(60, 2).y
    x[20] = 0.5
    made = entry.bound(Standardised(trained), x, y, generator(0))
    untouched = [i for i in range(60) if torch.equal(made[i], x[i])]
    assert untouched == [20]
    assert entry.lost == 1
    checked = told.with_errors(_passed(), [entry])
    assert checked["ADV-020"].status == "FAIL"
    assert "could not run on 1 of the images measured" in checked["ADV-020"].message
    assert not checked.established


def _passed():
    """An audit in which nothing failed."""
    rule = next(rule for rule in RULES if rule.id == "ADV-020")
    one = Check("PASS", 0.0, "all ran", (), rule.id, rule.name, rule.means, rule.remedy)
    rate = wilson(5, 10)
    return Sanity((one,), True, ThreatModel(0.1), rate, rate, {}, 0)


def test_images_that_an_attack_cannot_run_on_are_found_and_counted(trained):
    """Of 256 images one has no answer and two no gradient; then none has any, which takes few tries."""
    bad = {7: "no answer", 100: "no gradient", 101: "no gradient"}
    tries = []

    def attack(model, x, y, *, generator):
        tries.append(len(x))
        for place in y.tolist():
            if place in bad:
                raise ModelError(bad[place])
        return 1 - x

    x, y = torch.rand(256, 1, 2, 2), torch.arange(256)
    entry = Entry("theirs", bind(attack))
    made = entry.bound(trained, x, y, generator(0))
    assert torch.equal(made != x, ~torch.isin(y, torch.tensor([*bad]))[:, None, None, None].expand(x.shape))
    assert (entry.lost, entry.error) == (3, "no gradient")
    bad = dict.fromkeys(range(256), "nothing")
    tries.clear()
    assert torch.equal(Entry("theirs", bind(attack)).bound(trained, x, y, generator(0)), x)
    assert len(tries) < 2 * evading.PATIENCE
    assert sum(tries) < 4 * 256


@pytest.mark.parametrize(
    ("methods", "knowledge"),
    [(["random-noise"], "transfer"), (["random-noise", "square"], "black-box"), (["square", "fgsm"], "white-box")],
)
def test_a_surrogate_is_known_of(methods, knowledge):
    entries = evading.chosen(methods, {}, eps=EPS, norm="linf")
    assert attacking._knowledge([*entries, evading.across(nn.Identity(), eps=EPS, norm="linf")]) == knowledge
