"""Hostile files of every kind we know at the door: each ends in its own exit code and one line, and nothing in it runs.

The files come from ``scripts/make_hostile_corpus.py``. Code in them would make a canary file; ``test_the_payloads_are_live``
shows that it does when they are loaded without care, so that a canary that stays away means something.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from secateur.cli import run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_hostile_corpus.py"
WORKER = Path(__file__).with_name("hostile_worker.py")
VERBS = ("info", "convert", "repair")
FORMATS = ("json", "sarif")  # of info
FAMILIES = (
    *("calls", "opcode", "hidden", "zip", "tensor", "bomb", "safetensors", "onnx", "program", "format", "special", "name"),
    *("print", "bundle", "hub", "unlisted", "torch", "good"),
)
MAX_SECONDS = 5.0  # of the processor, above what the verb takes anyway: other work on the machine does not count
MAX_WAIT = 60.0
MAX_MEMORY = 10**9
DATA = os.environ.get("SECATEUR_TEST_DATA")

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the corpus is made by a script of the repository")


@dataclass(frozen=True)
class Corpus:
    """Where the files lie, what they are, and where code in them would leave its mark."""

    folder: Path
    canary: Path
    cases: Mapping[str, Mapping[str, Any]]

    def family(self, name: str) -> list[Mapping[str, Any]]:
        return [case for case in self.cases.values() if family_of(case["file"]) == name]


def family_of(file: str) -> str:
    return re.split(r"[-.]", file, maxsplit=1)[0]


def make(folder: Path, canary: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), str(folder), str(canary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    home = tmp_path_factory.mktemp("hostile")
    folder, canary = home / "corpus", home / "canary"
    make(folder, canary)
    assert not canary.exists()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    return Corpus(folder, canary, {case["file"]: case for case in (*manifest["good"], *manifest["hostile"])})


def work(corpus: Corpus, mode: str) -> list[dict[str, Any]]:
    """Return what the worker told; it stops early when a file kills it."""
    command = [sys.executable, "-W", "always", str(WORKER), mode, str(corpus.folder), str(corpus.canary)]
    environment = {
        "SECATEUR_CORPUS_EVERY": "16",
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=corpus.folder.parent)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the worker ended with {done.returncode} after {told[-1:]}: {done.stderr[-3000:]}"
    return told


@pytest.fixture(scope="session")
def outcomes(corpus) -> dict[tuple[str, str], dict[str, Any]]:
    return {(record["case"], record["verb"]): record for record in work(corpus, "inside")}


def faults(case: Mapping[str, Any], verb: str, outcome: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with what one command did."""
    wanted = case["codes"][0 if verb in FORMATS else VERBS.index(verb)]
    code, lines = outcome["code"], outcome["err"].splitlines()
    told = [line for line in lines if line.startswith("secateur: error: ")]
    both = outcome["out"] + outcome["err"]
    wrong = {
        "CODE RAN": outcome["ran"],
        f"did {outcome['seen'][:3]}": outcome["seen"],
        "hangs": code == -1,
        f"exit code {code}, not {wanted}": code not in (-1, wanted),
        "a traceback": "Traceback" in both,
        "an unexpected error": "unexpected" in outcome["err"],
        f"{len(lines)} lines on stderr, {len(told)} of them errors": code in (2, 4) and not len(lines) == len(told) == 1,
        "complains of nothing": code in (0, 1) and told,
        "control characters": not both.replace("\n", "").isprintable(),
        f"the line must say {case['says']!r}": code in (2, 4) and code == wanted and not re.search(case["says"], "".join(told)),
        f"{case['rule']} is missing": verb in ("info", *FORMATS) and code == wanted and case["rule"] not in outcome["out"],
        "no JSON": verb in FORMATS and code in (0, 1, 4) and not is_json(outcome["out"]),
    }
    return [fault for fault, found in wrong.items() if found]


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def complaints(
    cases: Sequence[Mapping[str, Any]], verb: str, outcomes: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[str]:
    """Return one line for every command that did something wrong."""
    found = []
    for case in cases:
        outcome = outcomes.get((case["file"], verb))
        if outcome and (wrong := faults(case, verb, outcome)):
            found.append(f"{verb} {case['file']!a} ({case['what']}): {'; '.join(wrong)} | {outcome['err'].strip()[-200:]!a}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_ends_as_it_should(corpus, outcomes, family):
    cases = corpus.family(family)
    assert {(case["file"], verb) for case in cases for verb in VERBS if not case["heavy"]} <= outcomes.keys()
    wrong = [line for verb in (*VERBS, *FORMATS) for line in complaints(cases, verb, outcomes)]
    assert not wrong, f"{len(wrong)} faults in {len(cases)} files:\n" + "\n".join(wrong)


def test_the_corpus_is_large_and_known(corpus):
    assert len(corpus.cases) >= 500
    assert {family_of(file) for file in corpus.cases} == set(FAMILIES)
    hostile = [case for case in corpus.cases.values() if family_of(case["file"]) != "good"]
    assert sum(case["codes"] == [4, 4, 4] for case in hostile) >= 250
    assert sum(case["codes"] == [2, 2, 2] for case in hostile) >= 150


@pytest.mark.skipif(not DATA, reason="SECATEUR_TEST_DATA is not set")
def test_real_checkpoints_pass(tmp_path, capsys):
    files = sorted(path for path in (Path(DATA or "") / "checkpoints").iterdir() if path.is_file())
    assert files
    for file in files:
        assert run(["info", str(file)]) == 0, file.name
        assert run(["convert", str(file), "-o", str(tmp_path / file.name)]) == 0, file.name
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_payloads_are_live(corpus):
    """Positive control: loaded without care, they do run, and the canary shows it."""
    fired = {record["case"]: record["ran"] for record in work(corpus, "fire")}
    assert len(fired) >= 100
    assert not [case for case, ran in fired.items() if not ran]


@pytest.mark.slow
def test_the_corpus_is_the_same_each_time(corpus, tmp_path):
    before = digests(corpus.folder)
    kept = shutil.move(corpus.folder, tmp_path / "kept")
    try:
        make(corpus.folder, corpus.canary)
        after = digests(corpus.folder)
    finally:
        shutil.rmtree(corpus.folder)
        shutil.move(kept, corpus.folder)
    assert len(before) > 500
    differ = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert {file for file in differ if not re.match("(good|torch)-.*(legacy|state.pkl)", file)} == set()  # those hold addresses


def digests(folder: Path) -> dict[str, str]:
    """Return what is in every file but the largest, which are holes."""
    small = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2**26]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in small}


@pytest.mark.slow
def test_files_in_processes_of_their_own(corpus, capsys):
    """Every sixteenth file and the heavy ones; SECATEUR_CORPUS_EVERY=1 takes them all, in a quarter of an hour."""
    told = work(corpus, "apart")
    first, records = told[: 3 * len(VERBS)], told[3 * len(VERBS) :]
    outcomes = {(record["case"], record["verb"]): record for record in records}
    wrong = [line for verb in VERBS for line in complaints(list(corpus.cases.values()), verb, outcomes)]
    used = base_of(first), base_of([record for record in records if record["code"] not in (0, 1)])
    extra = {(r["case"], r["verb"]): r["seconds"] - used[r["code"] not in (0, 1)][r["verb"]] for r in records}
    wrong += [f"{verb} {case!a} takes {took:.1f} s more" for (case, verb), took in extra.items() if took > MAX_SECONDS]
    wrong += [f"{r['verb']} {r['case']!a} takes {r['waited']:.0f} s" for r in records if r["waited"] > MAX_WAIT]
    wrong += [f"{r['verb']} {r['case']!a} takes {r['peak'] / 1e6:.0f} MB" for r in records if r["peak"] > MAX_MEMORY]
    with capsys.disabled():
        sys.stdout.write("\n" + summary(records, used, extra))
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)


def base_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the least seconds that each verb took."""
    return {verb: min(record["seconds"] for record in records if record["verb"] == verb) for verb in VERBS}


def summary(
    records: Sequence[Mapping[str, Any]],
    used: tuple[Mapping[str, float], Mapping[str, float]],
    extra: Mapping[tuple[str, str], float],
) -> str:
    """Return a table of the slowest and the largest.

    Seconds are of the processor: those of a tiny good file, of the quickest refusal, and what other files took above these.
    """
    lines = [f"{'verb':8} {'files':>5} {'good s':>6} {'bad s':>6} {'+ median':>8} {'+ max':>6} {'max MB':>6}  slowest, largest"]
    for verb in VERBS:
        mine = [record for record in records if record["verb"] == verb]
        slow = max(mine, key=lambda record: extra[record["case"], verb])
        large = max(mine, key=lambda record: record["peak"])
        middle = statistics.median(extra[record["case"], verb] for record in mine)
        lines.append(
            f"{verb:8} {len(mine):5} {used[0][verb]:6.2f} {used[1][verb]:6.2f} {middle:8.2f} {extra[slow['case'], verb]:6.2f} "
            f"{large['peak'] / 1e6:6.0f}  {slow['case']!a}, {large['case']!a}"
        )
    return "\n".join(lines) + "\n"
