"""The choice of somebody who knows the trigger: lowest attack success within the accuracy allowed, and only in plans."""

from __future__ import annotations

import ast
import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import secateur
from secateur.bench.nodes import expand
from secateur.bench.oracle import AT_MOST, choose, load_path, save_path
from secateur.bench.plan import read_plan
from secateur.bench.source import digest
from secateur.cli import run
from secateur.errors import MethodError
from secateur.measure import evaluate, wilson
from secateur.prune import Fraction, apply_mask, magnitude, rank
from secateur.repair import norm_pruning
from secateur.state import generator
from secateur.types import Candidate, ChannelMask, Repaired, SoftMask, WeightMask

PLAN = """
format = 1
[data]
name = "fashion-mini"
clean = 0.2
train_limit = 300
test_limit = 100
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
[[backdoor]]
name = "none"
[train]
epochs = 1
[measure]
metrics = ["accuracy", "attack_success", "retuned_attack_success"]
[[repair]]
name = "rnp"
label = "RNP"
oracle = 0.2
unlearn_epochs = 2
epochs = 2
"""


@pytest.fixture
def masks(victim):
    scores = magnitude.random(victim.model, victim.clean, granularity="channel", generator=generator(1))
    ranking = rank(scores, scope="global")
    return [ranking.cut(Fraction(i / 10)) for i in range(10)]


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.9])
def test_the_lowest_success_within_the_accuracy_allowed(drop, victim, masks):
    found = [evaluate(apply_mask(victim.model, mask), victim.test, trigger=victim.trigger) for mask in masks]
    allowed = [i for i, each in enumerate(found) if each.accuracy.value >= found[0].accuracy.value - drop - 1e-9]
    expected = min(allowed, key=lambda i: (found[i].attack_success.value, i))
    chosen, measured = choose(victim.model, masks, victim.test, victim.trigger, drop=drop, generator=generator(0))
    assert chosen == expected
    assert measured == found[expected]


def repaired(model, masks, chosen):
    """What a repair returns that considered these masks, and then the one it chose."""
    rate = wilson(1, 2)
    cut = model if isinstance(chosen, SoftMask | WeightMask) else apply_mask(model, chosen)
    return Repaired(cut, chosen, tuple(Candidate(0.1, 1, mask, rate) for mask in [*masks, chosen]))


def test_a_path_comes_back_with_its_ends(tmp_path, victim, masks, monkeypatch):
    save_path(victim.model, repaired(victim.model, masks * 3, masks[4]), tmp_path)
    again = load_path(tmp_path)
    assert len(again) == AT_MOST
    for saved, read in ((masks[0], again[0]), (masks[4], again[-1])):
        assert isinstance(read, ChannelMask)
        assert all(torch.equal(saved.keep[name], read.keep[name]) for name in saved.keep)
    weights = WeightMask({"a/b.weight": torch.tensor([[True, False]]).expand(3, 2)})
    monkeypatch.setattr("secateur.bench.oracle.apply_mask", lambda model, mask: model)
    save_path(victim.model, replace(repaired(victim.model, [], weights), model=victim.model), tmp_path)
    [read] = load_path(tmp_path)
    assert isinstance(read, WeightMask)
    assert torch.equal(read.keep["a/b.weight"], weights.keep["a/b.weight"])


@pytest.mark.parametrize("mask", [None, SoftMask({"a": torch.ones(2)})])
def test_a_repair_without_cuts_has_nothing_to_choose_from(mask, victim, tmp_path):
    with pytest.raises(MethodError, match=r"^this repair considers no cuts"):
        save_path(victim.model, Repaired(victim.model, mask), tmp_path)


def test_a_repair_that_heals_is_more_than_its_cuts(victim, tmp_path):
    healed = norm_pruning(victim.model, victim.clean, drop=0.1, epochs=1, generator=generator(0))
    with pytest.raises(MethodError, match=r"^this repair does more than cut"):
        save_path(victim.model, healed, tmp_path)
    save_path(victim.model, norm_pruning(victim.model, victim.clean, drop=0.1, epochs=0, generator=generator(0)), tmp_path)


def test_a_repair_without_a_drop_has_no_such_row(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace('name = "rnp"', 'name = "clp"').partition("unlearn")[0], "utf-8")
    with pytest.raises(MethodError, match=r"oracle needs a repair that chooses how much to cut"):
        read_plan(tmp_path / "plan.toml")


def test_its_cuts_go_further_than_the_honest_ones(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN, "utf-8")
    nodes = [node for node in expand(read_plan(tmp_path / "plan.toml"), digest).nodes.values() if node.stage == "repair"]
    assert sorted((node.args["settings"]["drop"], node.args.get("path", False)) for node in nodes) == [
        (0.02, False), (0.02, False), (0.2, True),
    ]  # fmt: skip


def test_its_rows_stand_beside_the_honest_ones(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN, "utf-8")
    graph = expand(read_plan(tmp_path / "plan.toml"), digest)
    rows = [(cell.backdoor, cell.repair) for cell in graph.cells]
    assert rows == [
        ("badnets", "none"),
        ("badnets", "RNP"),
        ("badnets", "RNP, chosen by ASR on test images"),
        ("none", "none"),
        ("none", "RNP"),
    ]
    assert sum(node.stage == "repair" for node in graph.nodes.values()) == 3
    store, report = tmp_path / "store", tmp_path / "cells.csv"
    assert run(["bench", "run", str(tmp_path / "plan.toml"), "--store", str(store), "--executor", "inline", "-q"]) == 0
    assert (
        run(["bench", "report", str(tmp_path / "plan.toml"), "--store", str(store), "--format", "csv", "-o", str(report)]) == 0
    )
    lines = [line for line in report.read_text("utf-8").splitlines() if "chosen by ASR" in line]
    assert len(lines) == 1
    assert all(",done," in line for line in lines)
    head, *rows = csv.reader(report.read_text("utf-8").splitlines())
    place = head.index("retuned_attack_success")
    assert all((row[place] == "") == ("chosen by ASR" in row[4]) for row in rows)


@pytest.mark.parametrize("value", ["1.5", "-0.1", '"yes"'])
def test_the_accuracy_allowed_is_checked(value, tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace("oracle = 0.2", f"oracle = {value}"), "utf-8")
    with pytest.raises(MethodError, match=r"plan.toml: oracle must (lie in \[0, 1\]|be)"):
        read_plan(tmp_path / "plan.toml")


def test_no_repair_can_reach_it():
    """Only ``bench`` imports the module."""
    root = Path(secateur.__file__).parent
    for file in root.rglob("*.py"):
        names = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)]
        if any("oracle" in (n.module or "") or any(a.name == "oracle" for a in n.names) for n in names):
            assert file.relative_to(root).parts[0] == "bench"
