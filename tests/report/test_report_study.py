"""The layer study in a report: one glance says which stage moves most, and odd or hostile numbers stay within the drawings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import HOSTILE, attacked, hostile, studied
from test_report_render import Page
from test_report_schema import write

from secateur.errors import DataError
from secateur.report import read_result, render, to_html, to_markdown, to_text
from secateur.report.html import MAX_BYTES
from secateur.report.multiples import DRAWN


def study(record: dict[str, Any]) -> dict[str, Any]:
    return record["details"]["study"]


def test_the_stage_that_moves_most_is_said_and_marked() -> None:
    text = " ".join(to_text(studied()).split())
    assert "layer3.very.long.name.of.a.block moves most: the attack changes its output by 0.830 [0.747, 0.913]" in text
    assert "Least moves conv1, by 0.050." in text
    source = to_html(studied())
    assert source.count('class="most"') == 3  # bar, name and number of one stage
    assert f">...{'layer3.very.long.name.of.a.block'[-19:]}</text>" in source


def test_stages_that_cannot_be_told_apart_are_named() -> None:
    changed = studied()
    study(changed)["stages"][0]["l2"]["high"] = 0.8
    assert "moves most (the interval of conv1 overlaps): the attack" in " ".join(to_text(changed).split())


def test_every_stage_has_its_histograms_and_its_numbers() -> None:
    source = to_html(studied())
    page = Page(source)
    assert source.count('class="chart multiple"') == 6
    assert source.count('<polyline points="') == 1 + 3  # the curve over eps, and the three lines under attack
    assert page.rows["study"][1] == ["conv1", "0.050 [0.045, 0.055]", "40.0 %"]
    assert page.rows["maps"][1] == ["conv1", "0 to 6.5", "16", "12 (0.100), 3 (0.050)"]
    assert page.rows["maps"][2][-1] == ""
    assert page.rows["weights"][1][:4] == ["conv1", "64", "0.01", "0.123"]
    assert page.rows["study"][2] == ["features.0", "not measured", "not measured"]


def test_the_picture_has_its_scale() -> None:
    source = to_html(studied())
    assert (
        "Top: images 5, 60, 700. Middle: under attack. Bottom: the change, 15.9 times as large; mid-grey is no change."
        in source
    )
    assert source.count(study(studied())["grid"]["png"]) == 1
    changed = studied()
    del study(changed)["grid"]
    assert "Middle: under attack" not in to_html(changed)
    study(changed)["grid"] = {"png": "javascript:alert(1)", "scale": 1.0, "images": [], "shrunk": 1}
    assert "javascript" not in to_html(changed)


def test_text_has_the_shift_and_leaves_the_rest_to_the_page() -> None:
    text = to_text(studied())
    assert "WHERE THE ATTACK MOVES THE NETWORK" in text
    assert "WEIGHTS, STAGE BY STAGE" not in text
    assert "## Weights, stage by stage" in to_markdown(studied())


def test_without_a_study_there_is_nothing_of_it() -> None:
    assert not {"study", "maps", "weights"} & Page(to_html(attacked())).rows.keys()
    assert "MOVES" not in to_text(attacked())


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_of_a_stage_acts(text: str) -> None:
    source = to_html(hostile(text, studied))
    assert "<script>alert" not in source
    assert "<img src=x" not in source
    assert len(source.encode()) <= MAX_BYTES
    log = json.loads(render(hostile(text, studied), "sarif"))
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == [text]


EDGES = [[0.0, 0.0], [7.0, -1.0], [-1e100, 1e100], [1e-300, 2e-300], [5.0, 5.0000000001], [1e99, 1e99]]


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("shift", [0.0, -1e100, 1e100, 1e-300])
def test_odd_numbers_are_drawn_within_the_picture(edges: list[float], shift: float, tmp_path: Path) -> None:
    changed = studied()
    for stage in study(changed)["stages"]:
        stage.update(
            edges=edges, l2={"value": shift, "low": shift, "high": -shift, "n": 2}, clean=[0], adversarial=[9007199254740991]
        )
    shown = read_result(write(tmp_path / "result.json", changed))
    source = to_html(shown)
    numbers = re.findall(r' (?:x|y|x1|x2|y1|y2|width|height)="([^"]*)"', source)
    assert all(-1 <= float(value) <= 1000 for value in numbers if re.fullmatch(r"[-+.\de]+", value))
    spots = [part for line in re.findall(r'points="([^"]*)"', source) for part in re.split("[ ,]", line)]
    assert all(-1 <= float(value) <= 1000 for value in spots)
    assert not re.search('="(nan|inf|-inf)"', source)
    assert to_text(shown)
    assert to_markdown(shown)


def test_many_stages_are_all_on_the_chart_and_the_most_moved_have_histograms() -> None:
    changed = studied()
    first = study(changed)["stages"][0]
    study(changed)["stages"] = [
        {**first, "stage": f"block{i}", "l2": {**first["l2"], "value": i / 60, "low": i / 60, "high": i / 60}}
        for i in range(60)
    ]
    source = to_html(changed)
    assert source.count("<b>block") == DRAWN
    assert "<b>block59</b>" in source
    assert "<b>block35</b>" not in source
    assert len(Page(source).rows["study"]) == 61
    assert len(source.encode()) <= MAX_BYTES


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s["stages"].extend(s["stages"] * 20), "at most 60 items"),
    (lambda s: s["stages"][0].update(edges=[1.0]), "at least 2 items"),
    (lambda s: s["stages"][0].update(clean=[]), "at least 1 items"),
    (lambda s: s["stages"][0].update(clean=[-1]), "must be at least 0"),
    (lambda s: s["stages"][0].pop("adversarial"), "must have 'adversarial'"),
    (lambda s: s["weights"][0].update(zeros=1.5), "must be at most 1"),
    (lambda s: s["grid"].update(png="x"), "must match"),
    (lambda s: s["grid"].update(shrunk=0), "must be at least 1"),
    (lambda s: s.update(extra=1), "must not have 'extra'"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_bad_studies_are_refused(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    broken = studied()
    change(study(broken))
    with pytest.raises(DataError, match=re.escape(said)):
        read_result(write(tmp_path / "result.json", broken))
