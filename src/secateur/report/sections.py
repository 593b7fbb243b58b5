"""A record cut into titled sections of text and tables, which every rendering lays out in its own way."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from . import compression, inside, robustness, wording
from .parts import Bar, Cell, Record, Section, Span, Table, number_cell, rate_cell, text_cell
from .wording import Rate, clip, number, plain, setting

RATES = {
    "accuracy": "Accuracy",
    "attack_success": "Attack success",
    "triggered_accuracy": "Triggered accuracy",
    "adversarial_accuracy": "Adversarial accuracy",
}
LEARNED = {
    "evaluations": "Evaluations",
    "games": "Games",
    "reward": "Reward",
    "rise": "Rise of the clean error",
    "sign": "Signs of a backdoor",
    "cut": "Neurons cut",
}
COUNTS = ("evaluations", "games")
MAX_LEARNED = 16


def sections(result: Record) -> tuple[Section, ...]:
    """Return the sections of a record in reading order, without those that would be empty."""
    details = result["details"]
    measured, ids = details.get("robustness"), {check["id"] for check in result["checks"] if check["status"] == "finding"}
    parts = (
        robustness.against(result["checks"]) if measured else _checks(result["checks"]),
        _findings([finding for finding in result["findings"] if not (measured and finding["rule"] in ids)]),
        _outcome(result["before"], result["after"], details),
        *(robustness.sections(measured) if measured else ()),
        *inside.sections(details.get("study")),
        *compression.sections(details.get("compression")),
        _compared(result["before"], details.get("compared", ())),
        _learning(details.get("history", ())),
        _path(details.get("path", ())),
        _neurons(details["graphs"]) if details.get("graphs") else _layers(details.get("layers", ())),
        _backdoor(details.get("backdoor")),
        _trigger(details.get("trigger")),
        Section("notes", "Notes", tuple(map(plain, details.get("notes", ())))),
        _limits(result["limitations"]),
        *([robustness.passed(result["checks"])] if measured else []),
        _reproduce(result),
    )
    tidy = (replace(part, tables=tuple(_tidy(table) for table in part.tables if table.rows)) for part in parts)
    return tuple(part for part in tidy if part.lines or part.code or part.tables)


def headline(result: Record) -> str:
    """Return the sentence on top: the verdict, if there is one, and the figures that matter."""
    if "robustness" in result["details"]:
        return robustness.headline(result)
    return compression.headline(result) if "compression" in result["details"] else wording.headline(result)


def _tidy(table: Table) -> Table:
    """Return a table without the columns that say nothing in any row."""
    used = [i for i in range(len(table.head)) if i == 0 or any(row[i].text for row in table.rows)]
    rows = tuple(tuple(row[i] for i in used) for row in table.rows)
    return replace(table, head=tuple(table.head[i] for i in used), rows=rows)


def method_line(result: Record) -> str:
    """Return which method ran, with its seed and its time."""
    method = result["method"]
    seed = "" if method["seed"] is None else f", seed {method['seed']}"
    took = wording.seconds(result["cost"]["seconds"])
    if "robustness" in result["details"]:
        return f"{plain(method['name'])} (procedure {method['version']}{seed}), {took}"
    measuring = ", without the measuring" if result["after"] else ""
    return f"{plain(method['name'])} (version {method['version']}{seed}), {took}{measuring}"


def shorten(section: Section, *, rows: int, length: int) -> Section:
    """Return a section with at most ``rows`` rows per list and ``length`` characters per text, saying what was left out."""
    left = [len(section.lines) - rows, *(len(table.rows) - rows for table in section.tables)]
    more = [f"{n:,} more in result.json." for n in left if n > 0]
    return replace(
        section,
        lines=(*(clip(line, length) for line in section.lines[:rows]), *more),
        tables=tuple(_shorten_table(table, rows, length) for table in section.tables),
        code=clip(section.code, 4 * length),
    )


def _shorten_table(table: Table, rows: int, length: int) -> Table:
    short = (
        tuple(replace(cell, text=clip(cell.text, length), exact=clip(cell.exact, length)) for cell in row)
        for row in table.rows[:rows]
    )
    return replace(table, rows=tuple(short), figures=table.figures[:rows])


def _size(value: float | None) -> Cell:
    return number_cell(None) if value is None else Cell(wording.human(value, "B"), f"{value:,} bytes", value)


def _work(value: float | None) -> Cell:
    return number_cell(None) if value is None else Cell(wording.human(value), f"{value:,} for one image", value)


def _latency(value: float | None) -> Cell:
    return number_cell(None) if value is None else Cell(f"{value:.3g} ms", key=value)


COSTS: Mapping[str, tuple[str, Callable[[float | None], Cell]]] = {
    "parameters": ("Parameters", number_cell),
    "nonzero": ("Non-zero parameters", number_cell),
    "size_bytes": ("Size", _size),
    "macs": ("Multiply-accumulates", _work),
    "latency_ms": ("Time per image, one thread", _latency),
}


def _pairs(pairs: Mapping[str, str], head: tuple[str, str], caption: str) -> Table:
    return Table(head, tuple((text_cell(name), Cell(value)) for name, value in pairs.items()), caption)


def _outcome(before: Record, after: Record, details: Record) -> Section:
    if not before and not after:
        return Section("outcome", "What was measured")
    before, after = (before, after) if after else ({}, before)
    attacked = not before and after["adversarial_accuracy"] is not None
    told = attacked or "compression" in details
    labels = {name: label for name, label in RATES.items() if not told or after.get(name)}
    rows = [_rate_row(label, before.get(name), after.get(name)) for name, label in labels.items()]
    figures: list[Span | None] = [_span(before.get(name), after.get(name)) for name in labels]
    rows += [_cost_row(label, before, after, name, show) for name, (label, show) in COSTS.items()]
    figures += [None] * len(COSTS)
    table = Table(("Measure", "Before", "After", "Change", "n"), tuple(rows), "", tuple(figures), "0 to 100 %")
    if before:
        return Section("outcome", "Before and after", tables=(table,))
    only = tuple((label, value, n) for label, _, value, _, n in table.rows)
    return Section("outcome", "What was measured", tables=(replace(table, head=("Measure", "Value", "n"), rows=only),))


def _span(before: Rate | None, after: Rate | None) -> Span | None:
    return None if before is None and after is None else Span(before, after)


def _rate_row(label: str, before: Rate | None, after: Rate | None) -> tuple[Cell, ...]:
    counted = sorted({value["n"] for value in (before, after) if value is not None})
    n = Cell(" / ".join(f"{n:,}" for n in counted), key=max(counted, default=0))
    change = None if before is None or after is None else after["value"] - before["value"]
    return (Cell(label), rate_cell(before), rate_cell(after), Cell(wording.points(before, after), key=change), n)


def _cost_row(label: str, before: Record, after: Record, name: str, show: Callable[[float | None], Cell]) -> tuple[Cell, ...]:
    old, new = before.get(name), after.get(name)
    return (Cell(label), show(old), show(new), Cell(wording.relative(old, new)), Cell(""))


def _checks(checks: Sequence[Record]) -> Section:
    head = ("Check", "Status", "What it says", "Numbers", "Seconds")
    rows = tuple(
        (
            text_cell(check["id"]),
            Cell(check["status"]),
            text_cell(check["why"]),
            Cell(", ".join(f"{plain(name)} {number(value)}" for name, value in check["metrics"].items())),
            number_cell(round(check["seconds"], 2)),
        )
        for check in checks
    )
    return Section("checks", "Checks and gates", tables=(Table(head, rows),))


def _findings(findings: Sequence[Record]) -> Section:
    rows = tuple((text_cell(f["rule"]), Cell(f["severity"]), text_cell(f["message"]), text_cell(f["where"])) for f in findings)
    return Section("findings", "Findings", tables=(Table(("Rule", "Severity", "Message", "Where"), rows),))


def _compared(before: Record, compared: Sequence[Record]) -> Section:
    head = ("Repair", "Accuracy", "Attack success", "Parameters", "Seconds", "Note")
    rows = [
        (*_compared_cells(row["name"], row["after"]), number_cell(round(row["seconds"], 1)), text_cell(row["note"]))
        for row in compared
    ]
    if rows and before:
        rows.insert(0, (*_compared_cells("before repair", before), Cell(""), Cell("")))
    return Section("compared", "Repairs side by side", tables=(Table(head, tuple(rows)),))


def _compared_cells(name: str, measured: Record) -> tuple[Cell, ...]:
    return (
        text_cell(name),
        rate_cell(measured["accuracy"]),
        rate_cell(measured["attack_success"]),
        number_cell(measured["parameters"]),
    )


def _path(path: Sequence[Record]) -> Section:
    head = ("Share cut", "Removed", "Accuracy on the hold-out", "n")
    rows = tuple(
        (
            Cell(wording.percent(step["amount"]), key=step["amount"]),
            number_cell(step["removed"]),
            rate_cell(step["holdout"]),
            number_cell(step["holdout"]["n"]),
        )
        for step in path
    )
    return Section("path", "Accuracy against share removed", tables=(Table(head, rows),))


def learned_names(history: Sequence[Record]) -> tuple[str, ...]:
    """Return the names in a history, first the one that says how far learning has come."""
    names = tuple(dict.fromkeys(name for entry in history for name in entry))[:MAX_LEARNED]
    first = next((name for name in COUNTS if name in names), None)
    return names if first is None else (first, *(name for name in names if name != first))


def learned_label(name: str) -> str:
    """Return the title of a number in a history."""
    return LEARNED.get(name, plain(name))


def _learning(history: Sequence[Record]) -> Section:
    rewarded = [entry for entry in history if "reward" in entry]
    best = max(rewarded, key=lambda entry: entry["reward"]) if rewarded else {}
    shown = (*history[:1], best, *history[-1:])
    rows = tuple(
        (Cell(learned_label(name)), *(_learned(name, entry.get(name)) for entry in shown)) for name in learned_names(history)
    )
    noted = f"{len(history):,} entries" if len(history) > 1 else "one entry"
    lines = (f"What the repair noted while it learned, {noted}.",) if rows else ()
    return Section("learning", "Learning", lines, (Table(("Number", "First", "Best reward", "Last"), rows),))


def _learned(name: str, value: float | None) -> Cell:
    return Cell("") if value is None else Cell(wording.learned(name, value), key=value)


def _neurons(graphs: Sequence[Record]) -> Section:
    counts = [len({i for i in graph["cut"] if i < graph["size"]}) for graph in graphs]
    shares = [count / graph["size"] for count, graph in zip(counts, graphs, strict=True)]
    rows = tuple(
        (
            Cell(wording.places(graph["sites"]), plain(", ".join(graph["sites"])) if len(graph["sites"]) > 4 else ""),
            number_cell(count),
            number_cell(graph["size"]),
            Cell(wording.percent(share), key=share),
        )
        for graph, count, share in zip(graphs, counts, shares, strict=True)
    )
    head = ("Layer", "Cut", "Neurons", "Share")
    stream = "Layers in one row write one residual stream: their neurons are cut together."
    lines = (stream,) if any(len(graph["sites"]) > 1 for graph in graphs) else ()
    table = Table(head, rows, "", tuple(map(Bar, shares)), "0 to 100 %")
    return Section("layers", "Neurons cut, layer by layer", lines, (table,))


def _layers(layers: Sequence[Record]) -> Section:
    shares = [min(layer["removed"] / layer["total"], 1.0) if layer["total"] else 0.0 for layer in layers]
    rows = tuple(
        (
            text_cell(layer["name"]),
            number_cell(layer["removed"]),
            number_cell(layer["total"]),
            Cell(wording.percent(share), key=share),
        )
        for layer, share in zip(layers, shares, strict=True)
    )
    head = ("Layer", "Removed", "Of", "Share")
    return Section("layers", "Where it was cut", tables=(Table(head, rows, "", tuple(map(Bar, shares)), "0 to 100 %"),))


def _trigger(trigger: Record | None) -> Section:
    if trigger is None:
        return Section("trigger", "The trigger")
    sources = "every class" if trigger["sources"] is None else f"classes {setting(trigger['sources'])}"
    target = "the next class" if trigger["target"] == "next" else f"class {trigger['target']}"
    lines = [f"Kind {plain(trigger['kind'])}: moves {sources} to {target}."]
    if seen := trigger.get("visibility"):
        norms = f"L2 {number(seen['l2'])}, Linf {number(seen['linf'])} of values in [0, 1], SSIM {number(seen['ssim'])}"
        lines.append(f"It changes an image by {norms} (means over {seen['n']:,} images).")
    return Section("trigger", "The trigger", tuple(lines))


def _backdoor(backdoor: Record | None) -> Section:
    if backdoor is None:
        return Section("backdoor", "The backdoor that was put in")
    name = f"{plain(backdoor['name'])} (version {backdoor['version']})"
    told = f"{name}; {backdoor['poisoned']:,} training images were changed beforehand."
    if not backdoor["poisoned"]:
        told = f"{name}; the attacker controls training and poisons as it goes."
    settings = _pairs({name: setting(value) for name, value in backdoor["args"].items()}, ("Setting", "Value"), "")
    return Section("backdoor", "The backdoor that was put in", (told,), (settings,))


def _limits(limitations: Sequence[str]) -> Section:
    nothing = "This record lists nothing; that does not mean that everything was tested."
    return Section("limits", "What was not tested", tuple(map(plain, limitations)) or (nothing,))


def _reproduce(result: Record) -> Section:
    method, log = result["method"], result["details"].get("log", {})
    arguments = {"seed": setting(method["seed"]), **{name: setting(value) for name, value in method["args"].items()}}
    tables = (
        _pairs(arguments, ("Argument", "Value"), f"Method: {plain(method['name'])}, version {method['version']}"),
        _pairs({name: number(value) for name, value in log.items()}, ("Name", "Number"), "Numbers the method kept"),
        _data(result["data"]),
        _inputs(result["inputs"]),
        _pairs(_environment(result), ("Name", "Value"), "Environment"),
    )
    lines = () if result["command"] else ("Called from Python: no command line was recorded.",)
    return Section("reproduce", "How to reproduce", lines, tables, plain(shlex.join(result["command"])))


def _data(data: Mapping[str, Record]) -> Table:
    rows = tuple(
        (
            text_cell(role),
            text_cell(images["name"]),
            number_cell(images["n"]),
            Cell(wording.per_class(images["per_class"])),
            text_cell(images["sha256"]),
        )
        for role, images in data.items()
    )
    return Table(("Role", "Images", "n", "Per class", "SHA-256"), rows, "Data")


def _inputs(inputs: Sequence[Record]) -> Table:
    rows = tuple(
        (text_cell(entry["path"]), Cell("; ".join(f"{plain(k)}: {setting(v)}" for k, v in entry.items() if k != "path")))
        for entry in inputs
    )
    return Table(("File", "What is known of it"), rows, "Files read")


def _environment(result: Record) -> dict[str, str]:
    tool = result["tool"]
    written = {"secateur": tool["version"], "commit": tool["commit"], "created": result["created"]}
    pairs = {**written, **result["environment"], **result["cost"]}
    return {name: setting(value) for name, value in pairs.items() if value is not None}
