"""Sections of a robustness record: what attacks left, and what speaks for and against the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .parts import Cell, Record, Section, Table, number_cell, rate_cell, text_cell
from .wording import budget, number, percent, plain, rate, seconds

STATUS = {"high": "failed", "critical": "failed"}
SHOWN = 10


def against(checks: Sequence[Record]) -> Section:
    """Return the checks that found something or could not judge, with what that means and what to do about it."""
    counts = {name: sum(_status(check) == name for check in checks) for name in ("failed", "warning", "error", "skipped", "ok")}
    found = [check for name in ("failed", "warning") for check in checks if _status(check) == name]
    plural = {"warning": "warnings", "error": "errors"}
    told = ", ".join(f"{count} {plural.get(name, name) if count > 1 else name}" for name, count in counts.items() if count)
    lines = [f"Of {len(checks)} checks of what could make the figure wrong: {told}."] if checks else []
    skipped = [check for check in checks if _status(check) in ("skipped", "error")]
    lines += [f"Not judged: {_name(check)} ({plain(check['why'])})." for check in skipped]
    rows = tuple(
        (
            Cell(_name(check)),
            Cell(_status(check)),
            Cell(_said(check)),
            text_cell(check.get("means", "")),
            text_cell(check.get("remedy", "")),
        )
        for check in found
    )
    head = ("Check", "Status", "What was found", "What that means", "What to do")
    return Section("checks", "Whether the figure means anything", tuple(lines), (Table(head, rows),))


def passed(checks: Sequence[Record]) -> Section:
    """Return every check with its number, what a failure would mean and the remedy."""
    head = ("Check", "Status", "What was found", "Number", "A failure would mean", "Remedy")
    rows = tuple(
        (
            Cell(_name(check)),
            Cell(_status(check)),
            text_cell(check["why"]),
            Cell(", ".join(number(float(f"{value:.3g}")) for value in check["metrics"].values())),
            text_cell(check.get("means", "")),
            text_cell(check.get("remedy", "")),
        )
        for check in checks
    )
    return Section("passed", "All checks", tables=(Table(head, rows),))


def sections(measured: Record) -> tuple[Section, ...]:
    """Return what each attack did, the curve over eps and the transfer matrix; those not measured are empty."""
    return _attacks(measured), _curve(measured), _transfer(measured.get("transfer"))


def _status(check: Record) -> str:
    if check["status"] != "finding":
        return check["status"]
    return STATUS.get(check.get("severity", "high"), "warning")


def _name(check: Record) -> str:
    return plain(f"{check['id']} {check.get('name', '')}").strip()


def _said(check: Record) -> str:
    images = check.get("images", ())
    return plain(check["why"]) + (f" (images {_places(images, len(images))})" if images else "")


def _attacks(measured: Record) -> Section:
    attacks, worst, checked = measured["attacks"], measured["worst"], measured["checked"]
    clean, threat = worst["returned"]["clean_accuracy"], measured["threat"]
    bound, knowing = checked["upper_bound"], KNOWING.get(threat["knowledge"], threat["knowledge"])
    lines = [
        f"Budget: {budget(threat)}, {knowing}. {rate(clean)} of {clean['n']:,} images are right without an attack.",
        "Worst of all: right are the images that no attack broke. Robust accuracy is at most this, never more.",
        f"With the checks' own attacks too, {rate(bound)} of the {bound['n']:,} images that they looked at stay right.",
        *(line for attack in attacks for line in _remarks(attack, len(attacks))),
    ]
    tables = [_rates(attacks, worst, which, caption) for which, caption in CAPTIONS.items()]
    used = tuple(
        (text_cell(attack["name"]), text_cell(attack["budget"]), Cell(seconds(attack["seconds"]), key=attack["seconds"]))
        for attack in attacks
    )
    tables.append(Table(("Attack", "Settings", "Time"), used, "Settings"))
    return Section("attacks", "Attacks, each and together", tuple(lines), tuple(tables))


def _remarks(attack: Record, attacks: int) -> Iterator[str]:
    """Yield what its rates do not say of an attack."""
    name = plain(attack["name"])
    if "error" in attack:
        yield f"{name} COULD NOT RUN on some or all images, and left them as they were: {plain(attack['error'])}"
    if attack["refused"]:
        yield f"{name}: {attack['refused']:,} of its images were beyond the threat model and did not count."
    if attack["alone"] and attacks > 1:
        yield f"{name} alone broke {attack['alone']:,} of the images: {_places(attack['alone_images'], attack['alone'])}."


def _places(images: Sequence[int], count: int) -> str:
    """Return where images stand, of many the first."""
    shown = images[:SHOWN]
    return ", ".join(map(str, shown)) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


KNOWING = {"none": "blind (nothing is asked of the network)"}
CAPTIONS: Mapping[str, str] = {
    "returned": "As the attacks returned their images",
    "stored": "The same images as 8-bit files keep them",
}


def _rates(attacks: Sequence[Record], worst: Record, which: str, caption: str) -> Table:
    rows = [(text_cell(attack["name"]), *_cells(attack[which])) for attack in attacks]
    rows.append((Cell("worst of all"), *_cells(worst[which])))
    head = ("Attack", "Right under attack", "Answer changed", "Of those right before: broken")
    return Table(head, tuple(rows), caption)


def _cells(rates: Record) -> tuple[Cell, ...]:
    return tuple(rate_cell(rates[name]) for name in ("remnant_accuracy", "prediction_change_rate", "strict_attack_success"))


def _curve(measured: Record) -> Section:
    curve = measured.get("curve")
    if curve is None:
        return Section("sweep", "Accuracy against eps")
    if "error" in curve:
        return Section("sweep", "Accuracy against eps", (f"Not drawn: an attack could not run: {plain(curve['error'])}",))
    line = f"Under {plain(' and '.join(curve['attacks']))} alone, on some of the images; weaker than all attacks together."
    norm = measured["threat"]["norm"]
    rows = []
    for point in curve["points"]:
        eps, found = point["eps"], point["accuracy"]
        rows.append((Cell(budget({"eps": eps, "norm": norm}), key=eps), rate_cell(found), number_cell(found["n"])))
    return Section("sweep", "Accuracy against eps", (line,), (Table(("Budget", "Right under attack", "n"), tuple(rows)),))


def _transfer(transfer: Record | None) -> Section:
    title = "Images made on one network, shown to another"
    if transfer is None:
        return Section("transfer", title)
    if "error" in transfer:
        return Section("transfer", title, (f"Not measured: the attack could not run: {plain(transfer['error'])}",))
    cells = {(cell["source"], cell["target"]): cell["success"] for cell in transfer["cells"]}
    sources, targets = dict.fromkeys(source for source, _ in cells), dict.fromkeys(target for _, target in cells)
    rows = tuple(
        (text_cell(f"made on {source}"), *(rate_cell(cells.get((source, target))) for target in targets)) for source in sources
    )
    head = ("Images", *(plain(f"shown to {target}") for target in targets))
    lines = (
        "Share answered wrongly, of the images that both networks answer rightly when clean, as 8-bit files keep them.",
        f"Attack: {plain(transfer['budget'])}.",
        "A network shown its own images is the control: an attack that fails there says nothing by failing elsewhere.",
    )
    return Section("transfer", title, lines, (Table(head, rows),))


def headline(result: Record) -> str:
    """Return the sentence on top: first whether the figure means anything, then the figure with all that belongs to it."""
    measured = result["details"]["robustness"]
    left, names = measured["worst"]["returned"]["remnant_accuracy"], ", ".join(attack["name"] for attack in measured["attacks"])
    under = plain(f"{left['n']:,} images ({budget(measured['threat'])}; worst of {names})")
    failed = [check for check in result["checks"] if _status(check) == "failed"]
    if result["verdict"] == "established" and not failed:
        clean = percent(measured["worst"]["returned"]["clean_accuracy"]["value"])
        return f"Robust accuracy is at most {rate(left)} on {under}; {clean} without an attack."
    count = f"{len(failed)} check{'s' if len(failed) != 1 else ''} failed"
    which = f" ({', '.join(_name(check) for check in failed[:3])}{' ...' if len(failed) > 3 else ''})" if failed else ""
    return (
        f"Robustness not established: {count}{which}. These attacks left {rate(left)} of {under}, which is no robust accuracy."
    )
