"""The report of a measurement of robustness: what it says first, and that nothing is bare."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import VARIANTS, attacked, not_established
from test_report_render import Page, written
from test_report_schema import write

from secateur.errors import DataError
from secateur.report import read_result, to_html, to_markdown, to_text
from secateur.report.sections import headline
from secateur.report.wording import budget


def robust(record: dict[str, Any]) -> dict[str, Any]:
    return record["details"]["robustness"]


def test_headline_has_the_rate_with_all_that_belongs_to_it() -> None:
    said = headline(attacked())
    left = robust(attacked())["worst"]["returned"]["remnant_accuracy"]
    assert said == (
        f"Robust accuracy is at most {written(left)} on 1,000 images (linf eps 8/255; worst of pgd (cross-entropy), square, "
        "transfer (mi-fgsm)); 91.3 % without an attack."
    )


def test_headline_begins_with_what_is_not_established() -> None:
    said = headline(not_established())
    assert said.startswith(
        "Robustness not established: 2 checks failed (ADV-010 name of 10, ADV-020 name of 20). These attacks"
    )
    assert said.endswith("which is no robust accuracy.")


def test_a_record_that_calls_a_failed_check_established_is_not_believed() -> None:
    changed = not_established()
    changed["verdict"] = "established"
    assert headline(changed).startswith("Robustness not established: 2 checks failed")


@pytest.mark.parametrize("made", [attacked, not_established])
@pytest.mark.parametrize("kind", ["returned", "stored"])
def test_every_rate_of_every_attack_is_in_every_rendering(made: Callable[[], dict[str, Any]], kind: str) -> None:
    shown = made()
    renderings = (to_text(shown), to_markdown(shown).replace("\\", ""), " ".join(cell for row in rows(shown) for cell in row))
    for entry in (*robust(shown)["attacks"], robust(shown)["worst"]):
        for name in ("remnant_accuracy", "prediction_change_rate", "strict_attack_success"):
            assert all(written(entry[kind][name]) in rendering for rendering in renderings)


def rows(shown: dict[str, Any]) -> list[list[str]]:
    return [row for found in Page(to_html(shown)).rows.values() for row in found]


def test_checks_tell_what_was_found_what_it_means_and_what_to_do() -> None:
    page = Page(to_html(not_established()))
    found = [row[:2] for row in page.rows["checks"][1:]]
    assert found == [["ADV-010 name of 10", "failed"], ["ADV-020 name of 20", "failed"], ["ADV-031 name of 31", "warning"]]
    told = ["what check 31 found (images 31, 32)", "what it means that 31 failed", "what to do about 31"]
    assert page.rows["checks"][-1][2:] == told
    assert [row[0] for row in page.rows["passed"][1:]] == [f"{row['id']} {row['name']}" for row in not_established()["checks"]]
    assert any("5 checks" in text and "2 failed, 1 warning, 1 skipped, 1 ok" in text for text in page.texts)
    assert any(text == "Not judged: ADV-040 name of 40 (what check 40 found)." for text in page.texts)
    assert "findings" not in page.rows  # they are the checks again


def test_other_findings_stay() -> None:
    changed = attacked()
    changed["findings"].append({"rule": "LOD-002", "severity": "medium", "message": "an unknown name", "where": "file"})
    assert [row[0] for row in Page(to_html(changed)).rows["findings"][1:]] == ["LOD-002"]


def test_exceptions_are_listed_by_index() -> None:
    assert "square alone broke 3 of the images: 5, 60, 700." in " ".join(to_text(attacked()).split())


def test_attacks_that_could_not_run_or_broke_the_rules_are_told() -> None:
    text = " ".join(to_text(not_established()).split())
    assert "pgd (cross-entropy) COULD NOT RUN on some or all images, and left them as they were: no gradient came back" in text
    assert "square: 7 of its images were beyond the threat model and did not count." in text
    assert "Not drawn: an attack could not run" in text
    assert "Not measured: the attack could not run" in text


def test_the_curve_has_its_points_its_band_and_a_mark_at_the_budget() -> None:
    source = to_html(attacked())
    assert source.count('class="point"') == 5
    assert source.count('class="chosen"') == 1
    assert "the budget attacked" in source
    assert len(re.findall(r'<polygon points="([^"]*)" class="band">', source)[0].split()) == 12
    assert [row[0] for row in Page(source).rows["sweep"][1:]] == [
        "linf eps 0", *(f"linf eps {i}/255" for i in (2, 4, 8, 16, 32)),
    ]  # fmt: skip
    assert "polygon" not in to_html(not_established())


def test_the_matrix_has_a_row_for_each_source_and_a_column_for_each_target() -> None:
    made_on = Page(to_html(attacked())).rows["transfer"]
    cells = robust(attacked())["transfer"]["cells"]
    assert made_on[0] == ["Images", "shown to network", "shown to surrogate"]
    assert made_on[2] == ["made on surrogate", written(cells[2]["success"]), written(cells[3]["success"])]


def test_text_leaves_the_checks_out_that_found_nothing() -> None:
    assert "name of 1 " not in to_text(attacked())
    assert "ADV-001 name of 1" in to_markdown(attacked()).replace("\\", "")


def test_what_was_not_measured_has_no_row() -> None:
    assert [row[0] for row in Page(to_html(attacked())).rows["outcome"]][:4] == [
        "Measure", "Accuracy", "Adversarial accuracy", "Parameters",
    ]  # fmt: skip


def extreme(points: list[float]) -> dict[str, Any]:
    changed = attacked()
    some = robust(changed)["curve"]["points"][0]["accuracy"]
    robust(changed)["curve"]["points"] = [{"eps": eps, "accuracy": some} for eps in points]
    return changed


@pytest.mark.parametrize("points", [[], [0.0], [0.0, 0.0], [5e-324, 0.0], [1e6, 1e6], [1e-300, 1e6], [0.1] * 100])
def test_odd_curves_are_drawn_within_the_picture(points: list[float], tmp_path: Path) -> None:
    shown = read_result(write(tmp_path / "result.json", extreme(points)))
    source = to_html(shown)
    at = [float(x) for line in re.findall(r'<polyline points="([^"]*)"', source) for x in re.findall(r"([-\d.]+),", line)]
    assert all(0 <= x <= 640 for x in at)
    assert bool(at) == (len(points) > 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: robust(r)["threat"].update(norm="l3"), "must be one of"),
        (lambda r: robust(r)["threat"].update(eps=1e7), "must be at most"),
        (lambda r: robust(r)["curve"]["points"].extend(robust(r)["curve"]["points"] * 20), "at most 100 items"),
        (lambda r: robust(r)["attacks"][0].update(alone_images=list(range(1001))), "at most 1000 items"),
        (lambda r: robust(r)["worst"].pop("stored"), "must have 'stored'"),
        (lambda r: r["checks"][0].update(severity="deadly"), "must be one of"),
        (lambda r: r.update(verdict="safe"), "must be one of"),
    ],
)
def test_bad_records_are_refused(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    broken = attacked()
    change(broken)
    with pytest.raises(DataError, match=re.escape(said)):
        read_result(write(tmp_path / "result.json", broken))


@pytest.mark.parametrize(
    ("eps", "norm", "said"),
    [
        (8 / 255, "linf", "linf eps 8/255"),
        (0.25 / 255, "linf", "linf eps 0.25/255"),
        (0.03, "linf", "linf eps 7.65/255"),
        (0.0123456, "linf", "linf eps 0.01235"),
        (0.0, "linf", "linf eps 0"),
        (0.5, "l2", "l2 eps 0.5"),
        (5e-324, "linf", "linf eps 4.941e-324"),
    ],
)
def test_budgets_are_written_in_grey_levels_where_that_is_short(eps: float, norm: str, said: str) -> None:
    assert budget({"eps": eps, "norm": norm}) == said


def test_old_records_have_none_of_it() -> None:
    for made in (made for name, made in VARIANTS.items() if not name.startswith("attack")):
        assert not {"attacks", "sweep", "passed"} & Page(to_html(made())).rows.keys()
        assert "robustness" not in json.dumps(made()["details"])
