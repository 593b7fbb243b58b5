"""The command line as a person meets it: exit codes, one clear line, files written, nothing lost."""

import json
from dataclasses import replace

import pytest
import torch

from secateur.cli import run
from secateur.data import load_data, load_trigger, save_npz, save_trigger
from secateur.models import load_bundle, save


@pytest.fixture
def files(victim, tmp_path, monkeypatch):
    """A victim, clean and test images and a trigger on disk, and the current folder beside them."""
    monkeypatch.chdir(tmp_path)
    save(victim.model, tmp_path / "victim")
    save_npz(victim.clean, tmp_path / "clean.npz")
    save_npz(victim.test, tmp_path / "test.npz")
    save_trigger(victim.trigger, tmp_path / "trigger")
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
