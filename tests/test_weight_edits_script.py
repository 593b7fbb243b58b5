"""The script that makes the table of weight edits: right counts, all rows, and nothing computed twice."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from secateur.data import save_npz
from secateur.models import save
from secateur.prune import Resampled, adaptive
from secateur.types import to_float

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("weight_edits", ROOT / "scripts" / "weight_edits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["weight_edits"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["weight_edits"]


def test_every_row_makes_a_network(script, trained, images):
    for name, make in script.rows(0).items():
        edited = make(trained, images)
        assert torch.isfinite(edited.model(torch.rand(2, 1, 12, 12))).all()
        assert isinstance(edited.model, Resampled) == name.endswith("resampled")
        assert (edited.forward is None) == (adaptive(edited.model) is None)


def test_int8_is_attacked_by_transfer_as_published(script, trained, images):
    known, given = script.rows(0), script.Settings(20, 20, 0, 3, 1, 3, 20)
    plain, rounded = (known[name](trained, images) for name in ("none", "int8"))
    few = images.subset(torch.arange(20))
    line = script.one("int8", rounded, plain, few, "published", given)
    moved = script.published(plain, to_float(few.x), few.y, given)
    left = (script.answers(rounded, moved, 20) == few.y).double().mean()
    assert float(line["remnant_accuracy"]) == pytest.approx(float(left), abs=1e-4)


def test_a_run_goes_on_where_it_was(script, trained, images, tmp_path, monkeypatch, capsys):
    save(trained, tmp_path / "net")
    save_npz(images, tmp_path / "data.npz")
    command = ["weight_edits.py", "--model", str(tmp_path / "net"), "--data", str(tmp_path / "data.npz"), "--limit", "20"]
    command += ["--calibration", "20", "--steps", "3", "--restarts", "1", "--queries", "3", "-o", str(tmp_path / "out")]
    attacks = ["--attack", "published", "--attack", "strong"]

    def run(*more: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        script.main()
        return list(csv.DictReader((tmp_path / "out" / "cells.csv").read_text("utf-8").splitlines()))

    first = run("--rows", "none,clamp=3std", *attacks)
    assert [(line["edit"], line["attack"]) for line in first] == [
        (name, attack) for attack in ("published", "strong") for name in ("none", "clamp=3std")
    ]
    assert "pgd cross-entropy clamped" in first[3]["changed_answers_after"]
    again = run("--rows", "none,R=0.01 resampled", "--attack", "published")
    assert again[:4] == first
    assert [line["edit"] for line in again[4:]] == ["R=0.01 resampled"]
    assert all(line["n"] == line["clean_accuracy_n"] == "20" for line in again)
    with pytest.raises(SystemExit, match="holds figures of other settings"):
        run("--seed", "1")
    with pytest.raises(SystemExit, match="unknown row 'nothing'"):
        run("--rows", "nothing")
    assert capsys.readouterr().out.count("edit=") == 5
    rounded = run("--rows", "int8", *attacks)[-2:]
    assert [(line["edit"], line["attack"]) for line in rounded] == [("int8", "published"), ("int8", "strong")]
    assert "pgd dlr float" in rounded[1]["changed_answers_after"] or "pgd margin float" in rounded[1]["changed_answers_after"]
    run("--stages")
    stages = list(csv.DictReader((tmp_path / "out" / "stages.csv").read_text("utf-8").splitlines()))
    moved = {
        images: [float(line["l2"]) for line in stages if line["images"] == images] for images in ("random start", "published")
    }
    assert len(moved["published"]) == len(moved["random start"]) >= 2
    assert moved["published"][-1] > moved["random start"][-1] > 0
