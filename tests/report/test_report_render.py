"""What the pages say: the record's numbers, and nothing that the record could make them do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_records import HOSTILE, VARIANTS, attacked, hostile, learned, not_established, png, rate, record, without_trigger

from secateur.errors import MethodError
from secateur.report import render, to_html, to_markdown, to_text
from secateur.report.html import MAX_BYTES
from secateur.report.text import WIDTH
from secateur.report.wording import headline, plain

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Every element with its attributes, every text, and the cells of every table by section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.texts: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(source)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and {"td", "th"} & set(self.open) and "title" not in self.open:
            self.rows[self.section][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-").strip()

    def row(self, section: str, name: str) -> list[str]:
        return next(row for row in self.rows[section] if row[0] == name)


def written(value: dict[str, Any]) -> str:
    return f"{100 * value['value']:.2f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def test_numbers_in_the_page_are_those_of_the_record() -> None:
    shown, page = record(), Page(to_html(record()))
    for name, label in (
        ("accuracy", "Accuracy"),
        ("attack_success", "Attack success"),
        ("triggered_accuracy", "Triggered accuracy"),
    ):
        before, after = shown["before"][name], shown["after"][name]
        change = f"{100 * (after['value'] - before['value']):+.2f} points"
        assert page.row("outcome", label)[:5] == [label, written(before), written(after), change, f"{before['n']:,}"]
    assert page.row("outcome", "Adversarial accuracy")[1:3] == ["not measured", "not measured"]
    assert page.row("outcome", "Parameters")[1:4] == ["175,290", "101,458", "-42.1 %"]
    exact = {attributes.get("title") for _, attributes in page.elements}
    assert f"{shown['before']['size_bytes']:,} bytes" in exact


def test_layers_path_and_repairs_are_all_in_the_page() -> None:
    shown, page = record(), Page(to_html(record()))
    for layer in shown["details"]["layers"]:
        share = f"{100 * layer['removed'] / layer['total']:.1f} %"
        assert page.row("layers", layer["name"])[1:4] == [str(layer["removed"]), str(layer["total"]), share]
    for step in shown["details"]["path"]:
        cells = page.row("path", f"{100 * step['amount']:.1f} %")
        assert cells[1:3] == [f"{step['removed']:,}", written(step["holdout"])]
    for repair in shown["details"]["compared"]:
        cells = page.row("compared", repair["name"])
        assert cells[1:3] == [written(repair["after"][name]) for name in ("accuracy", "attack_success")]
        assert cells[-1] == repair["note"]


def test_sections_come_in_reading_order() -> None:
    page = Page(to_html(record()))
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert ids == ["checks", "outcome", "compared", "path", "layers", "trigger", "notes", "limits", "reproduce"]


def test_text_and_markdown_say_the_same_numbers() -> None:
    text, markdown = to_text(record()), to_markdown(record()).replace("\\", "")
    for part in (record()["before"], record()["after"]):
        for value in part.values():
            if isinstance(value, dict):
                assert written(value) in text
                assert written(value) in markdown
    for rendering in (text, markdown):
        assert "Attack success fell from 99.8 % to 1.2 %; accuracy changed by -0.6 points." in rendering
        assert "-98.56 points" in rendering
        assert "1,800" in rendering


@pytest.mark.parametrize("name", VARIANTS)
def test_text_fits_the_terminal(name: str) -> None:
    text = to_text(VARIANTS[name]())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    assert not re.search(r"[^\S\n]$", text, re.MULTILINE)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("format", ["html", "md", "text"])
def test_no_rendering_promises_too_much(name: str, format: str) -> None:
    said = render(VARIANTS[name](), format).replace("model.safetensors", "")
    assert not re.search(r"\bsafe\b|clean model", said, re.IGNORECASE)
    assert "what was not tested" in said.lower()


@pytest.mark.parametrize(
    ("attack", "accuracy", "said"),
    [
        ((0.998, 0.012), (0.913, 0.907), "Attack success fell from 99.8 % to 1.2 %; accuracy changed by -0.6 points."),
        ((0.1, 0.2), (0.9, 0.91), "Attack success rose from 10.0 % to 20.0 %; accuracy changed by +1.0 points."),
        ((0.9981, 0.9979), (0.9, 0.9001), "Attack success stayed at 99.8 %; accuracy did not change."),
        ((None, None), (0.913, 0.907), "Attack success was not measured; accuracy changed by -0.6 points."),
    ],
)
def test_headline_says_what_happened(attack: tuple[Any, Any], accuracy: tuple[float, float], said: str) -> None:
    shown = record()
    for part, success, right in zip((shown["before"], shown["after"]), attack, accuracy, strict=True):
        part.update(attack_success=None if success is None else rate(success), accuracy=rate(right))
    assert headline(shown) == said


def test_headline_of_an_audit_starts_with_its_verdict() -> None:
    said = headline(VARIANTS["audit"]())
    assert said == "These checks found evidence of a backdoor. Attack success is 99.8 %; accuracy is 91.3 %."
    assert headline(VARIANTS["bare"]()) == "Inconclusive: too little could be evaluated."


@pytest.mark.parametrize("made", [record, learned, attacked, not_established])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(text: str, made: Callable[[], dict[str, Any]]) -> None:
    source = to_html(hostile(text, made))
    page, honest = Page(source), Page(to_html(hostile("x", made)))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in honest.elements]
    assert [set(attributes) for _, attributes in page.elements] == [set(attributes) for _, attributes in honest.elements]
    assert any(plain(text) in said for said in page.texts)
    assert source.encode()


@pytest.mark.parametrize("made", [record, learned, attacked, not_established])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_steer_neither_terminal_nor_markdown(text: str, made: Callable[[], dict[str, Any]]) -> None:
    assert all(line.isprintable() for line in to_text(hostile(text, made)).splitlines())
    markdown = to_markdown(hostile(text, made))
    assert all(line.isprintable() for line in markdown.splitlines())
    outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert not re.search(r"<\w|</|(?<!\\)\]\(|(?<!\\)\[", outside_code)
    assert len(markdown.splitlines()) == len(to_markdown(hostile("x", made)).splitlines())


@pytest.mark.parametrize("name", VARIANTS)
def test_page_asks_the_network_for_nothing(name: str) -> None:
    source = to_html(VARIANTS[name]())
    page = Page(source)
    for tag, attributes in page.elements:
        assert not {"srcset", "style", "action", "formaction", "xlink:href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", source)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_pictures_that_are_none_are_left_out() -> None:
    shown = record()
    shown["details"]["trigger"].update(clean_png="javascript:alert(1)", triggered_png="http://example.org/x.png")
    assert "img" not in [tag for tag, _ in Page(to_html(shown)).elements]
    assert [tag for tag, _ in Page(to_html(record())).elements].count("img") == 2
    assert png() in to_html(record())


def test_tables_and_drawings_are_accessible() -> None:
    page = Page(to_html(record()))
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert all(attributes.get("scope") in ("row", "col") for attributes in heads)
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 1 + 3 + len(record()["details"]["layers"])
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)


@pytest.mark.slow
def test_pages_of_monstrous_records_stay_small() -> None:
    shown, nasty = record(), "'" * 3000
    shown["details"]["layers"] = [{"name": f"{i}{nasty}"[:400], "total": 9, "removed": 3} for i in range(5000)]
    shown["details"]["notes"] = [nasty] * 2000
    shown["checks"] = [{"id": nasty, "status": "ok", "why": nasty, "metrics": {}, "seconds": 0.0}] * 2000
    shown["method"]["args"] = {f"{i}{nasty}": nasty for i in range(2000)}
    page = to_html(shown)
    assert len(page.encode()) <= MAX_BYTES
    assert "more in result.json" in page


def test_what_is_absent_leaves_no_trace() -> None:
    page = to_html(without_trigger())
    assert "Attack success was not measured; accuracy changed" in page
    assert 'id="trigger"' not in page
    assert 'id="compared"' not in page
    assert "<polyline" not in to_html(VARIANTS["one cut"]())


def test_cuts_that_do_not_grow_are_not_joined_by_a_line() -> None:
    shown = record()
    assert "<polyline points=" in to_html(shown)
    shown["details"]["path"].reverse()
    page = to_html(shown)
    assert "<polyline points=" not in page
    assert page.count('class="range"') >= len(shown["details"]["path"])


def test_a_single_measurement_has_no_empty_columns() -> None:
    page = Page(to_html(VARIANTS["audit"]()))
    assert page.rows["outcome"][0] == ["Measure", "Value", "n", "0 to 100 %"]
    assert page.row("outcome", "Accuracy")[:3] == ["Accuracy", written(record()["before"]["accuracy"]), "2,000"]
    assert "Before and after" not in page.texts


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(MethodError, match="did you mean 'html'"):
        render(record(), "htm")


def test_rendering_needs_no_torch_and_text_no_template_engine() -> None:
    code = (
        "import sys; from secateur import report; from report_records import learned, record;"
        "[report.render(learned(), name) for name in ('text', 'md', 'json')]; assert 'jinja2' not in sys.modules;"
        "report.render(record(), 'html'); assert 'networkx' not in sys.modules;"
        "report.render(learned(), 'html'); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
