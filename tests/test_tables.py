"""The method table: rows resolve, names are unique, defaults do not change in silence, docs say what they must."""

import ast
import csv
import inspect
import json
import tomllib
from pathlib import Path

import pytest

from secateur import methods
from secateur.errors import MethodError

ROWS = methods.table()
SNAPSHOT = Path(__file__).parent / "defaults.json"
SECTIONS = {
    "repair": ("Args:", "Raises:"),
    "backdoor": ("Args:", "Raises:"),
    "evasion": ("Args:", "Returns:", "Raises:"),
    "score": (),
    "compressor": ("Args:", "Raises:"),
}


def defaults(row):
    return {p.name: p.default for p in methods.parameters(row)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.name}")
def test_a_row_resolves_and_is_documented(row):
    function = row.load()
    module = inspect.getmodule(function)
    assert callable(function)
    assert module.__doc__
    assert row.paper in ("control", "baseline") or any(c.isdigit() for c in row.paper)
    for section in SECTIONS[row.kind]:
        assert section in function.__doc__, f"{row.name} needs a section {section}"
    for parameter in methods.parameters(row):
        if row.kind != "score":
            assert parameter.help, f"{row.name}: '{parameter.name}' is not described"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.name}")
def test_the_signature_read_from_source_is_the_real_one(row):
    real = inspect.signature(row.load()).parameters
    assert real["generator"].kind is inspect.Parameter.KEYWORD_ONLY
    for parameter in methods.parameters(row):
        assert real[parameter.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert ast.literal_eval(parameter.default) == real[parameter.name].default


def test_a_changed_default_needs_a_new_version():
    """Regenerate with: python tests/test_tables.py (after raising the version in methods.py)."""
    known = json.loads(SNAPSHOT.read_text("utf-8"))
    for row in ROWS:
        key = f"{row.kind}/{row.name}/v{row.version}"
        assert key in known, f"{key} has no snapshot: run tests/test_tables.py as a script"
        assert known[key] == defaults(row), f"the defaults of {key} changed: raise its version"


@pytest.mark.parametrize("kind", methods.KINDS)
def test_unknown_names_suggest_the_nearest(kind):
    rows = methods.table(kind)
    for row in rows:
        with pytest.raises(MethodError, match=f"did you mean '{row.name}'"):
            methods.get(kind, row.name + "x")


def test_unknown_settings_suggest_the_nearest():
    with pytest.raises(MethodError, match="did you mean 'epochs'"):
        methods.settings(methods.get("repair", "fine-tuning"), {"epoch": 3})


def test_settings_hold_every_default():
    row = methods.get("repair", "fine-tuning")
    assert methods.settings(row, {"epochs": 3}) == {"epochs": 3, "lr": 0.02}


def test_a_name_clash_is_an_error(monkeypatch):
    class Point:
        def load(self):
            return methods.Method("repair", "fine-tuning", "other.package:tune", 1, "none")

    monkeypatch.setattr(methods, "entry_points", lambda group: [Point()])
    methods.table.cache_clear()
    try:
        with pytest.raises(MethodError, match="two repair methods are called 'fine-tuning'"):
            methods.table()
    finally:
        methods.table.cache_clear()


def seen(ssim: float, linf: float) -> str:
    """Return the word for a trigger, as `methods.Method` defines it."""
    if ssim < 0.95 or linf > 0.3:
        return "visible"
    return "invisible" if ssim >= 0.99 and linf <= 8 / 255 else "faint"


def test_visibility_words_are_those_measured():
    """On CIFAR-10, in the committed table of attacks; WaNet is twice as strong there as by default."""
    root = Path(__file__).parents[1]
    plan = tomllib.loads((root / "plans" / "attacks.cpu.toml").read_text("utf-8"))
    names = {entry["label"]: entry["name"] for entry in plan["backdoor"] if "label" in entry}
    with (root / "results" / "attacks" / "cells.csv").open(encoding="utf-8") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["backdoor"] == cell["trigger"] != "WaNet"]
    assert len(cells) >= 15
    for cell in cells:
        word = methods.get("backdoor", names[cell["backdoor"]]).visibility
        assert word == seen(float(cell["ssim"]), float(cell["linf"])), cell["backdoor"]


if __name__ == "__main__":
    snapshot = {f"{row.kind}/{row.name}/v{row.version}": defaults(row) for row in ROWS}
    SNAPSHOT.write_text(json.dumps(snapshot, indent=2, sort_keys=True) + "\n", "utf-8")
