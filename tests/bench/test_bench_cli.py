"""``secateur bench`` as a person meets it."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.cli import run

PLAN = """
format = 1
name = "tiny"
[data]
name = "fashion-mini"
clean = 0.2
train_limit = 600
test_limit = 200
[[model]]
name = "convnet"
width = 4
[[backdoor]]
name = "badnets"
label = "BadNets"
[[backdoor]]
name = "none"
[train]
epochs = 1
[[repair]]
name = "fine-tuning"
label = "fine-tuning"
epochs = 1
"""
IMPOSSIBLE = """
[[repair]]
name = "norm-pruning"
label = "nowhere"
layers = "no.such.layer"
fraction = 0.5
"""
SECATEUR = (sys.executable, "-c", "from secateur.cli import main; main()")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan that was run, and a wider one that has a cell which fails."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.toml").write_text(PLAN, "utf-8")
    (folder / "wider.toml").write_text(PLAN + IMPOSSIBLE, "utf-8")
    command = ["bench", "run", str(folder / "tiny.toml"), "--store", str(folder / "store"), "--executor", "inline", "-q"]
    assert run(command) == 0
    return folder


def bench(home: Path, verb: str, *flags: str, plan: str = "tiny.toml", store: str = "store") -> int:
    return run(["bench", verb, str(home / plan), "--store", str(home / store), *flags])


def test_run_says_what_it_did_and_resumes(home, capsys):
    assert bench(home, "run", "--executor", "inline") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"9 of 9 nodes done \(0 now, 9 before\) in 0 s; results in .*store\n", err)


def test_a_dry_run_changes_nothing(home, capsys):
    assert bench(home, "run", "--dry-run", plan="wider.toml") == 0
    out = capsys.readouterr().out
    assert re.search(r"^victim +2 nodes +2 done +0 to run$", out, re.MULTILINE)
    assert re.search(r"^repair +4 nodes +2 done +2 to run$", out, re.MULTILINE)
    assert re.search(r"^tiny: 4 of 13 nodes to run, about \d+ s on \d+ workers$", out, re.MULTILINE)
    assert bench(home, "run", "--dry-run", store="nowhere") == 0
    assert "tiny: 9 of 9 nodes to run, time unknown; nothing like 9 of them has run" in capsys.readouterr().out
    assert not (home / "nowhere").exists()


def test_failed_cells_end_with_3_and_stay_in_sight(home, capsys):
    assert bench(home, "run", "--executor", "inline", "-q", plan="wider.toml") == 3
    err = capsys.readouterr().err
    words = "2 nodes failed and 2 could not be run for want of them, the first with MethodError: "
    [line] = err.splitlines()
    assert line.startswith(f"secateur: error: {words}")
    assert line.endswith(f"; see secateur bench status {home / 'wider.toml'}")
    assert "no.such.layer" in line
    assert bench(home, "status", plan="wider.toml") == 0
    out = capsys.readouterr().out
    assert "tiny: 13 nodes, 9 done, 2 failed, 2 skipped; no driver is at work" in out
    assert re.search(r"^  repair norm-pruning seed 0 \([0-9a-f]{12}\): MethodError: .*no\.such\.layer", out, re.MULTILINE)
    assert bench(home, "status", "--json", plan="wider.toml") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["nodes"] == {"done": 9, "running": 0, "failed": 2, "skipped": 2, "todo": 0}
    assert len(record["failures"]) == 2
    assert bench(home, "report", "--format", "csv", plan="wider.toml") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["state"] for row in rows if row["repair"] == "nowhere"} == {"failed"}
    assert all(row["accuracy"] == "" for row in rows if row["state"] == "failed")
    assert all("no.such.layer" in row["error"] for row in rows if row["state"] == "failed")


def test_the_report_in_every_format(home, capsys, tmp_path):
    for name in ("text", "md", "csv", "json"):
        assert bench(home, "report", "--format", name) == 0
        out = capsys.readouterr().out
        assert "BadNets" in out
        assert bench(home, "report", "--output", str(tmp_path / f"table.{name}")) == 0
        assert capsys.readouterr().out == ""
        assert (tmp_path / f"table.{name}").read_text("utf-8") == out, "the suffix chooses the format"
    assert json.loads((tmp_path / "table.json").read_text("utf-8"))["plan"] == "tiny"
    assert bench(home, "report", "--output", str(tmp_path / "table.parquet")) == 0
    parquet = pytest.importorskip("pyarrow.parquet", reason="the parquet extra is not installed")
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.num_rows == len((tmp_path / "table.csv").read_text("utf-8").splitlines()) - 1


def test_provenance(home, capsys):
    assert bench(home, "report", "--format", "provenance") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["plan"], record["nodes"], record["done"], record["retried"]) == ("tiny", 9, 9, 0)
    assert record["environment"]["device"] == "cpu"
    assert record["environment"]["threads per node"] == "1"
    assert set(record["seconds_of_work"]) == {"data", "victim", "repair", "measure"}


def test_a_table_from_its_cells_needs_neither_store_nor_images(home, tmp_path, capsys):
    assert bench(home, "report", "--output", str(tmp_path / "cells.csv")) == 0
    assert bench(home, "report") == 0
    table = capsys.readouterr().out
    assert run(["bench", "report", str(home / "tiny.toml"), "--cells", str(tmp_path / "cells.csv"), "--store", "none"]) == 0
    assert capsys.readouterr().out == table


def test_reindex(home, capsys):
    for part in (home / "store").glob("index.sqlite*"):
        part.unlink()
    assert run(["bench", "reindex", str(home / "tiny.toml"), "--store", str(home / "store")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\d+ finished nodes in ", out)
    assert "tiny: 9 nodes, 9 done" in out
    assert bench(home, "run", "--dry-run", plan="wider.toml") == 0
    assert "time unknown" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no.toml"], "cannot read the plan no.toml: No such file or directory; name a TOML file"),
        (["run", "{plan}", "--executor", "locl"], "unknown executor 'locl'; did you mean 'local'?"),
        (["run", "{plan}", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["run", "{plan}", "--address", "x:1"], "--address is for --executor ray, got local"),
        (
            ["run", "{plan}", "--data", "no.npz"],
            "no.npz:train: No such file or directory; check [data] or --data",
        ),
        (["report", "{plan}", "--format", "parquet"], "parquet is not for the terminal; name a file with --output"),
        (
            ["report", "{plan}", "--store", "{home}/store", "--output", "no/such/folder.csv"],
            "cannot write no/such/folder.csv: No such file or directory",
        ),
        (["report", "{plan}", "--cells", "no.csv"], "cannot read no.csv: No such file or directory"),
        (
            ["report", "{plan}", "--cells", "no.csv", "--format", "provenance"],
            "provenance stands in the store alone; leave out one or the other",
        ),
        (["reindex", "--store", "no-store"], "no-store; run the plan first, or name another with --store"),
        (["status", "{plan}", "--store", "no-store"], "no-store; run the plan first, or name another with --store"),
        (["report", "{plan}", "--store", "no-store"], "no-store; run the plan first, or name another with --store"),
        (["run", "{plan}", "--store", "{home}"], "is no store and not empty; name a new or empty folder with --store"),
        (["run", "{plan}", "--executor", "locl", "--dry-run"], "unknown executor 'locl'; did you mean 'local'?"),
        (["run", "{plan}", "--store", "{plan}"], "cannot write the store"),
    ],
)
def test_mistakes(home, capsys, arguments, message):
    assert run(["bench", *(word.format(plan=home / "tiny.toml", home=home) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", [["status"], ["report"], ["run", "--dry-run"]])
def test_looking_does_not_import_torch(home, verb):
    arguments = ["bench", verb[0], str(home / "tiny.toml"), "--store", str(home / "store"), *verb[1:]]
    code = f"import sys; from secateur.cli import run; c = run({arguments!r}); sys.exit(c or 10 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_the_same_command_goes_on(home, tmp_path, notice):
    store = tmp_path / "store"
    command = [*SECATEUR, "bench", "run", str(home / "tiny.toml"), "--store", str(store), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not list(store.glob("nodes/*/*/result.json")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(notice)
    assert process.wait(60) == 130
    assert process.stderr is not None
    assert process.stderr.read().splitlines()[-1] == "secateur: error: interrupted"
    process.stderr.close()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert re.search(r"9 of 9 nodes done \(\d now, [1-9] before\)", again.stderr)
