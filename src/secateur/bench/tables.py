"""From a store to a table: every cell of a plan, and means, ranks and differences that never hide a failed cell.

A cell is ``done``; ``failed``: one of its own steps failed; ``skipped``: its victim, images or trigger failed; or ``todo``.
Whatever is averaged carries the counts of the cells it stands for. Rates lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..errors import check_choice
from ..report.wording import plain
from . import stats
from .nodes import Cell, Graph
from .plan import NONE, RETUNED, Plan, Reported
from .store import Store, find_result

State = Literal["done", "failed", "skipped", "todo"]
ATTACK = "attack_success"
RANKED = (ATTACK, "accuracy")
LOWER = frozenset({ATTACK, RETUNED})  # metrics of which less is better
BASELINE = "fine-tuning"
REPAIRED = 0.1  # attack success above the benign network's own rate that still counts as repaired
VISIBILITY = ("l2", "linf", "ssim")


class Defence(NamedTuple):
    """What is done to which architecture."""

    model: str
    clean: float | None
    repair: str
    compress: str


class Config(NamedTuple):
    """What the cells of a group share: all columns but the seeds."""

    model: str
    backdoor: str
    trigger: str
    clean: float | None
    repair: str
    compress: str

    @property
    def defence(self) -> Defence:
        """The columns without backdoor and trigger."""
        return Defence(self.model, self.clean, self.repair, self.compress)


@dataclass(frozen=True)
class Row:
    """A cell with its results.

    Attributes:
        cell: Where it stands.
        state: See above.
        error: For failed and skipped cells the failed node and its message, on one line.
        rates: Metric -> ``value``, ``low``, ``high`` (Wilson, over images) and ``n``; only what was measured.
        parameters: Of the measured network.
        nonzero: How many of them are not 0.
        macs: Multiply-accumulates for one image.
        removed_share: Share that the repair cut, in [0, 1], if it says so.
        flagged: How many classes the repair flagged as a backdoor's target, if it looks for one.
        visibility: Of a victim: what its trigger changes, ``l2``, ``linf`` and ``ssim``.
        note: Which of its nodes ran at half batch.
        seconds: Time of the repair and the compression; of the training where there is neither.
        host: Where that was.
    """

    cell: Cell
    state: State
    error: str = ""
    rates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: int | None = None
    nonzero: int | None = None
    macs: int | None = None
    removed_share: float | None = None
    flagged: int | None = None
    visibility: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    seconds: float | None = None
    host: str = ""

    @property
    def config(self) -> Config:
        """The cell's columns without the seeds."""
        cell = self.cell
        return Config(cell.model, cell.backdoor, cell.trigger, cell.clean, cell.repair, cell.compress)

    @property
    def block(self) -> stats.Block:
        """The cell's seeds."""
        return self.cell.victim_seed, self.cell.repair_seed


@dataclass(frozen=True)
class Count:
    """How many cells a number stands for; ``failed`` counts skipped ones too."""

    done: int
    failed: int
    todo: int

    @property
    def total(self) -> int:
        """All cells."""
        return self.done + self.failed + self.todo


@dataclass(frozen=True)
class Stat:
    """A metric over the done cells of a group: its mean over victims, and its worst cell."""

    summary: stats.Summary
    worst: float


@dataclass(frozen=True)
class Group:
    """The cells that differ in their seeds alone, and what was published for them."""

    config: Config
    count: Count
    stats: Mapping[str, Stat]
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True)
class Lost:
    """Accuracy lost, over attacks: the mean, the most and where that is, and how many attacks it is known of."""

    mean: float
    most: float
    attack: str
    known: int


@dataclass(frozen=True)
class OverAttacks:
    """One defence over all attacks of the plan; the benign control is no part of it.

    Attributes:
        defence: Which.
        count: Its cells.
        attacks: Attacks with a done cell, which the mean is over.
        planned: Attacks in the plan.
        mean: Metric -> mean of the attacks' means.
        worst: Metric -> worst cell of all.
        worst_attack: Metric -> the attack of that cell.
        repaired: Attacks whose success ends within `REPAIRED` of the benign network's own rate.
        known: Attacks of which that rate is known.
        lost: Accuracy lost against the same victims unrepaired; None without a repair.
    """

    defence: Defence
    count: Count
    attacks: int
    planned: int
    mean: Mapping[str, float]
    worst: Mapping[str, float]
    worst_attack: Mapping[str, str]
    repaired: int = 0
    known: int = 0
    lost: Lost | None = None


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of the repairs by a metric over blocks: one model, attack, share, compression and pair of seeds each.

    A failed cell ranks last in its block. Blocks with cells still to do, and those in which every repair failed, are left out.

    Attributes:
        metric: What they are ranked by.
        ranks: Repair -> mean rank, and the number of blocks.
        planned: Number of blocks in the plan.
        failed: Repair -> failed cells in the blocks ranked.
    """

    metric: str
    ranks: stats.Ranks
    planned: int
    failed: Mapping[str, int]


@dataclass(frozen=True)
class Difference:
    """A repair minus the baseline on the same seeds.

    Attributes:
        config: Of the repair.
        baseline: The repair it is compared with.
        metric: What is compared.
        value: The difference, in [-1, 1]; None when no pair is done.
        planned: Pairs in the plan.
        failed: Pairs in which either failed.
    """

    config: Config
    baseline: str
    metric: str
    value: stats.Paired | None
    planned: int
    failed: int


def rows(graph: Graph, store: Store) -> list[Row]:
    """Return every cell of a plan, in the plan's order, with what the store knows of it.

    Raises:
        DataError: A result cannot be read.
    """
    reader, failures = _Reader(store), store.failures()
    return [reader.row(cell, graph) or _unfinished(cell, graph, failures) for cell in graph.cells]


def aggregate(rows: Iterable[Row], plan: Plan) -> list[Group]:
    """Return the rows grouped over their seeds, in their order.

    Statistics are over the done cells alone, so they are to be read with the group's count.
    """
    return [_group(config, found, plan) for config, found in _by_config(rows).items()]


def over_attacks(rows: Iterable[Row], plan: Plan) -> list[OverAttacks]:
    """Return every defence over all attacks; nothing for a plan of fewer than two."""
    rows, attacks = list(rows), attack_labels(plan)
    if len(attacks) < 2:
        return []
    groups = aggregate(rows, plan)
    own = {
        (group.config.model, group.config.trigger): group.stats[ATTACK].summary.mean
        for group in groups
        if group.config.backdoor not in attacks
        and ATTACK in group.stats
        and {group.config.repair, group.config.compress} == {NONE}
    }
    lost: dict[Defence, dict[str, float]] = {}
    for each in differences(rows, plan, NONE):
        if each.metric == "accuracy" and each.value is not None:
            lost.setdefault(each.config.defence, {})[each.config.backdoor] = -each.value.mean
    defences: dict[Defence, list[Group]] = {}
    for group in groups:
        if group.config.backdoor in attacks:
            defences.setdefault(group.config.defence, []).append(group)
    return [_over(key, found, plan, own, lost.get(key, {})) for key, found in defences.items()]


def rankings(rows: Iterable[Row], plan: Plan) -> list[Ranking]:
    """Return the mean ranks of the plan's repairs by attack success and by accuracy; nothing for fewer than two repairs."""
    attacks, repairs = attack_labels(plan), [choice.label for choice in plan.repairs]
    blocks: dict[tuple, list[Row]] = {}
    for row in rows:
        config = row.config
        if config.repair in repairs and config.backdoor in attacks:
            blocks.setdefault((*config._replace(repair=""), *row.block), []).append(row)
    if len(repairs) < 2 or not blocks:
        return []
    return [_ranking(metric, list(blocks.values()), repairs) for metric in RANKED if metric in plan.metrics]


def differences(rows: Iterable[Row], plan: Plan, baseline: str | None = None) -> list[Difference]:
    """Return every repair minus a baseline, per attack and metric, paired by seeds.

    Args:
        rows: All cells.
        plan: Their plan.
        baseline: Label of a repair, or ``none``; by default the plan's first fine-tuning, else ``none``.

    Raises:
        MethodError: The plan has no such repair.
    """
    labels = [choice.label for choice in plan.repairs]
    if baseline is None:
        baseline = next((choice.label for choice in plan.repairs if choice.name == BASELINE), NONE)
    check_choice("baseline", baseline, [*labels, NONE])
    found = {config: {row.block: row for row in rows} for config, rows in _by_config(rows).items()}
    attacks = attack_labels(plan)
    return [
        _difference(config, of_repair, base, baseline, metric)
        for config, of_repair in found.items()
        if config.backdoor in attacks and config.repair not in (baseline, NONE) and (base := _base(found, config, baseline))
        for metric in RANKED
        if metric in plan.metrics
    ]


def attack_labels(plan: Plan) -> list[str]:
    """Return the labels of the plan's backdoors without the benign control."""
    return [choice.label for choice in plan.backdoors if choice.name != NONE]


def count(rows: Iterable[Row]) -> Count:
    """Count rows by state."""
    states = [row.state for row in rows]
    done, todo = states.count("done"), states.count("todo")
    return Count(done, len(states) - done - todo, todo)


class _Reader:
    """Reads each result once."""

    def __init__(self, store: Store) -> None:
        self._nodes = f"{store.root}/nodes"
        self._kept: dict[str, dict[str, Any] | None] = {}

    def row(self, cell: Cell, graph: Graph) -> Row | None:
        """Return the row of a done cell."""
        end = self._read(cell.keys[-1])
        if end is None:
            return None
        steps = [(graph.nodes[key].stage, self._keep(key)) for key in cell.keys[:-1]]
        known = [(stage, result) for stage, result in steps if result is not None]
        log = next((result["values"].get("log", {}) for stage, result in known if stage == "repair"), {})
        halved = [stage for stage, result in [*known, ("measure", end)] if result["batch_scale"] != 1]
        work = [result for stage, result in known if stage != "victim" or len(steps) == 1]
        size = end["values"].get("cost", {})
        return Row(
            cell,
            "done",
            rates={name: rate for name, rate in end["values"].get("rates", {}).items() if rate is not None},
            parameters=size.get("parameters"),
            nonzero=size.get("nonzero"),
            macs=size.get("macs"),
            removed_share=log.get("removed_share"),
            flagged=int(log["flagged"]) if "flagged" in log else None,
            visibility=dict(steps[0][1]["values"].get("trigger", {})) if steps[0][1] else {},
            note=f"half batch ({', '.join(halved)})" if halved else "",
            seconds=sum(result["cost"]["seconds"] for result in work) if work else None,
            host=" ".join(dict.fromkeys(result["environment"]["host"] for result in work)),
        )

    def _keep(self, key: str) -> dict[str, Any] | None:
        if key not in self._kept:
            self._kept[key] = self._read(key)
        return self._kept[key]

    def _read(self, key: str) -> dict[str, Any] | None:
        return find_result(f"{self._nodes}/{key[:2]}/{key}")


def _unfinished(cell: Cell, graph: Graph, failures: Mapping[str, Mapping[str, Any]]) -> Row:
    parents = graph.nodes[cell.keys[-1]].parents.values()
    own = cell.keys[1:] if len(cell.keys) > 2 else cell.keys
    for key in (*own, *cell.keys, *parents):
        if key in failures:
            message = failures[key].get("message") or failures[key].get("status", "failed")
            return Row(cell, "failed" if key in own else "skipped", plain(f"{graph.nodes[key].label}: {message}"))
    return Row(cell, "todo")


def _by_config(rows: Iterable[Row]) -> dict[Config, list[Row]]:
    found: dict[Config, list[Row]] = {}
    for row in rows:
        found.setdefault(row.config, []).append(row)
    return found


def _group(config: Config, rows: Sequence[Row], plan: Plan) -> Group:
    found = {}
    for metric in plan.metrics:
        values = {row.block: row.rates[metric]["value"] for row in rows if metric in row.rates}
        if values:
            found[metric] = Stat(stats.summary(stats.by_victim(values)), _worst(metric, values.values()))
    columns = config._asdict()
    reported = tuple(row for row in plan.reported if row.where.items() <= columns.items())
    return Group(config, count(rows), found, reported)


def _worst(metric: str, values: Iterable[float]) -> float:
    return max(values) if metric in LOWER else min(values)


def _over(
    key: Defence, groups: Sequence[Group], plan: Plan, own: Mapping[tuple[str, str], float], lost: Mapping[str, float]
) -> OverAttacks:
    mean, worst, attack = {}, {}, {}
    for metric in plan.metrics:
        known = {group.config.backdoor: group.stats[metric] for group in groups if metric in group.stats}
        if known:
            mean[metric] = sum(stat.summary.mean for stat in known.values()) / len(known)
            worst[metric] = _worst(metric, [stat.worst for stat in known.values()])
            attack[metric] = next(label for label, stat in known.items() if stat.worst == worst[metric])
    counts = [group.count for group in groups]
    total = Count(sum(c.done for c in counts), sum(c.failed for c in counts), sum(c.todo for c in counts))
    above = [
        group.stats[ATTACK].summary.mean - own[key.model, group.config.trigger]
        for group in groups
        if ATTACK in group.stats and (key.model, group.config.trigger) in own
    ]
    repaired = sum(each <= REPAIRED for each in above)
    most = max(lost, key=lambda attack: lost[attack], default="")
    loss = Lost(sum(lost.values()) / len(lost), lost[most], most, len(lost)) if lost else None
    done = sum(c.done > 0 for c in counts)
    return OverAttacks(key, total, done, len(groups), mean, worst, attack, repaired, len(above), loss)


def _ranking(metric: str, blocks: Sequence[Sequence[Row]], repairs: Sequence[str]) -> Ranking:
    ranked: list[dict[str, float | None]] = []
    for block in blocks:
        values = {row.cell.repair: row.rates[metric]["value"] if metric in row.rates else None for row in block}
        if all(row.state != "todo" for row in block) and any(value is not None for value in values.values()):
            ranked.append({repair: values.get(repair) for repair in repairs})
    ranks = stats.mean_ranks(ranked, lower=metric in LOWER)
    failed = {repair: sum(block[repair] is None for block in ranked) for repair in repairs}
    return Ranking(metric, ranks, len(blocks), failed)


def _base(found: Mapping[Config, Mapping[stats.Block, Row]], config: Config, baseline: str) -> Mapping[stats.Block, Row]:
    """Return the baseline's rows; the network without repair stands in the table without a clean share."""
    wanted = config._replace(repair=baseline)
    return found.get(wanted) or found.get(wanted._replace(clean=None), {})


def _difference(
    config: Config, a: Mapping[stats.Block, Row], b: Mapping[stats.Block, Row], baseline: str, metric: str
) -> Difference:
    pairs = {block: (row, b.get(block) or b.get((block[0], None))) for block, row in a.items()}
    both = {block: (x, y) for block, (x, y) in pairs.items() if y is not None}
    done = {block: pair for block, pair in both.items() if all(metric in row.rates for row in pair)}
    left = {block: x.rates[metric]["value"] for block, (x, _) in done.items()}
    right = {block: y.rates[metric]["value"] for block, (_, y) in done.items()}
    failed = sum(any(row.state in ("failed", "skipped") for row in pair) for pair in both.values())
    return Difference(config, baseline, metric, stats.paired(left, right) if done else None, len(both), failed)
