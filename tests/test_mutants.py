"""The suite notices faults: each committed mutant is put into a copy of the source and must be killed."""

import shutil
import tomllib
from pathlib import Path

import pytest

import secateur
from isolated import run_tests

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
    shutil.copytree(SOURCE, tmp_path / "secateur")
    file = tmp_path / "secateur" / mutant["file"]
    file.write_text(file.read_text("utf-8").replace(mutant["old"], mutant["new"]), "utf-8")
    log = tmp_path / "log"
    code = run_tests(tmp_path, ROOT, mutant["killed_by"].split(), log)
    told = log.read_text("utf-8", "replace")
    assert code == 1, f"survived: {mutant['name']}\n{told[-2000:]}"
    assert " failed" in told
