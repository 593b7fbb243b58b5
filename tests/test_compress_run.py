"""``secateur compress`` and its run: what the record says is what the networks do, and mistakes are one clear line."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch

from secateur import runs
from secateur.cli import run
from secateur.compress import Runtime, encode
from secateur.compress.pruning import pruning
from secateur.data import load_data, save_npz
from secateur.errors import MethodError
from secateur.measure import correct, predict
from secateur.methods import get
from secateur.models import core, load_bundle, quantisation_of, save
from secateur.report import to_html
from secateur.report.compression import headline
from secateur.state import generator
from secateur.types import to_float

EPS = 0.3


@pytest.fixture(scope="module")
def done(trained, bars):
    return runs.compress(
        trained, bars(90, 1), target=2.0, bits=8, arguments={"epochs": 1}, test=bars(60, 2), eps=EPS, images=30
    )


@pytest.fixture
def files(trained, bars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(trained, tmp_path / "net")
    save_npz(bars(90, 1), tmp_path / "clean.npz")
    save_npz(bars(60, 2), tmp_path / "test.npz")
    return tmp_path


COMPRESS = ["compress", "net", "--data", "clean.npz", "--test", "test.npz", "--eps", "0.05", "--images", "20", "-q"]


def test_the_record_says_what_the_networks_do(done, trained, bars):
    record = done.result
    assert record.after["accuracy"]["value"] == float(correct(done.model, bars(60, 2)).double().mean())
    found = record.details["compression"]
    assert found["times"] == pytest.approx(2, rel=0.02)
    assert found["encoded_bytes"] == [len(encode(trained)), len(encode(done.model))]
    assert found["encoded_bytes"][1] < found["encoded_bytes"][0]
    cells = {(cell["source"], cell["target"]): cell for cell in found["transfer"]}
    assert len(cells) == 4
    assert cells["before", "before"]["left"]["n"] == 30
    assert record.before["adversarial_accuracy"]["value"] <= cells["before", "before"]["left"]["value"]
    assert record.before["adversarial_accuracy"]["value"] < record.before["accuracy"]["value"]
    assert quantisation_of(done.model) is not None
    assert any("twin" in said for said in record.limitations)


def test_a_network_that_is_broken_is_told(trained, bars, done):
    broken = runs.compress(
        trained, bars(30, 1), target=25.0, arguments={"epochs": 0, "score": "random"}, test=bars(60, 2), eps=EPS, images=5
    )
    assert broken.result.after["accuracy"]["low"] <= 1 / 3
    assert "no better than chance" in broken.result.details["notes"][0]
    assert not any("no better than chance" in note for note in done.result.details["notes"])


def test_other_targets_are_measured_alike(trained, bars, done):
    given = {"arguments": {"epochs": 0, "score": "random"}, "test": bars(60, 2), "eps": EPS, "images": 30}
    wide = runs.compress(trained, bars(90, 1), target=4.0, also=(2.0,), **given)  # 4x is done first, as the strongest
    alone = runs.compress(trained, bars(90, 1), target=2.0, **given)
    before, made, other = wide.result.details["compression"]["choices"]
    assert [before["name"], made["name"], other["name"]] == ["before", "4x", "2x"]
    assert made["accuracy"] == wide.result.after["accuracy"]
    assert other["accuracy"] == alone.result.after["accuracy"]
    assert other["white_box"] == alone.result.after["adversarial_accuracy"]
    assert other["encoded_bytes"] == alone.result.details["compression"]["encoded_bytes"][1] > made["encoded_bytes"]
    cells = {(c["source"], c["target"]): c for c in alone.result.details["compression"]["transfer"]}
    assert other["transfer"] == cells["before", "after"]["left"]
    assert "choices" not in done.result.details["compression"]
    assert len(wide.result.details["compression"]["transfer"]) == 4
    page = to_html(asdict(wide.result))
    assert 'aria-label="Accuracy under attack against clean accuracy' in page
    assert page.count('class="chosen ') == 2
    with pytest.raises(MethodError, match=r"further targets must be different, and other than the target"):
        runs.compress(trained, bars(90, 1), target=2.0, also=(2.0,))


def test_another_target_that_breaks_the_network_is_told(trained, bars):
    given = {"arguments": {"epochs": 0, "score": "random"}, "test": bars(60, 2), "eps": EPS, "images": 5}
    wide = runs.compress(trained, bars(30, 1), target=1.1, also=(25.0,), **given)
    assert any(note.startswith("25x: no better than chance") for note in wide.result.details["notes"])


def test_images_can_set_the_networks_apart(done, trained, bars):
    found = done.result.details["compression"]["divergence"]
    both = correct(trained, bars(60, 2)) & correct(done.model, bars(60, 2))
    assert 0 < found["n"] <= min(30, int(both.sum()))
    assert found["value"] > 0
    assert "could be changed so that the network before stays right" in to_html(asdict(done.result))


def test_an_integer_file_is_timed_and_its_twin_is_not(done):
    runtime = done.result.details["compression"]["runtime"]
    assert runtime["latency_ms"] > 0
    assert runtime["latency_ms_before"] > 0
    assert done.result.after["latency_ms"] is None
    assert done.result.before["latency_ms"] > 0


def test_rounding_a_pruned_network_keeps_its_mask_and_says_the_same_parameters(trained, bars):
    sparse = pruning(trained, bars(90, 1), target=4.0, epochs=1, generator=generator(0))
    rounded = runs.compress(
        sparse.model, bars(90, 1), method="quantisation", arguments={"epochs": 1}, test=bars(60, 2), eps=EPS, images=5
    )
    assert {name: keep.tolist() for name, keep in rounded.mask.keep.items() if not bool(keep.all())} == {
        name: keep.tolist() for name, keep in sparse.mask.keep.items() if not bool(keep.all())
    }
    found = rounded.result.details["compression"]
    assert found["times"] == found["times_before"] == sparse.log["compression"]
    assert headline(asdict(rounded.result)).startswith("The same parameters, ")


def test_a_further_target_that_cannot_be_is_refused_before_anything_is_trained(trained, bars):
    steps = []
    given = {"arguments": {"epochs": 1}, "test": bars(60, 2), "on_step": lambda *step: steps.append(step)}
    with pytest.raises(MethodError, match=r"target compression must lie in \[1, [\d.]+\], got 1000"):
        runs.compress(trained, bars(90, 1), target=2.0, also=(1000.0,), **given)
    sparse = pruning(trained, bars(90, 1), target=4.0, epochs=0, generator=generator(0)).model
    with pytest.raises(MethodError, match=r"target must be above 3\.999, which the network has already, got 2"):
        runs.compress(sparse, bars(90, 1), target=8.0, also=(2.0,), **given)
    assert not steps


def test_every_method_says_how_much_smaller(trained, bars):
    arguments = {"score_epochs": 0, "epochs": 0, "eps": 0.0}
    made = runs.compress(
        trained, bars(90, 1), method="hydra", arguments=arguments, target=2.0, test=bars(60, 2), eps=EPS, images=5
    )
    own = list(core(made.model).parameters())
    assert headline(asdict(made.result)).startswith(
        f"{made.result.details['compression']['times']:.3g} times fewer parameters, "
    )
    left = sum(int((value != 0).sum()) for value in own)
    assert made.result.details["compression"]["times"] == pytest.approx(sum(p.numel() for p in own) / left)
    assert 1.8 < made.result.details["compression"]["times"] < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_network_on_another_device_is_compressed_and_attacked(trained, bars):
    made = runs.compress(
        deepcopy(trained).cuda(), bars(90, 1), target=2.0, bits=8, arguments={"epochs": 1}, test=bars(60, 2), eps=EPS, images=30
    )
    assert made.result.details["compression"]["divergence"]["n"] > 0


def test_the_verb_writes_a_bundle_that_keeps_its_zeros(files, capsys, schema):
    assert run([*COMPRESS, "--target", "2x", "--also", "4x", "--int8", "--set", "epochs=1", "-o", "out"]) == 0
    record = json.loads((files / "out" / "result.json").read_text())
    schema.validate(record)
    assert record["kind"] == "compress"
    out = " ".join(capsys.readouterr().out.split())
    assert "2 times fewer parameters" in out
    assert "HOW SMALL" in out
    assert "WHAT OTHER TARGETS WOULD LEAVE" in out
    assert "UNDER ATTACK, BEFORE AND AFTER" in out
    model = load_bundle(files / "out")
    assert quantisation_of(model).weight_bits == 8
    bars = load_data("test.npz")
    answers = Runtime(files / "out" / "model-int8.onnx")(to_float(bars.x))
    assert float((answers.argmax(dim=1) == predict(model, bars)).double().mean()) > 0.95
    assert (files / "out" / "model-int8.onnx").stat().st_size == record["details"]["compression"]["runtime"]["bytes"]
    assert run(["info", "out"]) == 0
    told = capsys.readouterr().out
    assert "step        pruning 1 (bits=8, epochs=" in told
    assert "quantised   weights to 8 bit, feature maps to 8 bit" in told
    assert "masks       what was cut is in masks.safetensors" in told
    assert f"ancestor    {record['inputs'][0]['sha256']}" in told
    zeros = sum(int((value == 0).sum()) for value in core(model).parameters())
    assert zeros >= sum(layer["removed"] for layer in record["details"]["layers"]) > 0
    assert run(["report", "out", "--format", "md"]) == 0
    assert "Under attack, before and after" in capsys.readouterr().out


def test_a_method_that_cuts_a_share_gets_the_share_of_a_target():
    assert runs.asked(get("compressor", "harp"), 4.0, None) == {"fraction": 0.75}
    assert runs.asked(get("compressor", "pruning"), 4.0, 8) == {"target": 4.0, "bits": 8}
    with pytest.raises(MethodError, match=r"'quantisation' has no target"):
        runs.asked(get("compressor", "quantisation"), 4.0, None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "four"], "--target must be a number from 1 on, like 4x, got 'four'"),
        (["--target", "0.5x"], "--target must be a number from 1 on"),
        (["--int8", "--bits", "4"], "--int8 is --bits 8, got --bits 4 besides"),
        (["--method", "harp", "--int8"], "'harp' does not round"),
        (["--also", "0x"], "--also must be a number from 1 on, like 4x, got '0x'"),
        (["--method", "quantisation", "--also", "4x"], "'quantisation' has no target"),
        (["--target", "2x", "--also", "2x"], "further targets must be different, and other than the target"),
        (["--method", "gab"], "did you mean 'gap'"),
        (["--target", "1000x"], "target compression must lie in"),
        (["--target", "4x", "--set", "target=2"], "target is given twice, as 4 and 2; give it once"),
        (["--int8", "--set", "bits=4"], "bits is given twice, as 8 and 4"),
        (["--method", "hydra", "--target", "4x", "--set", "fraction=0.5"], "fraction is given twice, as 0.75 and 0.5"),
    ],
)
def test_mistakes_are_one_line(files, capsys, more, said):
    assert run([*COMPRESS, *more]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (files / "out").exists()


def test_a_gate_that_fails(files, capsys):
    assert run([*COMPRESS, "--target", "25x", "--set", "epochs=0", "--max-acc-drop", "0.01", "-o", "out"]) == 1
    assert "gate failed: accuracy fell by" in capsys.readouterr().err
