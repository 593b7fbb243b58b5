"""``secateur attack`` as a person meets it: flags, exit codes, one clear line for a mistake, files written."""

import copy
import json
import re
import sys

import pytest
import torch
from torch import nn

from secateur.cli import run
from secateur.cli.options import budget
from secateur.data import save_npz
from secateur.errors import MethodError
from secateur.models import save
from secateur.types import ImageSet


@pytest.fixture
def files(trained, bars, tmp_path, monkeypatch):
    """A sound network, one whose logits are a thousand times too large, and images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    large = copy.deepcopy(trained)
    last = [module for module in large.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(1000)
        last.bias.mul_(1000)
    save(trained, tmp_path / "net")
    save(large, tmp_path / "large")
    save_npz(bars(60, 2), tmp_path / "test.npz")
    return tmp_path


FAST = ["--set", "steps=3", "--set", "queries=10", "--sweep", "0.1,0.2", "-q"]
ATTACK = ["attack", "net", "--data", "test.npz", "--eps", "0.1", *FAST]


def test_attack_writes_a_record_and_a_report(files, capsys, schema):
    assert run([*ATTACK, "-o", "out", "--surrogate", "large", "--train", "test.npz", "--fail-on", "critical"]) == 0
    assert {path.name for path in (files / "out").iterdir()} == {"result.json", "report.html"}
    record = json.loads((files / "out" / "result.json").read_text())
    schema.validate(record)
    assert [entry.get("role") for entry in record["inputs"]] == [None, "surrogate"]
    assert [point["eps"] for point in record["details"]["robustness"]["curve"]["points"]] == [0, 0.1, 0.2]
    out, err = capsys.readouterr()
    assert f"{100 * record['before']['adversarial_accuracy']['value']:.2f}" in out
    assert "WHAT WAS NOT TESTED" in out
    assert err == ""
    # measured on the images it was given as training images, and it says so
    assert "Robustness not established: 1 check failed (ADV-040 unseen images)" in " ".join(out.split())
    assert run(["report", "out", "--format", "md"]) == 0
    assert "Robustness not established" in capsys.readouterr().out


def test_a_sound_network_exits_with_0_and_json_is_the_record(files, capsys, schema):
    assert run([*ATTACK, "--json", "--min-robust", "0.05"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    schema.validate(record)
    assert (record["kind"], record["verdict"]) == ("attack", "established")
    assert record["method"]["args"]["eps"] == 0.1
    assert err == ""
    assert (files / "secateur-runs" / "latest" / "report.html").exists()


def test_a_warning_counts_if_asked(files):
    assert run([*ATTACK, "--limit", "20", "--fail-on", "medium"]) == 1  # 20 images are few


def test_a_gate_exits_with_1_and_still_writes(files, capsys):
    assert run([*ATTACK, "--min-robust", "0.99", "-o", "out"]) == 1
    assert "gate failed: robust accuracy is at most" in capsys.readouterr().err
    assert (files / "out" / "result.json").exists()


def test_a_network_that_hides_its_gradient_exits_with_1(files, capsys):
    large = ["attack", "large", "--data", "test.npz", "--eps", "0.05", *FAST]
    assert run(large) == 1
    assert " ".join(capsys.readouterr().out.split()).startswith("Robustness not established: ")
    assert run([*large, "--fail-on", "critical", "--min-robust", "0"]) == 1
    assert "gate failed: robustness is not established" in capsys.readouterr().err


def test_methods_are_chosen_by_name(files, capsys):
    chosen = ["--method", "fgsm", "--method", "random-noise", "--set", "random-noise.tries=2"]
    assert run(["attack", "net", "--data", "test.npz", "--eps", "26/255", "--sweep", "none", "-q", "--json", *chosen]) in (0, 1)
    record = json.loads(capsys.readouterr().out)
    measured = record["details"]["robustness"]
    assert [row["name"] for row in measured["attacks"]] == ["fgsm (cross-entropy)", "random-noise"]
    assert "tries=2" in measured["attacks"][1]["budget"]
    assert measured["threat"]["eps"] == 26 / 255
    assert "curve" not in measured


MISTAKES = [
    (["--eps", "8/0"], 2, "--eps must be a number above 0, like 8/255 or 0.03, got '8/0'"),
    (["--eps", "eight"], 2, "--eps must be a number above 0"),
    (["--eps", "8"], 2, "eps must lie in [0, 1], got 8: pixels go from 0 to 1, so write 8/255 for grey levels"),
    (["--eps", "-1"], 2, "--eps must be a number above 0"),
    (["--eps", "0.1", "--json", "--format", "sarif"], 2, "--json and --format sarif are two forms of one output"),
    (["--eps", "0.1", "--format", "xml"], 2, "xml"),
    (["--eps", "0.1", "--input-size", "32"], 2, "a bundle says its own input_size"),
    (["--eps", "0.1", "--method", "pdg"], 2, "did you mean 'pgd'"),
    (["--eps", "0.1", "--set", "eps=0.2"], 2, "'eps' is the same for all attacks"),
    (["--eps", "0.1", "--set", "stesp=2"], 2, "did you mean 'steps'"),
    (["--eps", "0.1", "--set", "steps=0"], 2, "steps must lie in [1,"),
    (["--eps", "0.1", "--set", "loss=dlr"], 2, "needs at least 4 classes, got 3"),
    (["--eps", "0.1", "--norm", "l3"], 2, "l3"),
    (["--eps", "0.1", "--sweep", "0.1,x"], 2, "--sweep must be a number above 0"),
    (["--eps", "0.1", "--min-robust", "40"], 2, "--min-robust must lie in [0, 1], got 40"),
    (["--eps", "0.1", "--limit", "0"], 2, "at least 1 image"),
    (["--eps", "0.1", "--limit", "6"], 3, "at least 10 images, got 6"),
    (["--eps", "0.1", "--surrogate", "nowhere"], 2, "nowhere"),
    (["--eps", "0.1", "--train", "nowhere.npz"], 2, "nowhere.npz"),
    (["--eps", "0.1", "-o", "net"], 2, "not empty; use --overwrite"),
    ([], 2, "--eps"),
]


@pytest.mark.parametrize(("flags", "code", "said"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_a_mistake_gets_one_clear_line(files, capsys, flags, code, said):
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    assert run(["attack", "net", "--data", "test.npz", "-q", *flags]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in files.rglob("*")}


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1", 1.0), ("3e-2", 0.03), (" 4 / 255 ", 4 / 255)]
)
def test_a_budget_is_a_number_or_a_fraction(text, value):
    assert budget("--eps", text) == value


@pytest.mark.parametrize(
    "text", ["", "/", "8/", "/255", "8/0", "0", "-1", "-8/255", "nan", "inf", "1e999", "8/255/2", "8//255", "1/inf"]
)
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(MethodError, match=r"--eps must be a number above 0, like 8/255 or 0.03, got "):
        budget("--eps", text)


def test_images_of_another_size_are_told_how_to_fit(files, capsys):
    save_npz(
        ImageSet(torch.zeros(30, 1, 10, 10, dtype=torch.uint8), torch.arange(30) % 3, ("a", "b", "c")), files / "small.npz"
    )
    assert run(["attack", "net", "--data", "small.npz", "--eps", "0.1", "-q"]) == 2
    assert "takes images of shape (1, 12, 12), got (1, 10, 10); use --resize" in capsys.readouterr().err


def test_a_missing_extra_is_named(files, capsys, monkeypatch):
    for name in ["pyautoattack", *(name for name in sys.modules if name.startswith("pyautoattack."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run([*ATTACK, "--method", "autoattack"]) == 2
    assert "autoattack needs pyautoattack; run: pip install secateur[robust]" in capsys.readouterr().err


def test_a_study_is_written_if_asked(files, capsys, schema):
    assert run([*ATTACK, "--study", "--limit", "30", "-o", "out"]) == 0
    record = json.loads((files / "out" / "result.json").read_text())
    schema.validate(record)
    assert record["details"]["study"]["images"] == 30
    assert "WHERE THE ATTACK MOVES THE NETWORK" in capsys.readouterr().out
    page = (files / "out" / "report.html").read_text()
    assert page.count('class="chart multiple"') == 10
    assert record["details"]["study"]["grid"]["png"] in page


def test_sarif_has_every_finding_with_its_rule(files, capsys):
    code = run(["attack", "large", "--data", "test.npz", "--eps", "0.05", *FAST, "--format", "sarif", "-o", "out"])
    assert code == 1
    log = json.loads(capsys.readouterr().out)
    record = json.loads((files / "out" / "result.json").read_text())
    [told] = log["runs"]
    assert (log["version"], told["tool"]["driver"]["name"]) == ("2.1.0", "secateur")
    assert [result["ruleId"] for result in told["results"]] == [finding["rule"] for finding in record["findings"]]
    assert "ADV-010" in {result["ruleId"] for result in told["results"]}
    rules = told["tool"]["driver"]["rules"]
    checks = {check["id"]: check for check in record["checks"]}
    for finding, result in zip(record["findings"], told["results"], strict=True):
        rule = rules[result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
        assert (
            result["level"]
            == {"medium": "warning", "high": "error"}[finding["severity"]]
            == rule["defaultConfiguration"]["level"]
        )
        assert result["message"]["text"] == finding["message"]
        assert rule["helpUri"].endswith(f"/checks.md#{rule['id'].lower()}")
        assert re.match("[a-z]+:", rule["helpUri"])  # a URI, not a path: SARIF 2.1.0, 3.49.12
        assert rule["help"]["text"] == checks[rule["id"]]["remedy"]
        assert checks[rule["id"]]["means"] in rule["shortDescription"]["text"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "large"
    assert run(["report", "out", "--format", "sarif"]) == 0
    assert json.loads(capsys.readouterr().out) == log


def test_wrong_labels_are_inconclusive(files, bars, capsys):
    data = bars(60, 2)
    data.y.copy_(data.y.roll(1))
    save_npz(data, files / "wrong.npz")
    assert run(["attack", "net", "--data", "wrong.npz", "--eps", "0.1", "-q"]) == 3
    assert "no better than always answering the commonest class" in capsys.readouterr().err


def test_help_and_list_tell_the_settings(capsys):
    assert run(["attack", "--method", "pgd", "--help"]) == 0
    assert "--set restarts=1" in capsys.readouterr().out
    assert run(["list", "evasions"]) == 0
    assert "autoattack" in capsys.readouterr().out
