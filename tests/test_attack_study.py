"""The layer study of ``secateur attack``: it is the library's, costs nothing unasked, and says why where there is none."""

import base64
import copy
import io
import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from torch import nn

from secateur import runs
from secateur.attack import fgsm, random_noise
from secateur.errors import ModelError
from secateur.measure import ThreatModel, bind, layer_study, stage_weights
from secateur.report import render, to_json
from secateur.runs import studying
from secateur.runs.evading import Entry, chosen
from secateur.runs.studying import look_inside
from secateur.state import generator

EPS = 0.1
QUICK = {"arguments": {"steps": 3, "queries": 10}, "images": 20, "sweep": (), "eps": EPS}


def studied(model, data, method="pgd", **changed):
    [entry] = chosen((method,), {}, eps=EPS, norm="linf")
    found, why = look_inside(model, data, entry, ThreatModel(EPS), generator=generator(0), **changed)
    assert found is not None, why
    return found


class Pair(nn.Module):
    """A stage that hands on two tensors."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))
            self.head.bias.zero_()
        self.first = Twice(net)
        del self.net

    def forward(self, x):
        return self.head(self.first(x)[0])


class Twice(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        answer = self.net(x)
        return answer, answer


@pytest.fixture(scope="module")
def measured(trained, bars):
    return runs.attack(trained, bars(60, 2), study=True, **QUICK)


def test_the_record_obeys_the_schema_and_every_rendering_takes_it(measured, schema):
    record = json.loads(to_json(measured.result))
    schema.validate(record)
    study = record["details"]["study"]
    assert [stage["stage"] for stage in study["stages"]] == ["bn1", "bn2", "bn3", "bn4", "linear"]
    assert study["images"] == 60
    assert 0 <= study["stood"] < study["right"] <= 60
    assert all(sum(stage["clean"]) == sum(stage["adversarial"]) for stage in study["stages"])
    assert record["cost"]["study_seconds"] > 0
    assert any(
        "The layer study looked at 60 of 60 images, under pgd (cross-entropy) alone." in s for s in record["limitations"]
    )
    assert "moves most" in render(record, "text")
    assert all(render(record, format) for format in ("html", "md", "sarif"))


def test_nothing_is_done_unasked(trained, bars, measured, monkeypatch):
    monkeypatch.setattr(studying, "craft", lambda *_, **__: pytest.fail("attacked for a study"))
    record = runs.attack(trained, bars(60, 2), **QUICK).result
    assert "study" not in record.details
    assert "study_seconds" not in record.cost
    assert record.before["adversarial_accuracy"] == measured.result.before["adversarial_accuracy"]


def test_numbers_are_those_of_the_library(trained, bars):
    data = bars(12, 2)
    found = studied(trained, data, method="fgsm")
    [(x, y)] = data.batches()
    adversarial = fgsm(trained, x, y, eps=EPS, generator=generator(0))
    truth = layer_study(trained, data.x, adversarial, bins=studying.BINS)
    for stage, told in zip(truth, found["stages"], strict=True):
        assert told["clean"] == list(stage.clean.counts)
        assert told["adversarial"] == list(stage.adversarial.counts)
        assert told["l2"] == pytest.approx(asdict(stage.l2), rel=1e-5)
        assert told["largest"] == pytest.approx(stage.largest, rel=1e-5)
        assert told["edges"] == [stage.clean.edges[0], stage.clean.edges[-1]]
        assert told["channels"] == len(stage.channels)
        assert [m["shift"] for m in told["moved"]] == pytest.approx(sorted(stage.channels, reverse=True)[:5], rel=1e-5)
        assert all(stage.channels[m["channel"]] == pytest.approx(m["shift"], rel=1e-5) for m in told["moved"])
    assert [w["counts"] for w in found["weights"]] == [
        list(w.values.counts) for w in stage_weights(trained, bins=studying.BINS)
    ]


def test_only_some_images_are_looked_at(trained, bars):
    assert studied(trained, bars(60, 2), images=9)["images"] == 9


def test_the_picture_shows_what_the_attack_added(trained, bars):
    grid = studied(trained, bars(60, 2))["grid"]
    picture = Image.open(io.BytesIO(base64.b64decode(grid["png"].partition(",")[2])))
    assert picture.size == (2 * (8 * 14 + 2), 2 * (3 * 14 + 2))
    assert len(grid["images"]) == 8
    assert grid["scale"] == pytest.approx(0.5 / EPS, rel=1e-3)
    assert grid["shrunk"] == 1


def test_a_picture_too_large_has_fewer_images_and_then_smaller_ones(monkeypatch):
    noise = torch.rand(8, 3, 64, 64, generator=generator(0))
    monkeypatch.setattr(studying, "LARGEST", 100_000)
    grid = studying._picture(noise, noise.flip(0), torch.arange(8))["grid"]
    assert (len(grid["images"]), grid["shrunk"]) == (2, 1)
    monkeypatch.setattr(studying, "LARGEST", 12_000)
    grid = studying._picture(noise, noise.flip(0), torch.arange(8))["grid"]
    assert (len(grid["images"]), grid["shrunk"]) == (1, 2)
    assert studying._picture(noise[:, :2], noise[:, :2], torch.arange(8)) == {}


def test_a_network_whose_stages_cannot_be_watched_gets_a_note(trained, bars, schema):
    odd = copy.deepcopy(trained)
    odd.net = Pair(odd.net).eval()
    run = runs.attack(odd, bars(60, 2), study=True, **QUICK)
    schema.validate(json.loads(to_json(run.result)))
    assert "study" not in run.result.details
    [note] = run.result.details["notes"]
    assert note.startswith("The layer study was not made: a layer to look at must return one tensor each time")
    assert note in " ".join(render(json.loads(to_json(run.result)), "text").split())


def test_an_attack_that_cannot_run_gets_a_note(trained, bars):
    def broken(model, x, y, *, generator):
        raise ModelError("no gradient today")

    found, why = look_inside(trained, bars(12, 2), Entry("broken", bind(broken)), ThreatModel(EPS), generator=generator(0))
    assert found is None
    assert why == "broken could not run on 12 of 12 images: no gradient today"


def test_what_an_attack_lost_elsewhere_is_nothing_to_the_study(trained, bars):
    entry = Entry("noise", bind(random_noise, eps=EPS))
    entry.reasons["no answer"] = 3
    found, why = look_inside(trained, bars(12, 2), entry, ThreatModel(EPS), generator=generator(0))
    assert why == ""
    assert found["images"] == 12
    assert entry.lost == 3


def test_the_network_and_the_random_state_are_left_alone(trained, bars):
    model = copy.deepcopy(trained).train()
    model.net.bn2.eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = studied(model, bars(12, 2)), studied(model, bars(12, 2))
    assert first == second
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_very_many_stages_are_thinned():
    names = [f"stage{i}" for i in range(200)]
    kept = studying._spread(names)
    assert len(kept) == len(set(kept)) == studying.STAGES
    assert (kept[0], kept[-1]) == ("stage0", "stage199")
    assert studying._spread(names[:5]) == tuple(names[:5])
