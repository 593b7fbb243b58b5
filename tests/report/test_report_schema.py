"""The schema, the reader that follows it, and the writer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_records import HOSTILE, VARIANTS, attacked, hostile, learned, not_established, record, studied

from secateur.errors import DataError
from secateur.report import FORMATS, read_result, render, to_json
from secateur.report.record import MAX_BYTES
from secateur.report.schema import problem, result_schema
from secateur.types import Result

WORDS = {
    *("$schema", "$id", "$defs", "$ref", "title", "description", "type", "enum", "anyOf", "properties", "required"),
    *("additionalProperties", "maxProperties", "items", "minItems", "maxItems", "minimum", "maximum", "pattern"),
}
VALIDATOR = jsonschema.Draft202012Validator(dict(result_schema()))


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def schemas_in(schema: Any) -> list[dict[str, Any]]:
    """Return every schema within a schema."""
    if not isinstance(schema, dict):
        return []
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", [])]
    inner += [schema.get("items"), schema.get("additionalProperties")]
    return [schema, *(found for one in inner for found in schemas_in(one))]


def test_schema_is_a_schema_with_the_fields_of_a_result() -> None:
    jsonschema.Draft202012Validator.check_schema(dict(result_schema()))
    names = [field.name for field in fields(Result)]
    assert list(result_schema()["properties"]) == names
    assert result_schema()["required"] == names


def test_schema_uses_only_words_that_the_reader_knows() -> None:
    assert {word for schema in schemas_in(result_schema()) for word in schema} <= WORDS


@pytest.mark.parametrize("name", VARIANTS)
def test_good_records_are_accepted(name: str, tmp_path: Path) -> None:
    good = VARIANTS[name]()
    VALIDATOR.validate(good)
    assert read_result(write(tmp_path / "result.json", good)) == good


def test_hostile_records_are_accepted_as_text(tmp_path: Path) -> None:
    for text in HOSTILE:
        for made in (record, learned, attacked, not_established, studied):
            VALIDATOR.validate(hostile(text, made))
            assert problem(hostile(text, made)) is None


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    bad = learned()
    change(bad)
    return bad


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (lambda r: r.update(extra=1), "must not have 'extra'"),
    "missing field": (lambda r: r.pop("before"), "must have 'before'"),
    "unknown kind": (lambda r: r.update(kind="guess"), "must be one of"),
    "verdict of praise": (lambda r: r.update(verdict="safe"), "must be one of"),
    "rate above 1": (lambda r: r["after"]["accuracy"].update(value=91.0), "at most 1, got 91.0"),
    "rate without n": (lambda r: r["after"]["accuracy"].pop("n"), "must have 'n'"),
    "negative count": (lambda r: r["before"].update(macs=-1), "at least 0, got -1"),
    "accuracy null": (lambda r: r["before"].update(accuracy=None), "must be object"),
    "bool as number": (lambda r: r["cost"].update(seconds=True), "must be number, got true"),
    "text as list": (lambda r: r.update(limitations="none"), "must be array"),
    "picture from the network": (
        lambda r: r["details"]["trigger"].update(clean_png="https://example.org/x.png"),
        "must match",
    ),
    "script as picture": (lambda r: r["details"]["trigger"].update(clean_png="data:text/html;base64,AAAA"), "must match"),
    "nested argument": (lambda r: r["method"]["args"].update(a={"b": {}}), "'a' must be string or number"),
    "history of words": (lambda r: r["details"]["history"][3].update(reward="high"), "[3], 'reward' must be number"),
    "history beyond drawing": (lambda r: r["details"]["history"][0].update(reward=1e101), "at most 1e+100"),
    "history of 17 names": (lambda r: r["details"]["history"][0].update({str(i): i for i in range(11)}), "at most 16 entries"),
    "endless history": (lambda r: r["details"].update(history=[{}] * 10_001), "at most 10000 items, got 10001"),
    "graph without size": (lambda r: r["details"]["graphs"][0].pop("size"), "must have 'size'"),
    "graph with more": (lambda r: r["details"]["graphs"][0].update(colour=1), "must not have 'colour'"),
    "graph of nowhere": (lambda r: r["details"]["graphs"][0].update(sites=[]), "at least 1 items, got 0"),
    "layer of nothing": (lambda r: r["details"]["graphs"][0].update(size=0), "at least 1, got 0"),
    "layer too large": (lambda r: r["details"]["graphs"][0].update(size=65_537), "at most 65536, got 65537"),
    "edge of three": (lambda r: r["details"]["graphs"][0]["edges"].append([0, 1, 2]), "at most 2 items, got 3"),
    "edge of one": (lambda r: r["details"]["graphs"][0]["edges"].append([0]), "at least 2 items, got 1"),
    "edge of halves": (lambda r: r["details"]["graphs"][0]["edges"].append([0, 0.5]), "must be integer, got 0.5"),
    "cut below zero": (lambda r: r["details"]["graphs"][0]["cut"].append(-1), "at least 0, got -1"),
    "cut of millions": (lambda r: r["details"]["graphs"][0].update(cut=[0] * 65_537), "at most 65536 items"),
    "zero for empty": (lambda r: r.update(after=0), "must be object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_rejected(name: str, tmp_path: Path) -> None:
    change, said = BAD[name]
    assert not VALIDATOR.is_valid(changed(change))
    with pytest.raises(DataError) as caught:
        read_result(write(tmp_path / "result.json", changed(change)))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be object"),
        ('{"cost": NaN}', "must be finite"),
        ('{"cost": 1e999}', "must be finite"),
        ("1" * 5000, "not valid JSON"),
        ('{"schema_version": 2}', "upgrade"),
        ('"' + "x" * MAX_BYTES + '"', "must not exceed"),
        ('{"\\u001b[31m\\n": 1}', "must have 'kind'"),
    ],
)
def test_bad_files_are_refused_in_one_line(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_result(write(tmp_path / "result.json", content))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\x81\xff")
    for name in ("absent", "", "binary", "a\0b"):
        with pytest.raises(DataError):
            read_result(tmp_path / name)


def test_json_has_the_order_of_the_fields_and_can_be_read_back(tmp_path: Path) -> None:
    shuffled = dict(reversed(record().items()))
    text = to_json(Result(**record()))
    assert text == to_json(shuffled) == render(record(), "json")
    assert text.endswith("}\n")
    assert list(json.loads(text)) == [field.name for field in fields(Result)]
    assert read_result(write(tmp_path / "result.json", text)) == record()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_json_refuses_what_it_cannot_hold(value: Any) -> None:
    with pytest.raises(DataError, match="finite numbers"):
        to_json(changed(lambda r: r["details"].update(log={"loss": value})))


def test_lists_of_numbers_are_written_on_one_line() -> None:
    text = to_json(learned())
    first = learned()["details"]["graphs"][0]
    assert f"\n          [{first['edges'][0][0]}, {first['edges'][0][1]}],\n" in text
    assert f'"cut": [{first["cut"][0]}, {first["cut"][1]}]\n' in text
    strings = changed(lambda r: r.update(limitations=["[\n  1,\n  2\n]", "[ 1 ]"]))
    assert json.loads(to_json(strings)) == strings


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value within a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


PLACES = [place for place in places(learned()) if "edges" not in place[:-2] or place[-2] == 0]
PLACES += [
    place for made in (attacked, not_established) for place in places(made()) if place[:1] in (("details",), ("checks",))
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 10)
    | st.floats(0, 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([*HOSTILE, "", 10**400, 10**15, 2**53 - 1, 1e308, 5e-324])
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def put(target: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of ``target`` with ``value`` at ``path``; an empty string removes the key."""
    if not path:
        return value
    target = copy.copy(target)
    if len(path) == 1 and isinstance(target, dict) and value == "":
        target.pop(path[0], None)
        return target
    try:
        target[path[0]] = put(target[path[0]], path[1:], value)
    except (KeyError, IndexError, TypeError):
        return target
    return target


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.sampled_from([record, learned, attacked, not_established]),
    changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3),
)
def test_whatever_can_be_read_can_be_rendered(
    made: Callable[[], dict[str, Any]], changes: list[tuple[tuple[Any, ...], Any]], tmp_path: Path
) -> None:
    mutated: Any = made()
    for place, value in changes:
        mutated = put(mutated, place, value)
    path = write(tmp_path / "result.json", json.dumps(mutated))
    try:
        accepted = read_result(path)
    except DataError:
        return
    assert VALIDATOR.is_valid(accepted)
    for name in FORMATS:
        assert render(accepted, name).encode()
