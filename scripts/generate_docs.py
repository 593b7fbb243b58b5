"""Write the generated parts of the docs from the tables they describe; ``--check`` only compares.

* ``docs/methods.md``: every method with its settings, from ``methods.py``.
* The README's results table, from ``results/norm-pruning/cells.csv``.
* The findings in ``docs/threat-model.md``, from ``intake/findings.py``.
* ``docs/checks.md``: every check of a robustness figure, from ``measure/sanity/table.py`` and the docstrings of its functions.
"""

from __future__ import annotations

import csv
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from secateur import methods
from secateur.bench.stats import summary
from secateur.intake.findings import RULES
from secateur.measure.sanity import RULES as CHECKS

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "results" / "norm-pruning" / "cells.csv"
SHOWN = (
    "none",
    "fine-tuning alone",
    *(f"l2 filters, then fine-tuning (layers={place})" for place in ("early", "middle", "late")),
    "random filters, late, then fine-tuning",
)
START, END = "<!-- generated -->", "<!-- end of generated -->"


def methods_page() -> str:
    """Return ``docs/methods.md``."""
    lines = ["# Methods", "", "Generated from `src/secateur/methods.py` by `make docs`; do not edit.", ""]
    for kind in methods.KINDS:
        rows = methods.table(kind)
        if not rows:
            continue
        lines += [f"## {kind.capitalize()}s", ""]
        for row in rows:
            told = f"Source: {row.paper}. Version {row.version}."
            if row.access and row.visibility:
                told += f" The attacker controls {row.access}; the trigger is {row.visibility}."
            if row.needs:
                told += f" Needs {', '.join(f'`--{need}`' for need in sorted(row.needs))}."
            lines += [f"### {row.name}", "", f"{methods.summary(row)} {told}", ""]
            found = methods.parameters(row)
            if found:
                lines += ["| setting | default | meaning |", "|---|---|---|"]
                lines += [f"| `{p.name}` | `{p.default}` | {p.help} |" for p in found]
                lines.append("")
    return "\n".join(lines)


def results_table() -> str:
    """Return the README's table: both attacks, a few rows, mean and worst victim."""
    if not CELLS.exists():
        return "(no results yet)"
    rows = list(csv.DictReader(CELLS.open(encoding="utf-8")))
    attacks = list(dict.fromkeys(row["backdoor"] for row in rows))
    lines = ["| repair |" + "".join(f" {attack}: accuracy | ASR (worst) |" for attack in attacks)]
    lines.append("|---|" + "---|---|" * len(attacks))
    for repair in SHOWN:
        cells = ["no repair" if repair == "none" else repair]
        for attack in attacks:
            mine = [row for row in rows if (row["backdoor"], row["repair"]) == (attack, repair)]
            if not mine or any(row["state"] != "done" for row in mine):
                raise SystemExit(f"{CELLS}: '{repair}' against {attack} is not done; run the plan to its end first")
            rates = [float(row["attack_success"]) for row in mine]
            cells += [_spread(float(row["accuracy"]) for row in mine), f"{_spread(rates)} ({100 * max(rates):.1f})"]
        lines.append("| " + " | ".join(cells) + " |")
    victims = len({row["victim_seed"] for row in rows})
    n = f"accuracy on {rows[0]['accuracy_n']}, ASR on {rows[0]['attack_success_n']} test images per victim"
    lines += ["", f"Percent, mean ± standard deviation over {victims} victims; {n}."]
    return "\n".join(lines)


def _spread(rates: Iterable[float]) -> str:
    found = summary(list(rates))
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.sd:.1f}" if found.sd is not None else "")


def findings() -> str:
    """Return every rule of the door with its severity and what to do."""
    return "\n".join(f"### {name}\n\n**{rule.severity}.** {rule.title}: {rule.remedy}.\n" for name, rule in RULES.items())


CHECKS_PAGE = """# The checks of a robustness figure

Generated from `src/secateur/measure/sanity/` by `make docs`; do not edit.

A robustness figure is what some attacks left over, and every mistake in attacking raises it. These checks look for the known
mistakes; `secateur attack` runs them all, `secateur.measure.sanity` too ([robustness.md](robustness.md)). Ids never change
their meaning.

| status | what it says | in the record | in SARIF |
|---|---|---|---|
| PASS | this mistake was not found; others may have been made | `ok` | not written |
| WARN | somebody should look; the figure stands | `finding`, severity medium | `warning` |
| FAIL | **robustness is not established**: no number may be quoted; exit code 1 | `finding`, severity high | `error` |
| SKIPPED | could not be judged, and it says why | `skipped` | not written |

"Beyond chance" is a test at 1 in 2000, so that all of them together fail a network for which each just holds in about 1 of
100 audits.

| check | asks |
|---|---|
"""


def checks() -> str:
    """Return ``docs/checks.md``: of each check what it measures, why, what its verdicts mean and what to do."""
    told = {rule: explained(rule.judge) for rule in CHECKS}
    rows = "".join(f"| [{rule.id}](#{rule.id.lower()}) {rule.name} | {text[0]} |\n" for rule, text in told.items())
    parts = [CHECKS_PAGE + rows]
    for rule, (*asked, why, statuses) in told.items():
        table = "\n".join(f"| {name} | {when} |" for name, when in verdicts(statuses))
        parts.append(
            f'<a id="{rule.id.lower()}"></a>\n\n## {rule.id} {rule.name}\n\n**What it measures.** {" ".join(asked)}\n\n'
            f"**Why it matters.** {capital(why.removeprefix('Why: '))}\n\n| verdict | when |\n|---|---|\n{table}\n\n"
            f"**What a failure means.** {capital(rule.means)}.\n\n**What to do.** {capital(rule.remedy)}.\n"
        )
    return "\n".join(parts)


def explained(judge: Callable[..., object]) -> list[str]:
    """Return the paragraphs of a check's docstring: what it asks, more of it, why, and last its verdicts, one a line."""
    *paragraphs, last = inspect.cleandoc(judge.__doc__ or "").split("\n\n")
    return [*(paragraph.replace("\n", " ") for paragraph in paragraphs), last]


def verdicts(text: str) -> list[tuple[str, str]]:
    """Return the verdicts that a paragraph lists, ``PASS: ...``, each with when it is given."""
    found = re.findall(r"^([A-Z]+): (.*?)(?=\n[A-Z]+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return [(name, capital(when.replace("\n", " "))) for name, when in found]


def capital(text: str) -> str:
    """Return a text that begins with a capital letter, unless it begins with code."""
    return text[:1].upper() + text[1:]


def filled(path: Path, part: str) -> str:
    """Return a page with its generated part made anew."""
    before, _, rest = path.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{part}\n{END}{after}"


def main() -> int:
    """Write, or compare and return 1 when something is stale."""
    threats = ROOT / "docs" / "threat-model.md"
    wanted = {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "README.md": filled(ROOT / "README.md", results_table()),
        threats: filled(threats, findings()),
        ROOT / "docs" / "checks.md": checks(),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run make docs")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], "utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
