"""The command line as a person meets it: exit codes, one clear line, files written, nothing lost."""

import json
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from secateur import methods
from secateur.cli import run
from secateur.data import load_data, load_trigger, save_npz, save_trigger
from secateur.methods import Method, get
from secateur.models import load_bundle, save


@pytest.fixture
def files(victim, tmp_path, monkeypatch):
    """A victim, clean and test images and a trigger on disk, and the current folder beside them."""
    monkeypatch.chdir(tmp_path)
    save(victim.model, tmp_path / "victim")
    save_npz(victim.clean, tmp_path / "clean.npz")
    save_npz(victim.test, tmp_path / "test.npz")
    save_trigger(victim.trigger, tmp_path / "trigger")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


REPAIR = ["repair", "victim", "--data", "clean.npz", "--set", "fraction=0.3", "--set", "epochs=2", "-q"]
MEASURED = [*REPAIR, "--test", "test.npz", "--trigger", "trigger", "-o", "out"]


def test_repair_writes_bundle_record_and_report(files, capsys, schema):
    assert run(MEASURED) == 0
    assert {path.name for path in (files / "out").iterdir()} >= {
        "model.safetensors", "arch.json", "README.md", "result.json", "report.html",
    }  # fmt: skip
    record = json.loads((files / "out" / "result.json").read_text())
    schema.validate(record)
    out, err = capsys.readouterr()
    assert f"{100 * record['after']['attack_success']['value']:.2f}" in out
    assert err == ""
    arch = json.loads((files / "out" / "arch.json").read_text())
    assert arch["steps"][0]["args"]["fraction"] == 0.3
    assert arch["ancestor_sha256"] == record["inputs"][0]["sha256"]
    assert load_bundle(files / "out")(torch.rand(2, 1, 12, 12)).shape == (2, 3)


def test_json_goes_to_stdout_and_nothing_else(files, capsys):
    assert run([*MEASURED, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "repair"


def test_without_a_folder_the_run_gets_one_and_latest_points_at_it(files, capsys):
    assert run(REPAIR) == 0
    latest = files / "secateur-runs" / "latest"
    assert (latest / "model" / "arch.json").exists()
    assert (latest / "report.html").exists()


def test_the_second_repair_remembers_the_first(files):
    assert run(MEASURED) == 0
    assert run(["repair", "out", "--data", "clean.npz", "--method", "fine-tuning", "--set", "epochs=1", "-q", "-o", "two"]) == 0
    steps = json.loads((files / "two" / "arch.json").read_text())["steps"]
    assert [step["method"] for step in steps] == ["norm-pruning", "fine-tuning"]


def test_gates_exit_with_1_and_still_write(files, capsys):
    assert run([*MEASURED, "--max-asr", "0", "--set", "epochs=0"]) == 1
    assert "gate failed: attack success is" in capsys.readouterr().err
    assert (files / "out" / "result.json").exists()


MISTAKES = [
    (["repair", "nowhere", "--data", "clean.npz"], 2, "nowhere"),
    (["repair", "victim", "--data", "nowhere.npz"], 2, "nowhere.npz"),
    (["repair", "victim", "--data", "clean.npz", "--method", "nrom-pruning"], 2, "did you mean 'norm-pruning'"),
    (["repair", "victim", "--data", "clean.npz", "--set", "epoch=3"], 2, "did you mean 'epochs'"),
    (["repair", "victim", "--data", "clean.npz", "--set", "epochs"], 2, "--set must be name=value"),
    (["repair", "victim", "--data", "clean.npz", "--set", "fraction=2"], 2, "fraction must lie in [0, 1], got 2"),
    (["repair", "victim", "--data", "clean.npz", "--set", "layers=conv9"], 2, "unknown layer 'conv9'"),
    (["repair", "victim", "--data", "clean.npz", "--set", "norm=l3"], 2, "unknown norm 'l3'"),
    (["repair", "victim", "--data", "clean.npz", "--set", "fraction=0.1", "--set", "drop=0.1"], 2, "not both"),
    (["repair", "victim", "--data", "clean.npz", "--set", "epochs=many"], 2, "epochs must be of type int, got 'many'"),
    (["repair", "victim", "--data", "clean.npz", "--device", "tpu"], 2, "--device must be"),
    (["repair", "victim", "--data", "clean.npz", "--threads", "0"], 2, "--threads must be at least 1"),
    (["repair", "victim", "--data", "clean.npz", "--mean", "a,b"], 2, "--mean must be numbers"),
    (["repair", "victim", "--data", "clean.npz", "--trigger", "nowhere"], 2, "nowhere"),
    (["repair", "victim", "--data", "clean.npz", "-o", "clean.npz"], 2, "is a file"),
    (["repair", "victim", "--data", "clean.npz", "-o", "trigger"], 2, "not empty; use --overwrite"),
    (["repair", "victim", "--data", "clean.npz", "--max-asr", "0.5"], 2, "--max-asr needs --trigger"),
    (["repair", "victim", "--data", "clean.npz", "--max-acc-drop", "nan"], 2, "--max-acc-drop must lie in [0, 1]"),
    (["repair", "victim", "--data", "clean.npz", "--test", "clean.npz"], 2, "all among the clean images"),
    (["repair", "victim", "--data", "clean.npz", "--set", "layers=3"], 2, "unknown layer '3'"),
    (["train", "clean.npz", "--arch", "convnet", "--set", "epochs=abc"], 2, "epochs must be of type int"),
    (["train", "clean.npz", "--arch", "convnet", "--set", "epochs=2.5"], 2, "epochs must be of type int"),
    (["repair", "victim"], 2, "--data"),
    (["repair", "victim", "--dota", "clean.npz"], 2, "--data"),
    (["repiar"], 2, "repair"),
    (["list", "repair"], 2, "did you mean 'repairs'"),
    (["poison", "clean.npz", "--set", "rate=7", "-o", "p"], 2, "rate must lie in [0, 1], got 7"),
    (["poison", "clean.npz", "--set", "target=3", "-o", "p"], 2, "target must lie in [0, 2], got 3"),
    (["poison", "clean.npz", "--preview", "p.jpg"], 2, "must name a file that ends in .png, got 'p.jpg'"),
    (["poison", "clean.npz", "--preview", "folder.png"], 2, "is a folder"),
    (["poison", "clean.npz", "--preview", "p.png", "--method", "badnts"], 2, "did you mean 'badnets'"),
    (["poison", "clean.npz", "--preview", "p.png", "--set", "rate=0.1"], 2, "--set needs exactly one --method, got 0"),
    (["poison", "clean.npz", "--preview", "p.png", "--trigger", "nowhere"], 2, "nowhere"),
    (["poison", "clean.npz", "--trigger", "trigger"], 2, "name its file with --preview"),
    (["poison", "clean.npz", "-o", "p", "--method", "badnets", "--method", "blended"], 2, "only one --method can be written"),
    (["train", "clean.npz"], 2, "train needs --arch"),
    (["train", "clean.npz", "--arch", "resnet21"], 2, "did you mean"),
    (["report", "nowhere"], 2, "nowhere"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES, ids=[" ".join(m[0][:1] + m[0][3:]) for m in MISTAKES])
def test_a_mistake_gets_one_clear_line(files, capsys, arguments, code, said):
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert before == {path: path.stat().st_mtime_ns for path in files.rglob("*") if path in before}


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit(77)",)


def test_a_file_that_would_run_code_is_refused_with_4(files, victim, capsys):
    torch.save({"state_dict": victim.model.net.state_dict(), "extra": Hostile()}, files / "hostile.pt")
    assert run(["repair", "hostile.pt", "--data", "clean.npz", "-q"]) == 4
    assert "calls builtins.exec('raise SystemExit(77)'): it may run code" in capsys.readouterr().err
    assert run(["repair", "hostile.pt", "--data", "clean.npz", "-q", "--force", "--input-size", "12", "-o", "forced"]) == 0
    record = json.loads((files / "forced" / "result.json").read_text())
    assert record["inputs"][0]["suspicious_globals"] == ["builtins.exec('raise SystemExit(77)')"]
    assert [(f["rule"], f["severity"]) for f in record["findings"]] == [("LOD-001", "critical")]


def test_a_network_that_does_no_better_than_chance_is_inconclusive(files, victim, capsys):
    save_npz(replace(victim.test, y=victim.test.y.roll(1)), files / "wrong.npz")
    assert run([*REPAIR, "--test", "wrong.npz", "-o", "out"]) == 3
    assert "no better than always answering the commonest class" in capsys.readouterr().err
    assert not (files / "out").exists()


def test_poison_train_and_repair_chain(files, capsys):
    assert run(["poison", "test.npz", "--set", "rate=0.2", "-o", "p", "-q"]) == 0
    card = json.loads((files / "p" / "card.json").read_text())
    assert card["poisoned"] == 24
    train = ["train", "p/data.npz", "--arch", "convnet", "--set", "width=4", "--set", "epochs=3", "--set", "lr=0.1"]
    assert run([*train, "--test", "test.npz", "--trigger", "p/trigger", "-o", "v", "-q", "--checkpoint", "c.pt"]) == 0
    record = json.loads((files / "v" / "result.json").read_text())
    assert record["kind"] == "train"
    assert record["after"]["attack_success"]["n"] == 80
    assert run(["report", "v", "--format", "md"]) == 0
    assert "accuracy" in capsys.readouterr().out.lower()


def test_poison_is_reproducible(files):
    for folder in ("a", "b"):
        assert run(["poison", "test.npz", "--method", "blended", "-o", folder, "-q"]) == 0
    for name in ("data.npz", "card.json", "trigger/trigger.json", "trigger/trigger.safetensors"):
        assert (files / "a" / name).read_bytes() == (files / "b" / name).read_bytes()


@pytest.fixture
def said(monkeypatch):
    """Every word written on a picture."""
    words = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        words.append(text)
        return write(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return words


def test_poison_without_output_or_preview_goes_to_poisoned(files):
    assert run(["poison", "test.npz", "-q"]) == 0
    assert json.loads((files / "poisoned" / "card.json").read_text())["method"] == "badnets"


def test_preview_shows_one_method_and_writes_nothing_else(files, capsys, said):
    before = set(files.rglob("*"))
    assert run(["poison", "test.npz", "--preview", "new/p.png", "--method", "blended", "--set", "alpha=0.5", "--json"]) == 0
    assert set(files.rglob("*")) - before == {files / "new", files / "new" / "p.png"}
    with Image.open(files / "new" / "p.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 12 * 96
    out, err = capsys.readouterr()
    [numbers] = json.loads(out)
    assert numbers["name"] == "blended"
    assert numbers["n"] == 80  # of 120 images, those that are not of the target class
    assert 0 < numbers["ssim"] < 1
    assert 0.3 < numbers["linf"] <= 0.5
    assert "picture of 1 attack written to new/p.png" in err
    assert "blended" in said
    assert f"Linf {numbers['linf']:.2f}" in said


def test_preview_shows_all_attacks_that_have_a_trigger_before_training(files, said, capsys):
    assert run(["poison", "test.npz", "--preview", "p.png", "-q"]) == 0
    assert {"badnets", "blended"} <= set(said)
    assert capsys.readouterr().err == ""
    assert not (files / "poisoned").exists()


def test_a_picture_is_not_replaced_unasked(files, capsys):
    command = ["poison", "test.npz", "--preview", "p.png", "--method", "badnets", "-q"]
    assert run(command) == 0
    before = (files / "p.png").read_bytes()
    assert run([*command, "--set", "size=5"]) == 2
    assert "is there already; use --overwrite" in capsys.readouterr().err
    assert (files / "p.png").read_bytes() == before
    assert run([*command, "--overwrite"]) == 0
    assert (files / "p.png").read_bytes() == before
    assert run([*command, "--set", "size=5", "--overwrite"]) == 0
    assert (files / "p.png").read_bytes() != before


def test_preview_with_triggers_of_victims(files, victim, said, capsys):
    save_trigger(victim.trigger, files / "mine")
    save_trigger(replace(victim.trigger, target=1), files / "other" / "trigger")
    methods = ["--method", "blended", "--method", "badnets"]
    triggers = ["--trigger", "mine", "--trigger", "other", "--trigger", "other/trigger"]
    assert run(["poison", "test.npz", "--preview", "p.png", *methods, *triggers, "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = ["blended", "badnets", "mine", "other", "other"]
    assert [row["name"] for row in rows] == names
    assert [word for word in said if word in names] == names
    assert {row["n"] for row in rows} == {40}  # the same images everywhere: neither of class 0 nor of class 1
    assert rows[1] == rows[2] | {"name": "badnets"} == rows[3] | {"name": "badnets"}


def test_preview_of_triggers_that_move_different_images(files, victim, capsys):
    save_trigger(replace(victim.trigger, sources=(1,)), files / "one")
    save_trigger(replace(victim.trigger, sources=(2,)), files / "two")
    command = ["poison", "test.npz", "--preview", "p.png", "--method", "badnets", "--trigger", "one", "--trigger", "two"]
    assert run([*command, "--json", "-q"]) == 0
    assert [row["n"] for row in json.loads(capsys.readouterr().out)] == [80, 40, 40]
    save_npz(victim.test.subset(victim.test.y != 2), files / "test.npz")
    assert run([*command, "--overwrite"]) == 3
    assert "no image is eligible for the trigger of two" in capsys.readouterr().err


def test_poison_and_preview_together(files, capsys, said):
    assert run(["poison", "test.npz", "--method", "blended", "-o", "p", "--preview", "p/picture.png", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((files / "p" / "card.json").read_text())
    assert (files / "p" / "trigger" / "trigger.json").exists()
    assert (files / "p" / "picture.png").exists()
    assert "blended" in said
    assert "badnets" not in said


def test_overwriting_a_victim_takes_its_trigger_away(files):
    train = ["train", "test.npz", "--arch", "convnet", "--set", "width=4", "--set", "epochs=1", "-o", "victim2", "-q"]
    assert run([*train, "--backdoor", "badnets"]) == 0
    assert (files / "victim2" / "trigger" / "trigger.json").exists()
    assert run([*train, "--overwrite"]) == 0
    assert not (files / "victim2" / "trigger" / "trigger.json").exists()
    assert (files / "victim2" / "result.json").exists()


CONTROLS = """
from secateur.errors import MethodError
from secateur.poison import badnets
from secateur.poison.common import unpoisoned
from secateur.types import Poisoning
def learns(data, *, generator):
    return Poisoning(None, data, unpoisoned(data), trainer=print)
def knows(data, *, generator):
    return Poisoning(badnets(data, generator=generator).trigger, data, unpoisoned(data), trainer=print)
def cannot(data, *, generator):
    raise MethodError("these images are too small")
"""


@pytest.fixture
def attackers(files, monkeypatch):
    """Attacks of an installed package: two that control training, and one that takes other images only."""
    (files / "controls.py").write_text(CONTROLS)
    monkeypatch.syspath_prepend(files)
    rows = [
        Method("backdoor", name, f"controls:{name}", 1, "paper", access=access)
        for name, access in (("learns", "training"), ("knows", "training"), ("cannot", "images"))
    ]
    points = [SimpleNamespace(load=partial(copy, row)) for row in rows]
    monkeypatch.setattr(methods, "TABLE", [row for row in methods.TABLE if row.name == "badnets"])
    monkeypatch.setattr(methods, "entry_points", lambda group: points)
    methods.table.cache_clear()
    yield
    methods.table.cache_clear()
    sys.modules.pop("controls", None)


@pytest.mark.parametrize("name", ["learns", "knows"])
@pytest.mark.parametrize("told", [True, False], ids=["by the table", "by the attack"])
def test_an_attack_that_controls_training_is_not_written(files, attackers, capsys, monkeypatch, name, told):
    if told:  # refused without looking at the images
        assert run(["poison", "nowhere.npz", "--method", name]) == 2
        assert "controls training" in capsys.readouterr().err
    else:
        row = replace(get("backdoor", name), access="images")
        monkeypatch.setattr("secateur.cli.poison.get", lambda kind, name: row)
    for output in (["-o", "p"], []):
        assert run(["poison", "test.npz", "--method", name, *output]) == 2
        err = capsys.readouterr().err
        assert f"'{name}' controls training" in err
        assert f"use secateur train --backdoor {name}" in err
        assert err.count("\n") == 1
    assert not (files / "p").exists()
    assert not (files / "poisoned").exists()


def test_preview_of_attacks_that_control_training(files, attackers, said, capsys):
    assert run(["poison", "test.npz", "--preview", "p.png", "--method", "knows", "-q"]) == 0
    assert "knows" in said
    assert run(["poison", "test.npz", "--preview", "q.png", "--method", "learns"]) == 2
    assert "'learns' learns its trigger in training" in capsys.readouterr().err
    assert run(["poison", "test.npz", "--preview", "q.png", "--method", "cannot"]) == 2
    assert "these images are too small" in capsys.readouterr().err
    assert not (files / "q.png").exists()
    said.clear()
    assert run(["poison", "test.npz", "--preview", "q.png"]) == 0
    assert "cannot is left out: these images are too small" in capsys.readouterr().err
    assert {"badnets", "knows"} <= set(said)
    assert not {"learns", "cannot"} & set(said)


def test_list_tells_what_a_backdoor_needs_and_how_visible_it_is(capsys):
    row = get("backdoor", "badnets")
    assert run(["list", "backdoors", "badnets"]) == 0
    text = capsys.readouterr().out
    assert row.paper in text
    assert f"access: {row.access}; visibility: {row.visibility}" in text
    assert run(["list", "backdoors", "--json"]) == 0
    told = {found["name"]: found for found in json.loads(capsys.readouterr().out)}
    for row in methods.table("backdoor"):
        found = told[row.name]
        assert (found["paper"], found["access"], found["visibility"]) == (row.paper, row.access, row.visibility)
    assert run(["list", "scores", "--json"]) == 0
    assert not {"access", "visibility"} & set(json.loads(capsys.readouterr().out)[0])


def test_list_shows_settings_and_help_works(files, capsys):
    assert run(["list", "repairs", "norm-pruning"]) == 0
    assert "--set layers='late'" in capsys.readouterr().out
    assert run(["repair", "--method", "norm-pruning", "--help"]) == 0
    assert "layers" in capsys.readouterr().out


def test_an_unexpected_error_is_not_mistaken_for_findings(files, capsys, monkeypatch):
    monkeypatch.setattr("secateur.runs.repair", lambda *a, **k: 1 / 0)
    assert run(REPAIR) == 2
    assert "unexpected ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run([*REPAIR, "--debug"])


def test_ctrl_c_exits_with_130(files, capsys, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.runs.repair", stop)
    assert run(REPAIR) == 130


OWN = """
from torch import nn
def make():
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(200, 3))
def wrong():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 7))
"""


def test_a_network_of_ones_own_goes_through_every_verb(files, capsys):
    (files / "own.py").write_text(OWN)
    arch = ["--arch", "own.py:make"]
    recipe = [flag for setting in ("epochs=12", "lr=0.1", "batch_size=20", "augment=()") for flag in ("--set", setting)]
    assert run(["train", "test.npz", *arch, *recipe, "-o", "net", "-q"]) == 0
    assert json.loads((files / "net" / "arch.json").read_text())["arch"]["factory"]["ref"] == "own.py:make"
    assert run(["info", "net"]) == 0
    assert "of its author's code own.py:make" in capsys.readouterr().out
    assert run(["repair", "net", *REPAIR[2:], "-o", "no"]) == 4
    assert run(["repair", "net", *REPAIR[2:], *arch, "-o", "out"]) == 0
    assert run(["repair", "out", *REPAIR[2:], *arch, "-o", "again"]) == 0
    torch.save(load_bundle(files / "net", factory="own.py:make").net.state_dict(), files / "own.pt")
    assert run(["convert", "own.pt", *arch, "--input-size", "12", "-o", "converted"]) == 0
    assert run(["train", "clean.npz", "--arch", "own.py:wrong", *recipe, "-o", "x", "-q"]) == 2
    assert "one logit per class (3), got 7" in capsys.readouterr().err


def test_train_puts_a_backdoor_in_and_records_it(files, capsys):
    train = ["train", "test.npz", "--arch", "convnet", "--set", "width=4", "--set", "epochs=2", "--test", "clean.npz"]
    assert run([*train, "--backdoor", "blended", "--poison", "rate=0.3", "--poison", "target=1", "-o", "v", "-q"]) == 0
    record = json.loads((files / "v" / "result.json").read_text())
    told = record["details"]["backdoor"]
    assert (told["name"], told["args"]["rate"], told["args"]["target"], told["poisoned"]) == ("blended", 0.3, 1, 36)
    assert record["after"]["attack_success"]["n"] == sum(load_data("clean.npz").y != 1)
    assert record["details"]["trigger"]["visibility"]["ssim"] < 0.99
    assert load_trigger(files / "v").target == 1
    assert run(["report", "v", "--format", "md"]) == 0
    shown = capsys.readouterr().out
    assert "blended (version 2); 36 training images were changed beforehand" in shown
    assert "SSIM" in shown
    assert run(["repair", "v", *REPAIR[2:-1], "--trigger", "v", "-o", "w"]) in (0, 3)


@pytest.mark.parametrize(("flags", "message"), [
    (["--backdoor", "badnetz"], "unknown backdoor method 'badnetz'; did you mean 'badnets'"),
    (["--backdoor", "badnets", "--poison", "sice=3"], "unknown setting of 'badnets' 'sice'; did you mean 'size'"),
    (["--backdoor", "badnets", "--poison", "rate"], "--poison must be name=value, got 'rate'"),
    (["--poison", "rate=0.1"], "--poison sets a backdoor; name one with --backdoor"),
    (["--backdoor", "badnets", "--trigger", "trigger"], "not both"),
])  # fmt: skip
def test_a_backdoor_that_cannot_be_put_in(files, capsys, flags, message):
    assert run(["train", "test.npz", "--arch", "convnet", *flags, "-o", "v"]) == 2
    assert message in capsys.readouterr().err
    assert not (files / "v").exists()
