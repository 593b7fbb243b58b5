"""``secateur info`` and ``secateur convert``: what they print, how they end, and that they agree with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from email.message import Message
from importlib.resources import files as resources
from typing import Any

import jsonschema
import pytest
import safetensors.torch
import torch

from secateur.cli import run
from secateur.intake.findings import RULES
from secateur.intake.inspect import inspect
from secateur.models import build, load_bundle, save, wrap
from secateur.report import sarif
from secateur.report.sarif import LEVELS

SCHEMA = json.loads(resources("secateur.intake").joinpath("info.schema.json").read_text("utf-8"))


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


class Own:
    def __init__(self) -> None:
        self.x = 1


def script(net: torch.nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(net, torch.rand(1, 3, 32, 32)).save("script.pt")


@pytest.fixture(scope="module")
def net():
    return build("resnet20", width=2).eval()


@pytest.fixture
def folder(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": net.state_dict(), "epoch": 7, "acc": float("nan")}, tmp_path / "good.pt")
    torch.save({"state_dict": net.state_dict(), "x": Shell()}, tmp_path / "hostile.pt")
    torch.save({"state_dict": net.state_dict(), "x": Own()}, tmp_path / "unknown.pt")
    torch.save(net, tmp_path / "whole.pt")
    spoilt = {name: value.clone() for name, value in net.state_dict().items()}
    spoilt["conv1.weight"][0] = float("nan")
    torch.save(spoilt, tmp_path / "nan.pt")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "good.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    return tmp_path


def record(capsys, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(["info", *arguments, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return code, found


def test_a_good_file(folder, capsys):
    code, found = record(capsys, "good.pt")
    assert code == 0
    assert (found["format"], found["verdict"], found["why"], found["findings"]) == ("torch-zip", "readable", None, [])
    assert found["architecture"]["name"] == "resnet20"
    assert found["architecture"]["kwargs"]["width"] == 2
    assert found["facts"]["epoch"] == 7
    assert found["facts"]["acc"] == "nan"
    assert len(found["tensors"]) == len(build("resnet20", width=2).state_dict())
    assert found["globals"][0] == "collections.OrderedDict"
    assert record(capsys, "good.safetensors")[1]["weights_sha256"] == found["weights_sha256"]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "rules"),
    [
        ("good.pt", (), 0, set()),
        ("good.pt", ("--fail-on", "info"), 0, set()),
        ("hostile.pt", (), 4, {"LOD-001"}),
        ("unknown.pt", (), 0, {"LOD-002"}),
        ("unknown.pt", ("--fail-on", "medium"), 1, {"LOD-002"}),
        ("whole.pt", (), 0, {"LOD-003"}),
        ("whole.pt", ("--fail-on", "info"), 1, {"LOD-003"}),
        ("nan.pt", (), 1, {"LOD-008"}),
        ("nan.pt", ("--fail-on", "critical"), 0, {"LOD-008"}),
    ],
)
def test_exit_codes(folder, capsys, name, arguments, code, rules):
    found = record(capsys, name, "--quick", *arguments)
    assert found[0] == code
    assert {finding["rule"] for finding in found[1]["findings"]} == rules
    assert not (folder / "canary").exists()


def test_refusal_is_told_on_both_streams(folder, capsys):
    assert run(["info", "hostile.pt"]) == 4
    out, err = capsys.readouterr()
    assert "REFUSED" in out
    assert "critical  LOD-001  calls posix.system('touch canary')" in out
    assert err.count("\n") == 1
    assert err.startswith("secateur: error: hostile.pt calls posix.system('touch canary'): it may run code")


def test_text(folder, capsys):
    assert run(["info", "good.pt"]) == 0
    out = capsys.readouterr().out
    assert "good.pt: readable here, running nothing of it" in out
    assert "network     resnet20(width=2, classes=10, in_channels=3, option=A)" in out
    assert "conv1.weight" in out
    assert "linear.bias" not in out
    run(["info", "good.pt", "--all", "--quick"])
    assert "linear.bias" in capsys.readouterr().out


def test_files_that_are_no_checkpoint_end_with_2(folder, capsys):
    for name in ("text.pt", "missing.pt"):
        assert run(["info", name]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["hostile.pt", "unknown.pt", "whole.pt", "nan.pt", "good.pt"])
def test_sarif(folder, capsys, name):
    run(["info", name, "--format", "sarif", "--quick"])
    log = json.loads(capsys.readouterr().out)
    assert log["version"] == "2.1.0"
    found = log["runs"][0]
    rules = found["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == sorted({result["ruleId"] for result in found["results"]})
    for result in found["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == LEVELS[RULES[result["ruleId"]].severity]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == name
    assert len(found["results"]) == len(inspect(folder / name, match=False).findings)


def test_very_many_steps_are_cut_short(trained, tmp_path, capsys):
    save(trained, tmp_path / "long", steps=[{"method": f"m{i}", "version": 1, "args": {"a": "x" * 500}} for i in range(30)])
    run(["info", str(tmp_path / "long")])
    told = capsys.readouterr().out
    assert told.count("  step  ") == 13
    assert "... and 18 more (--all)" in told
    assert max(map(len, told.splitlines())) < 300
    run(["info", str(tmp_path / "long"), "--all"])
    assert capsys.readouterr().out.count("  step  ") == 30


def test_edits_of_feature_maps_are_told(trained, tmp_path, capsys):
    edits = [
        {"after": "bn1", "kind": "round", "decimals": 2},
        {"after": "bn2", "kind": "clamp", "low": -1.0, "high": 0.5},
    ]
    save(wrap(trained, edits), tmp_path / "edited")
    save(trained, tmp_path / "plain")
    code, found = record(capsys, str(tmp_path / "edited"))
    assert code == 0
    assert found["facts"]["wrappers"] == edits
    for quick in ([], ["--quick"]):
        run(["info", str(tmp_path / "edited"), *quick])
        assert "  wrappers    rounded to 2 decimals after bn1; clamped to [-1, 0.5] after bn2\n" in capsys.readouterr().out
    run(["info", str(tmp_path / "plain")])
    assert "wrappers" not in capsys.readouterr().out


def test_many_edits_are_cut_short_unless_all_are_wanted(trained, tmp_path, capsys):
    save(wrap(trained, [{"after": "bn1", "kind": "round", "decimals": 2}] * 20), tmp_path / "edited")
    run(["info", str(tmp_path / "edited")])
    assert "; and 8 more (--all)\n" in capsys.readouterr().out
    run(["info", str(tmp_path / "edited"), "--all"])
    assert capsys.readouterr().out.count("rounded to 2 decimals") == 20


def test_rules_of_the_door_have_an_address(folder, capsys):
    run(["info", "hostile.pt", "--format", "sarif", "--quick"])
    [rule] = json.loads(capsys.readouterr().out)["runs"][0]["tool"]["driver"]["rules"]
    assert rule["helpUri"].endswith("/threat-model.md#lod-001")


@pytest.mark.parametrize(
    ("urls", "wanted"),
    [
        (
            ["Homepage, https://a.example", "Documentation, https://docs.example/here/"],
            "https://docs.example/here/checks.md#adv-010",
        ),
        (["Homepage, https://a.example"], "urn:secateur:docs/checks.md#adv-010"),
        (None, "urn:secateur:docs/checks.md#adv-010"),
    ],
)
def test_addresses_begin_with_the_package_s_own_url(urls, wanted, monkeypatch):
    told = Message()
    for url in urls or ():
        told["Project-URL"] = url
    monkeypatch.setattr(sarif, "metadata", lambda name: told)
    sarif.docs_home.cache_clear()
    try:
        assert sarif.help_uri("ADV-010") == wanted
        assert sarif.help_uri("XYZ-010") is sarif.help_uri("ADV-010 <b>") is None
    finally:
        sarif.docs_home.cache_clear()


def test_paths_become_addresses():
    log = json.loads(sarif.to_sarif([], rules={}, file="a b/\u00fc%\ud800.pt", version="1"))
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "a%20b/%C3%BC%25%3F.pt"
    log = json.loads(sarif.to_sarif([], rules={}, file="/a b", version="1"))
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "file:///a%20b"


@pytest.mark.parametrize("name", ["good.pt", "hostile.pt", "whole.pt"])
def test_looking_needs_no_torch(folder, name):
    code = f"import sys; from secateur.cli import run; run(['info', {name!r}, '--quick']); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


def test_refused_files_need_no_torch_either(folder):
    code = (
        "import sys; from secateur.cli import run; c = run(['info', 'hostile.pt']); sys.exit(c + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 4


def test_convert(folder, net, capsys):
    assert run(["convert", "good.pt", "-o", "bundle", "--json", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["origin"]["format"] == "torch-zip"
    assert told["origin"]["loader"] == "data"
    model = load_bundle(folder / "bundle")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), net((x - 0.5) / 0.2))
    fields = json.loads((folder / "bundle" / "arch.json").read_text())
    assert fields["ancestor_sha256"] == told["origin"]["sha256"]
    code, found = record(capsys, "bundle")
    assert (code, found["format"], found["architecture"]["name"]) == (0, "bundle", "resnet20")
    assert run(["convert", "bundle", "-o", "again"]) == 0
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "bundle" / "model.safetensors").read_bytes()
    assert run(["convert", "good.pt", "-o", "bundle"]) == 2
    assert run(["convert", "good.pt", "-o", "bundle", "--overwrite"]) == 0


def test_convert_refuses_and_takes_weights_when_forced(folder, net, capsys):
    assert run(["convert", "hostile.pt", "-o", "out"]) == 4
    assert not (folder / "out").exists()
    assert run(["convert", "hostile.pt", "-o", "out", "--force"]) == 0
    assert "critical: LOD-001: calls posix.system('touch canary')" in capsys.readouterr().err
    assert not (folder / "canary").exists()
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_bundle(folder / "out")(x), net(x))


def test_convert_names_classes(folder, capsys):
    (folder / "names.txt").write_text("\n".join("abcdefghij") + "\n")
    assert run(["convert", "good.pt", "-o", "a", "--classes", "names.txt"]) == 0
    assert run(["convert", "good.pt", "-o", "b", "--classes", ",".join("abcdefghij")]) == 0
    assert load_bundle(folder / "a").classes == load_bundle(folder / "b").classes == tuple("abcdefghij")
    assert run(["convert", "good.pt", "-o", "c", "--classes", "a,b"]) == 2
    assert "one name per output (10), got 2" in capsys.readouterr().err


def test_convert_keeps_the_steps_of_a_bundle(folder, net):
    run(["convert", "good.pt", "-o", "first"])
    step = {"method": "norm-pruning", "version": 1, "args": {}}
    save(load_bundle(folder / "first"), folder / "second", steps=[step])
    assert run(["convert", "second", "-o", "third"]) == 0
    assert json.loads((folder / "third" / "arch.json").read_text())["steps"] == [step]


def test_wrong_checksums(folder, net, capsys):
    content = bytearray((folder / "good.pt").read_bytes())
    place = content.index(net.state_dict()["linear.bias"].numpy().tobytes())
    content[place] ^= 1
    (folder / "bent.pt").write_bytes(content)
    assert run(["info", "bent.pt", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "bent.pt: unusable" in out
    assert "high      LOD-007  the checksum of 'data/" in out
    assert run(["info", "bent.pt", "--quick", "--fail-on", "critical"]) == 1
    assert run(["convert", "bent.pt", "-o", "x"]) == 2
    assert run(["convert", "bent.pt", "-o", "x", "--force"]) == 0
    hostile = bytearray((folder / "hostile.pt").read_bytes())
    hostile[hostile.index(net.state_dict()["linear.bias"].numpy().tobytes())] ^= 1
    (folder / "both.pt").write_bytes(hostile)
    assert run(["info", "both.pt", "--quick"]) == 4


def test_programs_are_refused_without_being_opened(folder, net, capsys):
    script(net)
    assert run(["info", "script.pt"]) == 4
    out, err = capsys.readouterr()
    assert "LOD-004" in out
    assert "--sandbox takes its weights in a sandbox" in err


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--sandbox", "--trust-code"])
def test_programs_are_converted_on_request(folder, net, flag, capsys):
    from secateur.intake.sandbox import available

    if flag == "--sandbox" and available() is None:
        pytest.skip("there is no sandbox on this machine")
    script(net)
    assert run(["convert", "script.pt", "-o", "out", flag, "--json"]) == 0
    loader = json.loads(capsys.readouterr().out)["origin"]["loader"]
    assert loader.startswith("sandbox (" if flag == "--sandbox" else "trusted code")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_bundle(folder / "out")(x), net(x))


@pytest.fixture
def hub(folder, net):
    """A folder as Hugging Face keeps it, its weights in two files."""
    home = folder / "hub"
    home.mkdir()
    names = list(net.state_dict())
    parts = {"model-1.safetensors": names[:50], "model-2.safetensors": names[50:]}
    for file, mine in parts.items():
        safetensors.torch.save_file({name: net.state_dict()[name] for name in mine}, home / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    (home / "config.json").write_text(json.dumps({"id2label": {str(i): f"class {i}" for i in range(10)}}))
    return home


def test_folders_of_the_hub(hub, net, capsys):
    code, found = record(capsys, "hub")
    assert (code, found["format"], found["architecture"]["name"]) == (0, "huggingface", "resnet20")
    assert found["facts"]["files"] == ["model-1.safetensors", "model-2.safetensors"]
    assert run(["convert", "hub", "-o", "out"]) == 0
    model = load_bundle("out")
    assert model.classes[3] == "class 3"
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(x), net(x))


def test_the_digest_of_a_folder_is_that_of_all_its_files(hub, capsys):
    before = record(capsys, "hub", "--quick")[1]["sha256"]
    part = {name: value + 1 for name, value in safetensors.torch.load_file(hub / "model-2.safetensors").items()}
    safetensors.torch.save_file(part, hub / "model-2.safetensors")
    assert record(capsys, "hub", "--quick")[1]["sha256"] != before


def test_a_tensor_in_two_files_of_a_folder_is_refused(hub, capsys):
    part = safetensors.torch.load_file(hub / "model-2.safetensors") | safetensors.torch.load_file(hub / "model-1.safetensors")
    safetensors.torch.save_file(part, hub / "model-2.safetensors")
    assert run(["info", "hub", "--quick"]) == 2
    assert "must hold each tensor in one of its files" in capsys.readouterr().err


def test_a_program_in_a_folder_is_named(hub, net, capsys):
    for file in hub.iterdir():
        file.unlink()
    script(net)
    (hub.parent / "script.pt").rename(hub / "pytorch_model.bin")
    assert run(["convert", "hub", "-o", "out"]) == 4
    assert "pytorch_model.bin is a TorchScript program" in capsys.readouterr().err


@pytest.mark.usefixtures("vision")
def test_a_folder_that_names_another_network_is_told(hub, capsys):
    (hub / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 10}))
    code, found = record(capsys, "hub")
    assert code == 0
    assert found["architecture"] is None
    assert "not those of timm:resnet18" in found["unmatched"]


def test_a_bundle_of_the_zoo_takes_no_code(folder, capsys):
    run(["convert", "good.pt", "-o", "bundle"])
    assert run(["convert", "bundle", "--arch", "own.py:make", "-o", "x"]) == 2
    assert "a bundle says its own arch" in capsys.readouterr().err


def test_sizes_of_images_are_bounded(folder, capsys):
    assert run(["convert", "good.pt", "--input-size", "100000", "-o", "x"]) == 2
    assert "input_size must lie in [1, 4096]" in capsys.readouterr().err
