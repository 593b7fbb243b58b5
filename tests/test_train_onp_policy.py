"""The script that trains the policy which comes with the package."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from secateur.cli import run
from secateur.repair.onp.saved import load_policy

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_onp_policy.py"
PLAN = """
format = 1
name = "small"
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
rate = 0.2
[[backdoor]]
name = "none"
[train]
epochs = 2
"""


@pytest.mark.slow
def test_a_policy_learns_on_the_victims_of_a_plan_and_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.toml").write_text(PLAN, "utf-8")
    store = ["--store", str(tmp_path / "store")]
    assert run(["bench", "run", str(tmp_path / "plan.toml"), *store, "--workers", "1"]) == 0

    def trained(games):
        given = ["--games", str(games), "--images", "24", "--width", "4", "--progress", str(tmp_path / "progress")]
        output = tmp_path / f"policy{games}"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "plan.toml"), *store, *given, "-o", str(output)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return output

    trained(12)
    output = trained(24)
    assert load_policy(output).width == 4
    record = json.loads((output / "provenance.json").read_text("utf-8"))
    assert [text.split()[-3] for text in record["victims"].values()] == ["badnets", "none"]
    assert record["history"]["games"] == [12, 24]
    out = capsys.readouterr().out
    assert out.count("is ready") == 4
    assert out.count("12 games") == 1
