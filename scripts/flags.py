"""Print what inversion said of each network in a plan's results, as CSV: the leaps.csv of results/benign and results/flagged.

python scripts/flags.py STORE > leaps.csv
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

COLUMNS = "classes_flagged", "suspect", "leap", "anomaly", "inverted_success"
LOGGED = "flagged", "suspect", "shortcut", "anomaly", "inverted_success"


def main(store: Path) -> None:
    """Write a row for each repair that logs a suspect."""
    configs = {file.parent: json.loads(file.read_text("utf-8")) for file in store.glob("nodes/*/*/config.json")}
    by_key = {folder.name: config for folder, config in configs.items()}
    rows = []
    for folder, config in configs.items():
        if config["method"] not in ("auto", "neural-cleanse"):
            continue
        values = json.loads((folder / "result.json").read_text("utf-8"))["values"]
        victim = by_key[config["parents"]["model"]]
        log = [f"{values['log'][name]:.4g}" for name in LOGGED]
        chosen = next((note.removeprefix("chosen: ") for note in values["notes"] if note.startswith("chosen: ")), "")
        rows.append((victim["method"], victim["seed"], *log, chosen))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("backdoor", "victim_seed", *COLUMNS, "chosen"))
    table.writerows(sorted(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
