"""Write the generated parts of the docs from the tables they describe; ``--check`` only compares.

* ``docs/methods.md``: every method with its settings, from ``methods.py``.
* The README's results table, from ``results/norm-pruning/cells.csv``.
* The findings in ``docs/threat-model.md``, from ``intake/findings.py``.
* The checks in ``docs/robustness.md``, from ``measure/sanity/table.py``.
"""

from __future__ import annotations

import csv
import inspect
import sys
from collections.abc import Iterable
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


def checks() -> str:
    """Return every check of a robustness figure: what it asks, what a failure means, what to do."""
    parts = []
    for rule in CHECKS:
        asked = inspect.cleandoc(rule.judge.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        parts.append(f"### {rule.id} {rule.name}\n\n{asked} **A failure means:** {rule.means}. **Then** {rule.remedy}.\n")
    return "\n".join(parts)


def filled(path: Path, part: str) -> str:
    """Return a page with its generated part made anew."""
    before, _, rest = path.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{part}\n{END}{after}"


def main() -> int:
    """Write, or compare and return 1 when something is stale."""
    threats, robustness = ROOT / "docs" / "threat-model.md", ROOT / "docs" / "robustness.md"
    wanted = {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "README.md": filled(ROOT / "README.md", results_table()),
        threats: filled(threats, findings()),
        robustness: filled(robustness, checks()),
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
