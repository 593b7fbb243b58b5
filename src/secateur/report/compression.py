"""Sections of a compression's record: how small it is now, and whose images fool whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .parts import Cell, Record, Section, Table, rate_cell, text_cell
from .wording import human, percent, plain, rate


def headline(result: Record) -> str:
    """Return what was gained and what it cost."""
    before, after = result["before"], result["after"]
    found = result["details"]["compression"]
    earlier, now = found.get("times_before", 1), found.get("times", 1)
    times = f"{now:.3g} times fewer parameters" if now > earlier else "The same parameters"
    times += f" ({earlier:.3g} before)" if now > earlier and round(earlier, 2) > 1 else ""
    small = [human(value, "B") for value in found["encoded_bytes"]]
    return (
        f"{times}, {small[0]} to {small[1]} encoded; accuracy {percent(before['accuracy']['value'])} to "
        f"{percent(after['accuracy']['value'])}, under attack at most {percent(before['adversarial_accuracy']['value'])} to "
        f"{percent(after['adversarial_accuracy']['value'])}."
    )


def sections(found: Record | None) -> tuple[Section, ...]:
    """Return sizes, and accuracy under the images made on each of the two networks."""
    if found is None:
        return ()
    sizes = [Cell(human(value, "B"), f"{value:,} bytes", value) for value in found["encoded_bytes"]]
    rows = [(text_cell("Encoded: zeros as a bitmap, whole numbers as bytes, compressed"), *sizes)]
    lines = ["The bundle keeps floating point and masks; secateur.compress.encode makes the encoded form."]
    runtime = found.get("runtime")
    if runtime is not None and "why" in runtime:
        lines.append(f"No integer file: {plain(runtime['why'])}.")
    elif runtime is not None:
        size = Cell(human(runtime["bytes"], "B"), "", runtime["bytes"])
        rows.append((text_cell("8-bit ONNX file"), Cell(""), size))
        lines += [
            f"ONNX Runtime gives the answer of the network here on {rate(runtime['agreement'])} of the images; "
            f"accuracy there {rate(runtime['accuracy'])}.",
            *_times(runtime),
        ]
    small = Section("sizes", "How small", tuple(lines), (Table(("Kept as", "Before", "After"), tuple(rows)),))
    return small, _transfer(found), _choices(found.get("choices", ()))


def _times(runtime: Record) -> Iterator[str]:
    if "latency_ms" in runtime:
        before = runtime.get("latency_ms_before")
        beside = "" if before is None else f"; the network before, in floating point there, {before:.3g} ms"
        yield f"One image takes {runtime['latency_ms']:.3g} ms there, on one thread of this machine{beside}."


def _apart(divergence: Record | None) -> Iterator[str]:
    if divergence is not None:
        yield (
            f"Of the images that both answer rightly, {rate(divergence)} could be changed so that the network before stays "
            "right and the one after is wrong (DIVA): a check of the network before does not see them."
        )


def _choices(choices: Sequence[Record]) -> Section:
    """Return what each target would leave; the drawing is made of the same."""
    rows = tuple(
        (
            text_cell(each["name"]),
            Cell(human(each["encoded_bytes"], "B"), f"{each['encoded_bytes']:,} bytes", each["encoded_bytes"]),
            *(rate_cell(each[name]) for name in ("accuracy", "transfer", "white_box")),
        )
        for each in choices
    )
    lines = (
        "The same method with other targets; one seed each, so that neighbours may change places.",
        "A choice that another beats in accuracy and under attack need not be made.",
    )
    head = ("Target", "Encoded", "Accuracy", "Under images made on the network before", "Under its own")
    return Section("choices", "What other targets would leave", lines if rows else (), (Table(head, rows),))


def _transfer(found: Record) -> Section:
    rows = tuple(
        (
            text_cell(f"made on the network {cell['source']}"),
            text_cell(f"shown to the network {cell['target']}"),
            rate_cell(cell["left"]),
            rate_cell(cell["success"]),
        )
        for cell in found["transfer"]
    )
    lines = (
        f"{plain(found['budget'])}; {plain(found['threat'])}.",
        "A network shown its own images is the white box; few right answers to begin with leave few to lose.",
        *_apart(found.get("divergence")),
    )
    head = ("Images", "", "Answered rightly", "Fooled, of those both answer rightly when clean")
    return Section("transfer", "Under attack, before and after", lines, (Table(head, rows),))
