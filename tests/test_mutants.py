"""The suite notices faults: each committed mutant is put into a copy of the source and must be killed."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).parents[1]
SOURCE = Path(secateur.__file__).parent
MUTANTS = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text("utf-8"))["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_a_mutant_applies(mutant):
    """Each fault stands in exactly one place, so that none goes stale unnoticed."""
    assert (SOURCE / mutant["file"]).read_text("utf-8").count(mutant["old"]) == 1
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutant["killed_by"].split())


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_a_mutant_is_killed(mutant, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "secateur", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "secateur" / mutant["file"]
    file.write_text(file.read_text("utf-8").replace(mutant["old"], mutant["new"]), "utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant["killed_by"].split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, f"survived: {mutant['name']}\n{run.stdout[-2000:]}"
    assert " failed" in run.stdout
