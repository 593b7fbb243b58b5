"""From a store to tables: what is averaged, what is not, and that nothing is hidden."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys

import pytest
from scipy.stats import t

from secateur.bench import export, layout, tables
from secateur.bench.nodes import COLUMNS, expand
from secateur.bench.plan import read_plan
from secateur.bench.store import Store
from secateur.errors import DataError, MethodError

PLAN = """
format = 1
name = "small"
victim_seeds = [0, 1, 2]
repair_seeds = [0, 1]
[data]
name = "fashion-mini"
clean = 0.05
[[model]]
name = "convnet"
label = "net"
[[backdoor]]
name = "badnets"
label = "BadNets"
[[backdoor]]
name = "blended"
label = "Blended"
[[backdoor]]
name = "none"
[train]
epochs = 1
[[repair]]
name = "fine-tuning"
label = "tuned"
[[repair]]
name = "norm-pruning"
label = "pruned"
[reported]
file = "reported.toml"
"""
REPORTED = """
[[reported]]
source = "Somebody, 2020"
where = { backdoor = "BadNets", repair = "tuned" }
attack_success = 0.07
[[reported]]
source = "Nobody, 2021"
where = { backdoor = "BadNetz" }
accuracy = 0.5
"""


class Table:
    """A plan with a store that the test fills."""

    def __init__(self, path, text=PLAN):
        path.mkdir(exist_ok=True)
        (path / "reported.toml").write_text(REPORTED)
        (path / "plan.toml").write_text(text)
        self.plan = read_plan(path / "plan.toml")
        self.graph = expand(self.plan, digest=lambda name: name)
        self.store = Store(path / "store")
        self.store.make()
        self.flags = {}

    def cells(self, **columns):
        return [cell for cell in self.graph.cells if all(getattr(cell, name) == value for name, value in columns.items())]

    def put(self, key, values, scale=1.0):
        result = {
            "attempt": 1,
            "batch_scale": scale,
            "created": "2026-01-01T00:00:00+00:00",
            "tool": {"version": "0"},
            "cost": {"seconds": 2.0},
            "environment": {"host": "here"},
            "values": values,
        }
        self.store.commit(self.store.begin(key), self.graph.nodes[key], result)

    def finish(self, cell, accuracy, success=None, scale=1.0):
        for key in cell.keys[:-1]:
            if not self.store.done(key):
                self.put(
                    key,
                    {"log": {"removed_share": 0.25, **self.flags}} if self.graph.nodes[key].stage == "repair" else {},
                    scale,
                )
        measured = {"accuracy": rate(accuracy)}
        if success is not None:
            measured |= {"attack_success": rate(success), "triggered_accuracy": rate(1 - success)}
        self.put(cell.keys[-1], {"rates": measured, "cost": {"parameters": 100, "nonzero": 90, "macs": 500}})

    def fill(self, cells=None):
        for cell in cells or self.graph.cells:
            self.finish(cell, *numbers(cell))

    def fail(self, key, message="ValueError: too\nbad"):
        self.store.record_failure(key, {"status": "failed", "message": message})

    def rows(self):
        return tables.rows(self.graph, self.store)

    def groups(self):
        return {tuple(group.config): group for group in tables.aggregate(self.rows(), self.plan)}

    def group(self, backdoor, repair, trigger=None):
        clean = None if repair == "none" else 0.05
        return self.groups()["net", backdoor, trigger or backdoor, clean, repair, "none"]

    def render(self, format="text", **options):
        return export.render(self.rows(), self.plan, format, **options)


def rate(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 1000}


def numbers(cell):
    """Return accuracy and attack success of a cell, distinct for distinct configurations."""
    base = {"none": 0.9, "tuned": 0.5, "pruned": 0.1}[cell.repair] - (0.05 if cell.backdoor == "Blended" else 0)
    success = 0.02 if cell.backdoor == "none" else base + 0.02 * cell.victim_seed + 0.01 * (cell.repair_seed or 0)
    return 0.8 + 0.02 * cell.victim_seed + 0.01 * (cell.repair_seed or 0), success


def section(text, title):
    """Return the lines under a title, head and rows of its table split at two spaces."""
    lines = text.partition(f"\n{title.upper()}\n")[2].partition("\n\n")[0].splitlines()
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in lines]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr("secateur.bench.store._sync", lambda path: None)


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path)


@pytest.fixture
def full(table):
    table.fill()
    return table


def test_rows_are_the_cells_in_the_plans_order(full):
    rows = full.rows()
    assert [row.cell for row in rows] == list(full.graph.cells)
    assert {row.state for row in rows} == {"done"}
    repaired = next(row for row in rows if row.cell.repair == "pruned")
    assert (repaired.parameters, repaired.nonzero, repaired.macs, repaired.removed_share) == (100, 90, 500, 0.25)
    assert (repaired.seconds, repaired.host) == (2.0, "here")
    assert repaired.rates["accuracy"] == rate(0.8)


def test_interval_is_over_victims(full):
    stat = full.group("BadNets", "tuned").stats["attack_success"]
    values = [0.505, 0.525, 0.545]  # the two repair seeds of each victim averaged
    low, high = t.interval(0.95, 2, loc=0.525, scale=0.02 / 3**0.5)
    assert stat.summary.n == len(values)
    assert (stat.summary.mean, stat.summary.sd) == (pytest.approx(0.525), pytest.approx(0.02))
    assert (stat.summary.low, stat.summary.high) == (pytest.approx(low), pytest.approx(high))
    assert stat.worst == pytest.approx(0.55)
    assert full.group("BadNets", "tuned").stats["accuracy"].worst == pytest.approx(0.8)


def test_a_failed_cell_is_never_averaged_away(table):
    bad = table.cells(backdoor="BadNets", repair="pruned", victim_seed=1)
    table.fill([cell for cell in table.graph.cells if cell not in bad])
    for cell in bad:
        table.fail(cell.keys[1])
    group = table.group("BadNets", "pruned")
    assert (group.count.done, group.count.failed, group.count.todo) == (4, 2, 0)
    assert group.stats["attack_success"].summary.n == 2
    text = table.render()
    row = next(line for line in section(text, "Repairs") if line[0] == "pruned")
    assert row[1:3] == ["82.5 ± 2.8 [57.1, 100.0], 4 of 6*", "12.5 ± 2.8 [0.0, 37.9] (15.0), 4 of 6*"]
    assert row[3] == "82.5 ± 2.0 [77.5, 87.5]"
    assert "60 cells: 58 done, 2 failed, 0 to do; 3 victim seeds x 2 repair seeds" in text
    assert "* some cells failed" in text
    over = next(line for line in section(text, "Over attacks") if line[0] == "pruned")
    assert over[1:4] == ["2 of 2", "10 of 12*", "82.5*"]
    assert text.count("repair norm-pruning seed 0: ValueError: too bad") == 1
    paired = section(text, "Paired differences")[2]
    assert paired[2].endswith("n=2, 4 of 6 pairs*")


def test_what_a_failed_victim_takes_with_it_is_skipped(table):
    victim = table.cells(backdoor="Blended", repair="none", victim_seed=2)[0].keys[0]
    table.fail(victim, "RuntimeError: loss is nan")
    rows = {tuple(vars(row.cell).values())[:-1]: row for row in table.rows()}
    assert rows["net", "Blended", "Blended", None, "none", "none", 2, None].state == "failed"
    assert rows["net", "Blended", "Blended", 0.05, "tuned", "none", 2, 0].state == "skipped"
    assert rows["net", "none", "Blended", None, "none", "none", 2, None].state == "skipped"  # it needs the trigger
    assert rows["net", "none", "BadNets", None, "none", "none", 2, None].state == "todo"
    error = "victim blended seed 2: RuntimeError: loss is nan"
    assert {row.error for row in rows.values() if row.state == "skipped"} == {error}
    text = table.render()
    assert "60 cells: 0 done, 1 failed, 9 skipped, 50 to do" in text
    assert section(text, "Skipped cells")[1] == ["9", error]


def test_failed_images_skip_everything(table):
    table.fail(next(iter(table.graph.nodes)), "")
    assert {row.state for row in table.rows() if row.cell.victim_seed == 0} == {"skipped"}
    assert next(row for row in table.rows()).error == "data seed 0: failed"


def test_an_empty_store_is_all_to_do(tmp_path):
    table = Table(tmp_path)
    table.store = Store(tmp_path / "nowhere")
    assert {row.state for row in table.rows()} == {"todo"}
    text = table.render()
    assert section(text, "Repairs")[2] == ["none", "to do", "to do", "to do", "to do"]
    assert "failed*" not in text
    assert not (tmp_path / "nowhere").exists()


def test_a_broken_result_is_one_line(full):
    path = full.store.folder(full.graph.cells[0].keys[-1]) / "result.json"
    path.write_text("{")
    with pytest.raises(DataError, match="delete its folder and run the plan again"):
        full.render()


def test_over_attacks_has_mean_and_worst_without_the_control(full):
    found = {row.defence.repair: row for row in tables.over_attacks(full.rows(), full.plan)}
    assert found["tuned"].mean["attack_success"] == pytest.approx((0.525 + 0.475) / 2)
    assert found["tuned"].worst["attack_success"] == pytest.approx(0.55)
    assert found["tuned"].worst_attack == {"accuracy": "BadNets", "attack_success": "BadNets", "triggered_accuracy": "BadNets"}
    assert (found["tuned"].count.done, found["tuned"].attacks, found["tuned"].planned) == (12, 2, 2)


def test_over_attacks_says_how_many_are_repaired_and_what_it_cost(tmp_path):
    table = Table(tmp_path)
    own, after = 0.2, {"BadNets": 0.29, "Blended": 0.31}  # the bar is 0.3
    lost = {"BadNets": 0.01, "Blended": 0.05}
    for cell in table.graph.cells:
        if cell.backdoor == "none":
            table.finish(cell, 0.9, own)
        elif cell.repair == "none":
            table.finish(cell, 0.8 + 0.01 * cell.victim_seed, 1.0)
        else:
            table.finish(cell, 0.8 + 0.01 * cell.victim_seed - lost[cell.backdoor], after[cell.backdoor])
    found = {row.defence.repair: row for row in tables.over_attacks(table.rows(), table.plan)}
    assert (found["tuned"].repaired, found["none"].repaired) == (1, 0)
    assert found["none"].lost is None
    assert found["tuned"].lost == tables.Lost(pytest.approx(0.03), pytest.approx(0.05), "Blended", 2)
    assert section(table.render(), "Over attacks")[-1][-3:] == ["1 of 2", "3.0", "5.0 (Blended)"]


def test_without_a_benign_network_nobody_knows_what_is_repaired(tmp_path):
    table = Table(tmp_path, PLAN.replace('[[backdoor]]\nname = "none"\n', ""))
    table.fill()
    assert {row.known for row in tables.over_attacks(table.rows(), table.plan)} == {0}
    assert section(table.render(), "Over attacks")[-1][-3] == "-"


def test_what_is_not_measured_yet_is_not_counted_as_not_repaired(tmp_path):
    table = Table(tmp_path)
    table.fill([cell for cell in table.graph.cells if "Blended" not in (cell.backdoor, cell.trigger) or cell.repair == "tuned"])
    [row] = [row for row in tables.over_attacks(table.rows(), table.plan) if row.defence.repair == "tuned"]
    assert (row.attacks, row.known, row.lost.known) == (2, 1, 1)
    shown = {line[0]: line[-3:] for line in section(table.render(), "Over attacks")}
    assert shown["tuned"] == ["0 of 1", "-0.5, 1 of 2", "-0.5 (BadNets)"]


@pytest.mark.parametrize("format", ["text", "csv", "md"])
def test_tables_can_be_made_from_the_cells_alone(full, tmp_path, format):
    (tmp_path / "cells.csv").write_text(full.render("csv", with_cost=True))
    again = export.read_csv(tmp_path / "cells.csv", full.plan, expand(full.plan, digest=str))
    assert export.render(again, full.plan, format, with_cost=True) == full.render(format, with_cost=True)


def test_cells_of_all_states_are_read_again(tmp_path):
    table = Table(tmp_path)
    first, second = table.cells(backdoor="BadNets")[:2]
    table.finish(first, 0.9, 0.5)
    table.fail(second.keys[-1])
    table.fail(table.cells(backdoor="Blended")[0].keys[0])
    (tmp_path / "cells.csv").write_text(table.render("csv", with_cost=True))
    assert export.read_csv(tmp_path / "cells.csv", table.plan, table.graph) == table.rows()


def test_cells_that_a_csv_lacks_are_to_do(full, tmp_path):
    (tmp_path / "cells.csv").write_text("".join(full.render("csv").splitlines(keepends=True)[:-1]))
    found = export.read_csv(tmp_path / "cells.csv", full.plan, full.graph)
    assert [row.state for row in found].count("todo") == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("net,BadNets,", "net,Other,", r"the plan has no cell net / Other / BadNets / none / none / 0"),
        (",done,", ",fine,", "state must be one of done, failed, skipped, todo, got fine"),
        (",done,0.", ",done,much.", "accuracy must be a number, got much"),
        (",done,0.", ",done,80.", r"accuracy must be a share in \[0, 1\] with low, high and n, got 80"),
        (",done,0.8", ",done,nan", "accuracy must be finite, got nan"),
        (",1000,", ",,", r"accuracy must be a share in \[0, 1\] with low, high and n, got 0"),
        ("state", "stat", "it has no column state"),
        ("victim_seed", "\0\udcff", "can't decode|NUL|no column"),
        ("net,BadNets,BadNets,,none,none,1", "net,BadNets,BadNets,,none,none,0", "stands there twice"),
    ],
)
def test_a_csv_of_something_else_is_one_line(full, tmp_path, old, new, said):
    assert old in full.render("csv")
    (tmp_path / "cells.csv").write_bytes(full.render("csv").replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"is no table of plan 'small': .*({said}).*; give a CSV") as error:
        export.read_csv(tmp_path / "cells.csv", full.plan, full.graph)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "hello\n"])
def test_what_is_no_table_is_not_taken_for_an_empty_one(full, tmp_path, text):
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(DataError, match="it has no column model, backdoor"):
        export.read_csv(tmp_path / "cells.csv", full.plan, full.graph)


def test_rates_are_exact_again_where_a_csv_has_few_digits(full, tmp_path):
    old = full.render("csv")
    (tmp_path / "cells.csv").write_text(old.replace(",0.8,", ",0.8004,"))
    found = export.read_csv(tmp_path / "cells.csv", full.plan, full.graph)
    assert full.cells()
    assert {row.rates["accuracy"]["value"] for row in found} >= {0.8}


def test_a_csv_that_is_not_there(full, tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*cells.csv: No such file"):
        export.read_csv(tmp_path / "cells.csv", full.plan, full.graph)


def test_one_attack_has_no_table_over_attacks(tmp_path):
    table = Table(tmp_path, PLAN.replace('[[backdoor]]\nname = "blended"\nlabel = "Blended"\n', ""))
    table.fill()
    assert tables.over_attacks(table.rows(), table.plan) == []
    assert "OVER ATTACKS" not in table.render()


def test_the_control_stands_apart(full):
    text = full.render()
    assert section(text, "Benign control")[1][:4] == ["repair", "accuracy", "ASR under BadNets", "ASR under Blended"]
    assert section(text, "Benign control")[2][2] == "2.0 ± 0.0 [2.0, 2.0] (2.0)"
    assert not any("none ASR" in cell for line in section(text, "Repairs") for cell in line)


def test_only_benign_networks(tmp_path):
    attacks = PLAN[PLAN.index("[[backdoor]]") : PLAN.index('[[backdoor]]\nname = "none"')]
    table = Table(tmp_path, PLAN.replace(attacks, ""))
    for cell in table.graph.cells:
        table.finish(cell, 0.9)
    text = table.render()
    assert section(text, "Networks")[1] == ["repair", "accuracy"]
    assert "MEAN RANKS" not in text
    assert "PAIRED" not in text
    assert json.loads(table.render("json"))["cells"][0]["rates"]["attack_success"] is None


def test_ranks_put_failures_last_and_leave_unfinished_blocks_out(table):
    failed = table.cells(backdoor="BadNets", repair="pruned", victim_seed=0, repair_seed=0)[0]
    todo = table.cells(backdoor="Blended", repair="tuned", victim_seed=0, repair_seed=0)[0]
    table.fill([cell for cell in table.graph.cells if cell not in (failed, todo)])
    table.fail(failed.keys[1])
    by_success, by_accuracy = tables.rankings(table.rows(), table.plan)
    assert (by_success.ranks.blocks, by_success.planned) == (11, 12)
    assert by_success.ranks.mean == {"tuned": pytest.approx((10 * 2 + 1) / 11), "pruned": pytest.approx((10 * 1 + 2) / 11)}
    assert by_success.failed == {"tuned": 0, "pruned": 1}
    assert by_accuracy.ranks.mean == {"tuned": pytest.approx((10 * 1.5 + 1) / 11), "pruned": pytest.approx((10 * 1.5 + 2) / 11)}
    assert "1.09 (1 failed)*" in table.render()


def test_paired_differences_from_the_first_fine_tuning_or_any_other(full):
    found = {(row.config.backdoor, row.config.repair, row.metric): row for row in tables.differences(full.rows(), full.plan)}
    assert {key[1] for key in found} == {"pruned"}
    value = found["BadNets", "pruned", "attack_success"].value
    assert (value.mean, value.n, value.blocks, value.p) == (pytest.approx(-0.4), 3, 6, 0.25)
    unrepaired = tables.differences(full.rows(), full.plan, baseline="none")
    assert {row.config.repair for row in unrepaired} == {"tuned", "pruned"}
    first = next(row for row in unrepaired if row.config.repair == "tuned" and row.metric == "attack_success")
    assert first.value.mean == pytest.approx(0.525 - 0.92)  # its two repair seeds against the one victim
    with pytest.raises(MethodError, match="unknown baseline 'tune'"):
        tables.differences(full.rows(), full.plan, baseline="tune")


def test_reported_numbers_stand_beside_measured_ones(full):
    text = full.render()
    head, *rows = section(text, "Repairs")[1:]
    assert head[1:4] == ["BadNets accuracy", "BadNets ASR", "BadNets ASR, reported"]
    assert rows[1][2:4] == ["52.5 ± 2.0 [47.5, 57.5] (55.0)", "7.0 [1]"]
    assert ["[1] reported by: Somebody, 2020"] in section(text, "Repairs")
    assert ["not in this table, reported by: Nobody, 2021 for backdoor BadNetz: accuracy 50.0"] in section(text, "Repairs")
    assert full.group("BadNets", "tuned").stats["attack_success"].summary.mean == pytest.approx(0.525)
    assert not full.group("BadNets", "pruned").reported


def test_one_victim_says_so(tmp_path):
    table = Table(tmp_path, PLAN.replace("victim_seeds = [0, 1, 2]", "victim_seeds = [0]"))
    table.fill()
    text = table.render()
    assert "one victim seed: no interval" in text
    assert "±" not in text
    assert section(text, "Repairs")[3][1:3] == ["80.5", "50.5 (51.0)"]
    assert section(text, "Paired differences")[2][2:] == ["-40.0", "0.0"]
    assert json.loads(table.render("json"))["groups"][1]["stats"]["accuracy"]["summary"]["low"] is None


def test_csv_has_a_line_per_cell(full):
    rows = list(csv.DictReader(io.StringIO(full.render("csv"))))
    assert len(rows) == len(full.graph.cells)
    row = next(row for row in rows if row["backdoor"] == "BadNets" and row["repair"] == "tuned")
    assert list(row)[: len(COLUMNS) + 5] == [*COLUMNS, "state", "accuracy", "accuracy_low", "accuracy_high", "accuracy_n"]
    assert (row["clean"], row["attack_success"], row["attack_success_n"]) == ("0.05", "0.5", "1000")
    assert (row["removed_share"], row["parameters"], row["nonzero"], row["error"]) == ("0.25", "100", "90", "")
    assert "seconds" not in row
    costly = next(csv.DictReader(io.StringIO(full.render("csv", with_cost=True))))
    assert (costly["seconds"], costly["host"]) == ("2", "here")


def test_tables_do_not_depend_on_the_order_of_filling(tmp_path):
    texts = set()
    for seed in range(3):
        table = Table(tmp_path / str(seed))
        cells = list(table.graph.cells)
        random.Random(seed).shuffle(cells)
        bad = table.cells(backdoor="Blended", repair="tuned")
        for cell in cells:
            table.fail(cell.keys[1]) if cell in bad else table.finish(cell, *numbers(cell))
        texts.add(tuple(table.render(format) for format in export.FORMATS))
    assert len(texts) == 1


def test_csv_is_sorted_whatever_the_order_of_the_plan(full, tmp_path):
    lines = full.render("csv").splitlines()
    repairs = PLAN[PLAN.index('[[repair]]\nname = "fine') : PLAN.index("[reported]")]
    first, second = repairs.split("[[repair]]")[1:]
    other = Table(tmp_path, PLAN.replace(repairs, f"[[repair]]{second}[[repair]]{first}").replace("[0, 1, 2]", "[2, 0, 1]"))
    assert other.graph.cells != full.graph.cells
    assert other.render("csv").splitlines() == lines


def test_json_has_everything(full):
    document = json.loads(full.render("json"))
    assert (document["schema_version"], document["kind"], document["plan"]) == (1, "bench", "small")
    assert len(document["cells"]) == 60
    assert "seconds" not in document["cells"][0]
    group = next(row for row in document["groups"] if (row["backdoor"], row["repair"]) == ("BadNets", "tuned"))
    assert group["count"] == {"done": 6, "failed": 0, "todo": 0}
    assert group["stats"]["attack_success"]["summary"]["mean"] == pytest.approx(0.525)
    assert group["reported"][0]["source"] == "Somebody, 2020"
    assert document["attacks"][0]["worst_attack"]["attack_success"] == "BadNets"
    assert document["ranks"][0]["ranks"]["mean"] == {"tuned": 2, "pruned": 1}
    assert document["paired"][0]["value"]["mean"] == pytest.approx(-0.4)


def test_half_batch_is_said(table):
    cells = table.cells(backdoor="BadNets", victim_seed=0)
    table.fill(cells[:1])
    table.finish(cells[1], 0.9, 0.1, scale=0.5)
    assert table.rows()[1].note == "half batch (repair)"
    assert "half batch (repair)" in table.render("csv")
    assert section(table.render(), "Half batch")[2][-1] == "half batch (repair)"


def test_markdown_shows_hostile_names_letter_by_letter(tmp_path):
    text = PLAN.replace('label = "pruned"', 'label = "<b>|x"').replace('name = "small"', 'name = "a\\u001b[2J"')
    table = Table(tmp_path, text)
    table.fail(table.cells(backdoor="BadNets", repair="<b>|x")[0].keys[1], "OSError: \x1b[2J [x](y) | <i>")
    markdown = table.render("md")
    assert "<b>" not in markdown
    assert "<i>" not in markdown
    widths = {line.replace("\\|", "").count("|") for line in markdown.split("## Failed cells")[1].splitlines() if "|" in line}
    assert len(widths) == 1
    for format in ("md", "text", "csv"):
        assert "\x1b" not in table.render(format)


def test_markdown_of_a_finished_plan(full):
    lines = full.render("md").splitlines()
    assert lines[0] == "# small"
    assert lines[2] == "- 60 cells: 60 done, 0 failed, 0 to do; 3 victim seeds x 2 repair seeds"
    assert lines[3] == "- model net; clean 5 %; compress none"
    accuracy, badnets = r"82.5 ± 2.0 \[77.5, 87.5\]", r"52.5 ± 2.0 \[47.5, 57.5\] \(55.0\)"
    blended = r"47.5 ± 2.0 \[42.5, 52.5\] \(50.0\)"
    assert rf"| tuned | {accuracy} | {badnets} | 7.0 \[1\] | {accuracy} | {blended} |" in lines


def test_cost_is_shown_when_asked_for(full):
    assert "COST" not in full.render()
    assert section(full.render(with_cost=True), "Cost")[2] == ["none", "2.0", "here"]


def test_unknown_format(full):
    with pytest.raises(MethodError, match="unknown format 'tex'; did you mean 'text'"):
        full.render("tex")


def test_parquet_has_typed_columns(full, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    export.to_parquet(tmp_path / "cells.parquet", full.rows(), full.plan)
    found = pq.read_table(tmp_path / "cells.parquet")
    types = {field.name: str(field.type) for field in found.schema}
    assert {types[name] for name in ("accuracy", "clean", "removed_share")} == {"double"}
    assert {types[name] for name in ("accuracy_n", "repair_seed", "nonzero")} == {"int64"}
    assert found.column_names == full.render("csv").partition("\n")[0].split(",")
    assert found.num_rows == 60
    with pytest.raises(DataError, match="name another file"):
        export.to_parquet(tmp_path / "no" / "cells.parquet", full.rows(), full.plan)


def test_parquet_needs_pyarrow(full, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MethodError, match=r"needs pyarrow; run: pip install secateur\[parquet\]"):
        export.to_parquet(tmp_path / "cells.parquet", full.rows(), full.plan)


def test_tables_need_nothing_heavy():
    heavy = ("torch", "numpy", "scipy", "pyarrow")
    code = (
        f"import sys, {tables.__name__}, {layout.__name__}, {export.__name__}; sys.exit(any(m in sys.modules for m in {heavy}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ATTACKS = """
format = 1
name = "attacks"
victim_seeds = {seeds}
[data]
name = "fashion-mini"
[[model]]
name = "convnet"
label = "net"
[[backdoor]]
name = "badnets"
label = "BadNets"
[[backdoor]]
name = "blended"
label = "Blended"
[[backdoor]]
name = "none"
[reported]
file = "reported.toml"
"""


def attack_study(path, seeds="[0]"):
    """A plan without repairs, done: BadNets 90 / 100 %, Blended 80 / 50 %, the benign net 92 % and 4 % under any trigger."""
    table = Table(path, ATTACKS.format(seeds=seeds))
    (path / "reported.toml").write_text(
        '[[reported]]\nsource = "Somebody, 2020"\nwhere = { backdoor = "BadNets" }\naccuracy = 0.913\nattack_success = 0.95\n'
    )
    table.plan = read_plan(path / "plan.toml")
    for cell in table.graph.cells:
        seen = {"l2": 2.5, "linf": 0.75, "ssim": 0.9876, "n": 10} if cell.backdoor == "BadNets" else {}
        if not table.store.done(cell.keys[0]):
            table.put(cell.keys[0], {"trigger": seen} if seen else {})
        table.finish(cell, *{"BadNets": (0.9, 1.0), "Blended": (0.8, 0.5), "none": (0.92, 0.04)}[cell.backdoor])
    return table


def test_a_plan_of_attacks_alone_has_a_row_per_attack_beside_the_benign_net(tmp_path):
    text = attack_study(tmp_path).render("md")
    assert "## Attacks" in text
    assert "## Repairs" not in text
    assert "Benign control" not in text
    lines = {
        line.split(" | ")[0].strip("| "): [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    }
    head = "backdoor, accuracy, change, ASR, ASR on the benign net, reported: accuracy / ASR, L2, Linf, SSIM"
    assert lines["backdoor"] == head.split(", ")
    assert [cell.partition(" ")[0] for cell in lines["BadNets"][1:6]] == ["90.0", "-2.0", "100.0", "4.0", "91.3"]
    assert lines["BadNets"][6:] == ["2.5", "0.75", "0.988"]
    assert [cell.partition(" ")[0] for cell in lines["Blended"][1:]] == ["80.0", "-12.0", "50.0", "4.0", "-", "-", "-", "-"]
    assert lines["no backdoor"][1].startswith("92.0 ")
    assert "reported by: Somebody, 2020" in text


def test_several_victims_have_intervals_over_victims_instead_of_images(tmp_path):
    text = attack_study(tmp_path, "[0, 1]").render()
    assert "Wilson" not in text
    assert "90.0 ± 0.0 [90.0, 90.0]" in text


def test_visibility_stands_in_the_cells_of_an_attack_study_alone(tmp_path, full):
    rows = list(csv.DictReader(io.StringIO(attack_study(tmp_path / "a").render("csv"))))
    assert {row["backdoor"]: row["ssim"] for row in rows} == {"BadNets": "0.9876", "Blended": "", "none": ""}
    assert "ssim" not in full.render("csv").splitlines()[0]


def test_what_was_flagged_counts_each_network_once(tmp_path):
    """A benign network stands in the table once per trigger, and a repair that does not look is no part of it."""
    table = Table(tmp_path)
    for cell in table.graph.cells:
        table.flags = {} if cell.repair == "tuned" else {"flagged": float(cell.backdoor == "BadNets" or cell.victim_seed == 0)}
        table.finish(cell, *numbers(cell))
    [section] = table.render("md").split("## What was flagged")[1:]
    lines = [line for line in section.split("##")[0].splitlines() if "|" in line]
    assert len(lines) == 3
    assert lines[2] == r"| pruned | 6 of 6 | 2 of 6 | 66.7 \[39.1, 86.2\] of 12 | 33.3 \[9.7, 70.0\] of 6 |"
    cells = list(csv.DictReader(io.StringIO(table.render("csv"))))
    assert {row["flagged"] for row in cells if row["repair"] == "tuned"} == {""}
    assert {row["flagged"] for row in cells if row["repair"] == "pruned" and row["backdoor"] == "BadNets"} == {"1"}
    assert {cell["flagged"] for cell in json.loads(table.render("json"))["cells"]} == {None, 0, 1}


def test_nothing_is_said_of_flags_where_no_repair_looks(tmp_path):
    table = Table(tmp_path)
    table.fill()
    assert "flagged" not in table.render("md")
