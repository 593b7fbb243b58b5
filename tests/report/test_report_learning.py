"""How a repair learned and which neurons it cut, as every rendering shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import graph, learned, record
from test_report_render import Page

from secateur.errors import DataError
from secateur.report import FORMATS, read_result, render, to_html, to_markdown, to_text
from secateur.report.html import MAX_BYTES
from secateur.report.neurons import EDGES, NODES, views
from secateur.report.sections import sections
from secateur.report.svg import Axis, chart

Change = Callable[[dict[str, Any]], Any]


def with_details(**details: Any) -> dict[str, Any]:
    changed = record()
    changed["details"].update(details)
    return changed


def marks(page: Page, name: str) -> int:
    return sum(name in (attributes.get("class") or "").split() for _, attributes in page.elements)


def test_history_is_summed_up_by_its_first_best_and_last_entry() -> None:
    shown = learned()
    history = shown["details"]["history"]
    best = max(history, key=lambda entry: entry["reward"])
    page = Page(to_html(shown))
    assert page.rows["learning"][0] == ["Number", "First", "Best reward", "Last"]
    assert page.rows["learning"][1] == ["Evaluations", "161", f"{best['evaluations']:,}", "4,801"]
    assert page.row("learning", "Reward")[1:] == [f"{entry['reward']:.4g}" for entry in (history[0], best, history[-1])]
    assert page.row("learning", "Neurons cut")[1:] == [f"{100 * e['cut']:.1f} %" for e in (history[0], best, history[-1])]
    for said in (to_text(shown), to_markdown(shown)):
        assert "30 entries" in said
        assert f"{100 * history[0]['sign']:.1f} %" in said


def test_history_without_reward_has_no_best() -> None:
    page = Page(to_html(with_details(history=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])))
    assert page.rows["learning"] == [["Number", "First", "Last"], ["step", "1", "2"], ["loss", "0.5", "0.25"]]
    labels = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("class") == "chart"]
    assert labels == ["loss against step"]


def test_each_number_has_a_chart_against_the_evaluations() -> None:
    page = Page(to_html(learned()))
    labels = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("class") == "chart"]
    names = ("Reward", "Rise of the clean error", "Signs of a backdoor", "Neurons cut")
    assert labels == [f"{name} against evaluations" for name in names]
    for tick in ("1 k", "4 k", "0.5", "\N{MINUS SIGN}0.5", "10 %", "30 %"):
        assert tick in page.texts
    lines = [attributes["points"] or "" for tag, attributes in page.elements if attributes.get("class") == "line"]
    assert [len(line.split()) for line in lines[:4]] == [30] * 4


@pytest.mark.parametrize(
    ("low", "high", "share", "labels"),
    [
        (0, 4800, False, ["0", "1 k", "2 k", "3 k", "4 k"]),
        (0, 480, False, ["0", "100", "200", "300", "400"]),
        (-0.5, 0.5, False, ["\N{MINUS SIGN}0.4", "\N{MINUS SIGN}0.2", "0.0", "0.2", "0.4"]),
        (0.9, 0.904, True, ["90.0 %", "90.1 %", "90.2 %", "90.3 %", "90.4 %"]),
        (0, 1, True, ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
        (0, 4e-9, False, ["0", "1e\N{MINUS SIGN}09", "2e\N{MINUS SIGN}09", "3e\N{MINUS SIGN}09", "4e\N{MINUS SIGN}09"]),
    ],
)
def test_ticks_have_the_decimals_that_tell_them_apart(low: float, high: float, share: bool, labels: list[str]) -> None:
    axis = Axis(low, high, 0, 100, 5, share)
    assert [axis.label(tick) for tick in axis.ticks()] == labels


@pytest.mark.parametrize(
    ("name", "value", "labels"),
    [
        ("sign", 0.0, ["\N{MINUS SIGN}0.5 %", "0.0 %", "0.5 %"]),
        ("reward", 0.0, ["\N{MINUS SIGN}0.5", "0.0", "0.5"]),
        ("reward", 250, ["249.0", "249.5", "250.0", "250.5", "251.0"]),
    ],
)
def test_charts_of_what_never_changed_have_ticks_that_can_be_read(name: str, value: float, labels: list[str]) -> None:
    page = Page(chart([(1, value), (8, value)], name, "Number", ("games", "Games")))
    assert page.texts[1 : 1 + len(labels)] == labels


@pytest.mark.parametrize("values", [[0, 0], [0.3] * 3, [7, 7], [1e100, -1e100], [5e-324, 0], [1e15, 1e15 + 1], [-2e6, 3e6]])
@pytest.mark.parametrize("name", ["reward", "cut"])
def test_lines_stay_within_their_chart(values: list[float], name: str) -> None:
    drawn = chart([(0, value) for value in values], name, "Number", ("games", "Games"))
    points = drawn.split('points="')[1].split('"')[0]
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 52 <= x <= 388
        assert 10 <= y <= 168
    assert 2 <= drawn.count('class="grid"') <= 7


def test_rows_of_graphs_take_the_place_of_the_layers() -> None:
    shown, page = learned(), Page(to_html(learned()))
    assert page.rows["layers"][0][:4] == ["Layer", "Cut", "Neurons", "Share"]
    assert [row[:4] for row in page.rows["layers"][1:]] == [
        ["bn1, layer1.0.bn2, layer1.1.bn2 and 2 more", "2", "16", "12.5 %"],
        ["layer1.0.bn1", "0", "16", "0.0 %"],
        ["layer2.0.bn2, layer2.1.bn2", "5", "32", "15.6 %"],
        ["layer3.0.bn1", "11", "64", "17.2 %"],
    ]
    titles = {section.id: section.title for section in sections(shown)}
    assert titles["layers"] == "Neurons cut, layer by layer"
    assert list(titles).index("learning") < list(titles).index("layers")
    assert "one residual stream" in to_text(shown)
    del shown["details"]["graphs"]
    assert {section.id: section.title for section in sections(shown)}["layers"] == "Where it was cut"


def test_cut_neurons_are_marked_in_colour_and_shape() -> None:
    page = Page(to_html(learned()))
    assert marks(page, "graph") == 3
    assert marks(page, "gone") - 1 == 11 + 5 + 2
    assert marks(page, "kept") - 1 == 64 + 32 + 16 - 11 - 5 - 2
    assert {tag for tag, attributes in page.elements if attributes.get("class") == "gone"} == {"span", "path"}
    assert {tag for tag, attributes in page.elements if attributes.get("class") == "kept"} == {"span", "circle"}
    cut = learned()["details"]["graphs"][3]["cut"]
    assert {f"neuron {number}, cut" for number in cut} <= set(page.texts)
    captions = [text for text in page.texts if text.endswith("neurons cut.") and not text.startswith("Graph")]
    assert captions[0] == "layer3.0.bn1: 11 of 64 neurons cut."


def test_layers_that_lost_nothing_or_know_no_neighbours_are_not_drawn() -> None:
    whole = graph(["a"], 16, 0, 0)
    apart = {**graph(["b"], 16, 3, 0), "edges": []}
    assert views([whole, apart]) == []
    page = Page(to_html(with_details(graphs=[whole, apart])))
    assert marks(page, "graph") == marks(page, "drawings") == 0
    assert page.row("layers", "b")[1:4] == ["3", "16", "18.8 %"]


def test_large_layers_are_shown_by_their_cut_neurons_and_the_neighbours_of_these() -> None:
    large = graph(["big"], 400, 10, 5)
    [view] = views([large])
    near = {node for edge in large["edges"] if set(edge) & set(large["cut"]) for node in edge}
    assert set(view.nodes) == near | set(large["cut"])
    kept = len(near - set(large["cut"]))
    assert view.caption == f"big: 10 of 400 neurons cut. Shown are the cut ones and {kept} of their neighbours."
    assert all(set(edge) <= set(view.nodes) for edge in view.edges)
    [most] = views([graph(["big"], 400, 300, 5)])
    assert len(most.nodes) == NODES
    assert most.caption == "big: 300 of 400 neurons cut. Shown are 160 of the cut ones."
    dense = {"sites": ["d"], "size": NODES, "cut": [0], "edges": [[i, j] for j in range(NODES) for i in range(j)]}
    [view] = views([dense])
    assert len(view.nodes) == NODES
    assert len(view.edges) == EDGES
    assert view.caption.endswith("Of 12,720 edges 2,000 are drawn.")


def test_the_same_record_makes_the_same_page() -> None:
    code = "from report_records import learned; from secateur.report import to_html; print(to_html(learned()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == to_html(learned()) + "\n"


def entries(**changes: Any) -> Change:
    return lambda r: [entry.update(changes) for entry in r["details"]["history"]]


ODD: dict[str, Change] = {
    "one entry": lambda r: r["details"].update(history=[{"reward": 1.0}]),
    "empty entries": lambda r: r["details"].update(history=[{}, {}, {}]),
    "names missing here and there": lambda r: [
        entry.pop(name) for entry, name in zip(r["details"]["history"], ["evaluations", "reward", "cut", "games"], strict=False)
    ],
    "other names every time": lambda r: r["details"].update(history=[{f"{i} {j}": i for j in range(16)} for i in range(1500)]),
    "thousands of entries": lambda r: r["details"].update(history=[{"a": i, "b": -i} for i in range(10_000)]),
    "all equal": entries(evaluations=5, reward=0.0, rise=0.1, sign=1e-300, cut=1),
    "largest": lambda r: r["details"].update(
        history=[{"a": 1e100, "b": -1e100, "cut": 10**100}, {"a": -1e100, "b": 1, "cut": 0}]
    ),
    "backwards": lambda r: r["details"]["history"].reverse(),
    "cut out of range": lambda r: r["details"]["graphs"][3].update(cut=[0, 64, 65_535, 3, 3, 3]),
    "all cut": lambda r: r["details"]["graphs"][3].update(cut=list(range(64))),
    "edges out of range": lambda r: r["details"]["graphs"][3].update(edges=[[0, 64], [65_535, 1], [2, 2], [5, 4], [4, 5]]),
    "one neuron": lambda r: r["details"].update(graphs=[{"sites": ["a"], "size": 1, "edges": [[0, 0]], "cut": [0]}]),
    "two neurons": lambda r: r["details"].update(graphs=[{"sites": ["a"], "size": 2, "edges": [[0, 1]], "cut": [0]}]),
    "huge layer": lambda r: r["details"].update(
        graphs=[{"sites": ["a"], "size": 65_536, "edges": [[0, i] for i in range(50_000)], "cut": list(range(0, 65_536, 2))}]
    ),
    "dense layers": lambda r: r["details"].update(
        graphs=[{"sites": ["a"], "size": 160, "edges": [[i, j] for j in range(160) for i in range(j)], "cut": list(range(160))}]
        * 6
    ),
    "many layers": lambda r: r["details"].update(graphs=[{"sites": ["a"], "size": 2, "edges": [[0, 1]], "cut": [1]}] * 10_000),
    "many sites": lambda r: r["details"]["graphs"][3].update(sites=["x" * 500] * 1000),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_records_make_a_page_in_no_time(name: str, tmp_path: Path) -> None:
    shown = learned()
    ODD[name](shown)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(shown, separators=(",", ":")), "utf-8")
    start = time.process_time()
    accepted = read_result(path)
    pages = {format: render(accepted, format) for format in FORMATS}
    assert time.process_time() - start < 10
    assert len(pages["html"].encode()) <= MAX_BYTES
    assert not {"nan", "inf"} & {text.lower() for text in Page(pages["html"]).texts}


def test_neurons_that_a_layer_does_not_have_do_not_count() -> None:
    shown = learned()
    ODD["cut out of range"](shown)
    page = Page(to_html(shown))
    assert page.row("layers", "layer3.0.bn1")[1:4] == ["2", "64", "3.1 %"]
    assert "neuron 64, cut" not in page.texts
    ODD["edges out of range"](shown)
    assert [view.edges for view in views(shown["details"]["graphs"][3:])] == [((4, 5),)]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_history_that_is_not_finite_is_refused_in_one_line(value: str, tmp_path: Path) -> None:
    text = json.dumps(with_details(history=[{"reward": "here"}])).replace('"here"', value)
    (tmp_path / "result.json").write_text(text, "utf-8")
    with pytest.raises(DataError, match=r"numbers must be finite") as caught:
        read_result(tmp_path / "result.json")
    assert str(caught.value).isprintable()


def test_edges_that_had_no_room_are_owned_up_to():
    graph = {"sites": ["a"], "size": 4, "edges": [[0, 1]], "cut": [0]}
    assert "room" not in views([graph])[0].caption
    assert views([graph | {"edges_left_out": 1234}])[0].caption.endswith(" 1,234 edges had no room in the record.")
