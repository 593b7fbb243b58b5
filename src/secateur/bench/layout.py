"""A plan's table for people: Markdown, or plain text in aligned columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..binomial import wilson_interval
from ..report.markdown import escape
from ..report.wording import plain, signed
from .choices import NONE
from .nodes import COLUMNS
from .plan import Plan
from .stats import Block, Summary
from .tables import (
    ATTACK,
    REPAIRED,
    VISIBILITY,
    Config,
    Count,
    Defence,
    Difference,
    Group,
    Row,
    aggregate,
    attack_labels,
    differences,
    over_attacks,
    rankings,
)

Column = tuple[str, str, Callable[[Group], str]]  # title, the backdoor or trigger it is about, and what it shows
Lines = Mapping[Defence, Mapping[str, Group]]  # by backdoor or trigger

NAMES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "attack_success": "ASR",
    "triggered_accuracy": "triggered accuracy",
    "retuned_attack_success": "ASR after retuning",
    "white_box": "white-box accuracy",
    "to_parent": "parent's accuracy under its images",
}
DEFENCE = Defence._fields
GAP = "  "
NOTHING = "-"


def named(metric: str) -> str:
    """Return what tables call a metric."""
    return NAMES.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Section:
    """A titled table with notes above and below it."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    above: Sequence[str] = ()
    below: Sequence[str] = ()

    def without(self, titles: Iterable[str]) -> Section:
        """Return the section without the columns of these titles."""
        kept = [i for i, title in enumerate(self.head) if title not in titles]
        return replace(self, head=[self.head[i] for i in kept], rows=[[row[i] for i in kept] for row in self.rows])


def render(rows: Sequence[Row], plan: Plan, *, markdown: bool, with_cost: bool = False) -> str:
    """Return the tables of a plan's cells; every text in it is made harmless for the terminal or for Markdown."""
    groups = aggregate(rows, plan)
    if plan.studies_attacks:
        sections = [_victims(rows, groups, plan)]
    else:
        sections = [_main(groups, plan), _attacks(rows, plan), _control(groups, plan), _flagged(rows, plan)]
        sections += [_ranks(rows, plan), _paired(rows, plan)]
    sections += [*([_cost(rows)] if with_cost else []), _failed(rows), _skipped(rows), _halved(rows)]
    single = _single(plan)
    shown = [section.without(single) for section in sections if section.rows or section.below]
    head = [*_headline(rows, plan), "; ".join(f"{title} {label}" for title, label in single.items())]
    lines = (_markdown if markdown else _text)(plan.name, [line for line in head if line], shown)
    return "\n".join(lines).rstrip() + "\n"


def _single(plan: Plan) -> dict[str, str]:
    """Return the columns that say the same everywhere, which the tables leave out."""
    clean = [_share(share) for share in plan.data.clean]
    models, compressors = ([choice.label for choice in choices] for choices in (plan.models, plan.compressors))
    axes = {"model": models, "clean": clean, "compress": compressors}
    if not plan.repairs and not plan.studies_attacks:
        axes["repair"] = [NONE]
    return {title: labels[0] for title, labels in axes.items() if len(labels) == 1}


def _headline(rows: Sequence[Row], plan: Plan) -> list[str]:
    states = [row.state for row in rows]
    shown = [f"{states.count(state)} {word}" for state, word in (("done", "done"), ("failed", "failed"), ("todo", "to do"))]
    if "skipped" in states:
        shown.insert(2, f"{states.count('skipped')} skipped")
    seeds = f"{_many(len(plan.victim_seeds), 'victim seed')} x {_many(len(plan.repair_seeds), 'repair seed')}"
    lines = [f"{_many(len(rows), 'cell')}: {', '.join(shown)}; {seeds}"]
    if len(plan.victim_seeds) == 1:
        lines.append("one victim seed: no interval")
    if "failed" in states or "skipped" in states:
        lines.append("* some cells failed: the number is over those that are done, as many as it says")
    return lines


def _main(groups: Sequence[Group], plan: Plan) -> Section:
    attacks = attack_labels(plan)
    lines = _lines(groups, attacks, "backdoor")
    matched = [row for line in lines.values() for group in line.values() for row in group.reported]
    sources = list(dict.fromkeys(row.source for row in matched if any(metric in row.values for metric in _shown(plan))))
    columns: list[Column] = []
    for attack in attacks:
        for metric in _shown(plan):
            title, published = f"{attack} {named(metric)}", partial(_published, metric=metric, sources=sources)
            columns.append((title, attack, partial(_level, metric=metric)))
            if any(published(line[attack]) for line in lines.values() if attack in line):
                columns.append((f"{title}, reported", attack, published))
    below = [f"[{i}] reported by: {source}" for i, source in enumerate(sources, 1)]
    below += _unmatched(lines, plan)
    return _grid("Repairs", lines, columns, [_legend(plan)], below)


def _victims(rows: Sequence[Row], groups: Sequence[Group], plan: Plan) -> Section:
    """Return a plan of attacks alone: a row each, beside the benign network's rate under the same trigger."""
    attacks = attack_labels(plan)
    benign = {(group.config.model, group.config.trigger): group for group in groups if group.config.backdoor not in attacks}
    seen = {row.config: row.visibility for row in rows if row.visibility}
    sources = list(dict.fromkeys(row.source for group in groups for row in group.reported))
    table = []
    for model in [choice.label for choice in plan.models]:
        control = next((group for (name, _), group in benign.items() if name == model), None)
        if control is not None:
            unpoisoned = _level(control, "accuracy") + _within(control, "accuracy", rows)
            table.append([model, "no backdoor", unpoisoned, *[NOTHING] * (6 + len(sources[:1]))])
        for group in groups:
            if group.config.model != model or group.config.backdoor not in attacks:
                continue
            shown = benign.get((model, group.config.trigger))
            cells = [model, group.config.backdoor, _level(group, "accuracy") + _within(group, "accuracy", rows)]
            cells += [_drop(group, control), _level(group, ATTACK) + _within(group, ATTACK, rows)]
            cells += [_level(shown, ATTACK) if shown else NOTHING]
            if sources:
                both = [_published(group, metric, sources) or NOTHING for metric in ("accuracy", ATTACK)]
                cells.append(NOTHING if both == [NOTHING] * 2 else " / ".join(both))
            cells += [f"{seen[group.config][name]:.3g}" if group.config in seen else NOTHING for name in VISIBILITY]
            table.append(cells)
    head = ["model", "backdoor", "accuracy", "change", "ASR", "ASR on the benign net"]
    head += [*(["reported: accuracy / ASR"] if sources else []), "L2", "Linf", "SSIM"]
    above = [
        _legend(plan) if len(plan.victim_seeds) > 1 else "Percent [95 % Wilson interval over images].",
        "change: accuracy against the benign net, in points.",
        "ASR on the benign net: what the trigger does to a network without the backdoor.",
        "L2, Linf (of values in [0, 1]) and SSIM of the change, means over images.",
    ]
    below = [f"[{i}] reported by: {source}" for i, source in enumerate(sources, 1)]
    return Section("Attacks", head, table, above, below)


def _within(group: Group, metric: str, rows: Sequence[Row]) -> str:
    """Return the interval over images of a group of one cell; those of several have one over victims."""
    if group.count.total > 1:
        return ""
    rates = [row.rates[metric] for row in rows if row.config == group.config and metric in row.rates]
    return "".join(f" [{_pc(rate['low'])}, {_pc(rate['high'])}]" for rate in rates)


def _drop(group: Group, control: Group | None) -> str:
    if control is None or "accuracy" not in group.stats or "accuracy" not in control.stats:
        return NOTHING
    return signed(100 * (group.stats["accuracy"].summary.mean - control.stats["accuracy"].summary.mean), 1)


def _grid(title: str, lines: Lines, columns: Sequence[Column], above: Sequence[str], below: Sequence[str] = ()) -> Section:
    """Return a table with a row per defence and the columns given."""
    rows = [
        [*_named(defence), *(show(line[label]) if label in line else NOTHING for _, label, show in columns)]
        for defence, line in lines.items()
    ]
    head = [*DEFENCE, *(name for name, _, _ in columns)]
    return Section(title, head, rows, above, below)


def _legend(plan: Plan) -> str:
    if len(plan.victim_seeds) == len(plan.repair_seeds) == 1:
        return "Percent."
    several = "mean ± standard deviation over victims [95 % t-interval of the mean, cut at 0 and 100]"
    mean = several if len(plan.victim_seeds) > 1 else "mean"
    within = ", repair seeds averaged within each victim first" if len(plan.repair_seeds) > 1 else ""
    return f"Percent: {mean}{within}; the worst ASR over the seeds in round brackets."


def _attacks(rows: Sequence[Row], plan: Plan) -> Section:
    table = []
    for row in over_attacks(rows, plan):
        star = "*" if row.count.failed else ""
        cells = [*_named(row.defence), f"{row.attacks} of {row.planned}", f"{row.count.done} of {row.count.total}{star}"]
        for metric in plan.metrics:
            known = metric in row.mean
            cells.append(f"{_pc(row.mean[metric])}{star}" if known else _empty(row.count))
            cells.append(f"{_pc(row.worst[metric])} ({row.worst_attack[metric]}){star}" if known else NOTHING)
        cells.append(f"{row.repaired} of {row.known}{star}" if row.known else NOTHING)
        if row.lost is None:
            cells += [NOTHING, NOTHING]
        else:
            some = "" if row.lost.known == row.planned else f", {row.lost.known} of {row.planned}"
            cells += [f"{_pc(row.lost.mean)}{some}{star}", f"{_pc(row.lost.most)} ({row.lost.attack}){star}"]
        table.append(cells)
    head = [*DEFENCE, "attacks", "cells", *(f"{what} {named(metric)}" for metric in plan.metrics for what in ("mean", "worst"))]
    above = [
        "Percent; mean of the attacks' means, and the worst of their cells.",
        f"repaired: attacks whose ASR ends within {100 * REPAIRED:.0f} points of the benign network's own.",
        "lost: points of accuracy against the same networks unrepaired, mean of the attacks and the most.",
    ]
    return Section("Over attacks", [*head, "repaired", "lost", "most lost"], table, above)


def _control(groups: Sequence[Group], plan: Plan) -> Section:
    attacks = attack_labels(plan)
    benign = [group for group in groups if group.config.backdoor not in attacks]
    triggers = list(dict.fromkeys(group.config.trigger for group in benign))
    columns: list[Column] = []
    for metric in plan.metrics:
        show = partial(_level, metric=metric)
        if metric == "accuracy" or (plan.evasion and metric in plan.evasion.metrics):  # the same under every trigger
            columns += [(named(metric), trigger, show) for trigger in triggers[:1]]
        elif attacks:
            columns += [(f"{named(metric)} under {trigger}", trigger, show) for trigger in triggers]
    lines = _lines(benign, triggers, "trigger")
    if not attacks:
        return _grid("Networks", lines, columns, ["Percent of images answered rightly."])
    above = ["Networks without a backdoor: the rates that are there under each attack's trigger anyway."]
    return _grid("Benign control", lines, columns, above)


def _flagged(rows: Iterable[Row], plan: Plan) -> Section:
    """Return how often repairs that look for a backdoor claim to have found one."""
    attacks = attack_labels(plan)
    found: dict[Defence, dict[tuple[str, Block], bool]] = {}  # a benign network stands in the table once per trigger
    for row in rows:
        if row.flagged is not None:
            found.setdefault(row.config.defence, {})[row.config.backdoor, row.block] = row.flagged > 0
    table = []
    for defence, networks in found.items():
        by_backdoor: dict[str, list[bool]] = {attack: [] for attack in attacks}
        for (backdoor, _), flagged in networks.items():
            by_backdoor.setdefault(backdoor, []).append(flagged)
        attacked = [flagged for attack in attacks for flagged in by_backdoor[attack]]
        benign = [flagged for backdoor, some in by_backdoor.items() if backdoor not in attacks for flagged in some]
        each = [f"{sum(by_backdoor[attack])} of {len(by_backdoor[attack])}" for attack in attacks]
        table.append([*_named(defence), *each, _share_of(attacked), _share_of(benign)])
    above = ["Networks in which the repair flagged a class as a backdoor's target; percent with 95 % Wilson intervals."]
    return Section("What was flagged", [*DEFENCE, *attacks, "with a backdoor", "without one"], table, above)


def _share_of(flagged: Sequence[bool]) -> str:
    if not flagged:
        return NOTHING
    low, high = wilson_interval(sum(flagged), len(flagged))
    return f"{_pc(sum(flagged) / len(flagged))} [{_pc(low)}, {_pc(high)}] of {len(flagged)}"


def _ranks(rows: Sequence[Row], plan: Plan) -> Section:
    found = rankings(rows, plan)
    table = []
    for repair in [choice.label for choice in plan.repairs] if found else ():
        cells = [repair]
        for ranking in found:
            failed = f" ({ranking.failed[repair]} failed)*" if ranking.failed[repair] else ""
            cells.append(f"{ranking.ranks.mean[repair]:.2f}{failed}" if ranking.ranks.blocks else NOTHING)
        table.append(cells)
    blocks = ", ".join(f"{ranking.ranks.blocks} of {ranking.planned} by {named(ranking.metric)}" for ranking in found)
    above = [f"1 is best, ties share a rank, a failed cell ranks last; blocks ranked: {blocks}."]
    return Section("Mean ranks", ["repair", *(f"rank by {named(ranking.metric)}" for ranking in found)], table, above)


def _paired(rows: Sequence[Row], plan: Plan) -> Section:
    found = differences(rows, plan)
    lines: dict[Config, dict[str, Difference]] = {}
    for difference in found:
        lines.setdefault(difference.config, {})[difference.metric] = difference
    metrics = list(dict.fromkeys(difference.metric for difference in found))
    table = []
    for config, line in lines.items():
        names = [config.model, config.backdoor, _share(config.clean), config.repair, config.compress]
        table.append(names + [_difference(line[metric]) for metric in metrics])
    head = ["model", "backdoor", "clean", "repair", "compress", *(f"{named(metric)}, points" for metric in metrics)]
    above = []
    if found:
        interval = "[95 % t-interval] and p of the signed-rank test over n victims"
        seeds = interval if len(plan.victim_seeds) > 1 else "no interval"
        above = [f"Repair minus '{found[0].baseline}' on the same seeds: mean difference; {seeds}."]
    return Section("Paired differences", head, table, above)


def _difference(found: Difference) -> str:
    value = found.value
    done = value.blocks if value else 0
    tag = _tag(Count(done, found.failed, found.planned - done - found.failed), " pairs")
    if value is None:
        return NOTHING + tag
    text = signed(100 * value.mean, 1)
    if value.low is not None and value.high is not None:
        text += f" [{signed(100 * value.low, 1)}, {signed(100 * value.high, 1)}], p={value.p:.2g}, n={value.n}"
    return text + tag


def _cost(rows: Iterable[Row]) -> Section:
    found: dict[Defence, list[Row]] = {}
    for row in rows:
        if row.seconds is not None:
            found.setdefault(row.config.defence, []).append(row)
    table = []
    for defence, same in found.items():
        seconds = [row.seconds for row in same if row.seconds is not None]
        hosts = ", ".join(dict.fromkeys(row.host for row in same))
        table.append([*_named(defence), f"{sum(seconds) / len(seconds):.1f}", hosts])
    above = ["Mean seconds of the repair and compression of one network; without either, of its training."]
    return Section("Cost", [*DEFENCE, "seconds", "hosts"], table, above)


def _failed(rows: Iterable[Row]) -> Section:
    table = [[*_cell(row), row.error] for row in rows if row.state == "failed"]
    return Section("Failed cells", [*COLUMNS, "error"], table)


def _skipped(rows: Iterable[Row]) -> Section:
    errors = Counter(row.error for row in rows if row.state == "skipped")
    return Section("Skipped cells", ["cells", "because of"], [[str(number), error] for error, number in errors.items()])


def _halved(rows: Iterable[Row]) -> Section:
    above = ["Nodes that ran out of memory and then ran with half the batch size."]
    return Section("Half batch", [*COLUMNS, "note"], [[*_cell(row), row.note] for row in rows if row.note], above)


def _lines(groups: Iterable[Group], labels: Sequence[str], axis: str) -> Lines:
    found: dict[Defence, dict[str, Group]] = {}
    for group in groups:
        label = getattr(group.config, axis)
        if label in labels:
            found.setdefault(group.config.defence, {})[label] = group
    return found


def _named(defence: Defence) -> list[str]:
    return [defence.model, _share(defence.clean), defence.repair, defence.compress]


def _cell(row: Row) -> list[str]:
    cell = row.cell
    seed = NOTHING if cell.repair_seed is None else str(cell.repair_seed)
    config = [cell.model, cell.backdoor, cell.trigger, _share(cell.clean), cell.repair, cell.compress]
    return [*config, str(cell.victim_seed), seed]


def _share(clean: float | None) -> str:
    return NOTHING if clean is None else f"{100 * clean:.4g} %"


def _pc(value: float) -> str:
    return f"{100 * value:.1f}"


def _level(group: Group, metric: str) -> str:
    """Return ``91.2 ± 0.4 [90.2, 92.2]``; where cells are missing, how many it stands for; a star where some failed."""
    stat = group.stats.get(metric)
    if stat is None:
        return _empty(group.count)
    spread = f" ± {_pc(stat.summary.sd)} {_interval(stat.summary)}" if stat.summary.sd is not None else ""
    worst = f" ({_pc(stat.worst)})" if metric == ATTACK and group.count.done > 1 else ""
    return f"{_pc(stat.summary.mean)}{spread}{worst}{_tag(group.count)}"


def _interval(summary: Summary) -> str:
    if summary.low is None or summary.high is None:
        return ""
    return f"[{_pc(max(summary.low, 0.0))}, {_pc(min(summary.high, 1.0))}]"


def _tag(count: Count, unit: str = "") -> str:
    if count.done == count.total:
        return ""
    return f", {count.done} of {count.total}{unit}{'*' if count.failed else ''}"


def _empty(count: Count) -> str:
    if count.failed == count.total:
        return "failed*"
    return "to do" if count.todo == count.total else NOTHING + _tag(count)


def _published(group: Group, metric: str, sources: Sequence[str]) -> str:
    rows = [row for row in group.reported if metric in row.values]
    return ", ".join(f"{_pc(row.values[metric])} [{sources.index(row.source) + 1}]" for row in rows)


def _shown(plan: Plan) -> Sequence[str]:
    """Return the metrics of the main table; triggered accuracy would make it too wide."""
    return [name for name in plan.metrics if name != "triggered_accuracy"] or plan.metrics


def _unmatched(lines: Lines, plan: Plan) -> Iterator[str]:
    """Yield every reported number that the main table has no place for."""
    matched = {id(row) for line in lines.values() for group in line.values() for row in group.reported}
    for row in plan.reported:
        left = [name for name in row.values if id(row) not in matched or name not in _shown(plan)]
        if left:
            where = ", ".join(f"{column} {value}" for column, value in row.where.items()) or "everything"
            numbers = ", ".join(f"{named(name)} {_pc(row.values[name])}" for name in left)
            yield f"not in this table, reported by: {row.source} for {where}: {numbers}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _markdown(name: str, head: Sequence[str], sections: Iterable[Section]) -> Iterator[str]:
    yield from (f"# {escape(name)}", "", *_bullets(head))
    for section in sections:
        yield from (f"## {escape(section.title)}", "")
        if section.rows:
            yield from (*_bullets(section.above), _bar(section.head), _bar("---" for _ in section.head))
            yield from (*(_bar(row) for row in section.rows), "")
        yield from _bullets(section.below)


def _bullets(lines: Sequence[str]) -> list[str]:
    return [*(f"- {escape(line)}" for line in lines), ""] if lines else []


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _text(name: str, head: Sequence[str], sections: Iterable[Section]) -> Iterator[str]:
    yield from (plain(name), *map(plain, head))
    for section in sections:
        yield from ("", section.title.upper())
        if section.rows:
            yield from map(plain, section.above)
            lines = [[plain(cell) for cell in line] for line in (section.head, *section.rows)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            yield from (GAP.join(map(str.ljust, line, widths)).rstrip() for line in lines)
        yield from map(plain, section.below)
