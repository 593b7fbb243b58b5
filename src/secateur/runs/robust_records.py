"""What a record says of robustness: rates of each attack, checks, findings, and what was not tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..measure.robustness import Rates, Robustness
from ..measure.sanity import Check, Sanity
from .evading import Entry
from .records import rate_of

KEPT = 1000  # indices of images that a record keeps, of each list
STATUS = {"PASS": "ok", "WARN": "finding", "FAIL": "finding", "SKIPPED": "skipped"}
SEVERITY = {"WARN": "medium", "FAIL": "high"}
UNUSABLE = "ADV-020"


def figures(found: Robustness, checked: Sanity, entries: Sequence[Entry], took: Mapping[str, float]) -> dict[str, Any]:
    """Return the rates of every attack and of the worst case, and what the checks' own attacks left."""
    return {
        "threat": asdict(found.threat),
        "worst": _both(found.worst, found.worst_stored),
        "attacks": [_attack(found, entry, took[entry.name]) for entry in entries],
        "checked": {
            "accuracy": rate_of(checked.clean_accuracy),
            "upper_bound": rate_of(checked.upper_bound),
            "budgets": dict(checked.budgets),
        },
    }


def _both(returned: Rates, stored: Rates) -> dict[str, Any]:
    return {"returned": _rates(returned), "stored": _rates(stored)}


def _rates(rates: Rates) -> dict[str, Any]:
    return {name: rate_of(getattr(rates, name)) for name in Rates.__dataclass_fields__ if name != "target_reached"}


def _attack(found: Robustness, entry: Entry, seconds: float) -> dict[str, Any]:
    name, outcomes = entry.name, found.outcomes
    alone = _alone(found, name)
    return {
        "name": name,
        "method": entry.row.name if entry.row else "mi-fgsm",
        "version": entry.row.version if entry.row else 1,
        "budget": found.budgets[name],
        **_both(found.by_attack[name], found.stored_by_attack[name]),
        "refused": int(outcomes.refused[name].sum()),
        "alone": int(alone.sum()),
        "alone_images": alone.nonzero()[:KEPT, 0].tolist(),
        "seconds": seconds,
        **({"error": f"{entry.error} ({entry.lost:,} of {len(outcomes.y):,} images)"} if entry.error else {}),
    }


def _alone(found: Robustness, name: str) -> Tensor:
    """Return which images, right when clean, fell to this attack and to no other, bool ``(n,)``."""
    answers, y = found.outcomes.returned, found.outcomes.y
    stood = [answer == y for other, answer in answers.items() if other != name]
    others = torch.stack(stood).all(dim=0) if stood else torch.ones_like(y, dtype=torch.bool)
    return (found.outcomes.clean == y) & (answers[name] != y) & others


def with_errors(checked: Sanity, entries: Sequence[Entry]) -> Sanity:
    """Return the checks; that attacks ran fails also where one could run on the images looked at and not on all measured."""
    errors = [entry for entry in entries if entry.error]
    if not errors or checked[UNUSABLE].status == "FAIL":
        return checked
    first = errors[0]
    message = f"{first.name} could not run on {first.lost:,} of the images measured: {first.error}"
    failed = replace(checked[UNUSABLE], status="FAIL", value=len(errors) / len(entries), message=message)
    kept = tuple(failed if check.id == UNUSABLE else check for check in checked.checks)
    return replace(checked, checks=kept, established=False)


def checks(checked: Sanity) -> list[dict[str, Any]]:
    """Return the checks; they share the attacks' time, which ``cost`` has, so that each alone took none."""
    return [
        {
            "id": check.id,
            "name": check.name,
            "status": STATUS[check.status],
            **({"severity": SEVERITY[check.status]} if check.status in SEVERITY else {}),
            "why": check.message,
            "means": check.means.replace("`", ""),
            "remedy": check.remedy.replace("`", ""),
            "metrics": {"value": check.value} if check.value is not None and math.isfinite(check.value) else {},
            "images": list(check.where[:KEPT]),
            "seconds": 0.0,
        }
        for check in checked.checks
    ]


def findings(checked: Sanity) -> list[dict[str, Any]]:
    """Return what speaks against the figure."""
    return [_finding(check) for check in checked.checks if check.status in SEVERITY]


def _finding(check: Check) -> dict[str, str]:
    shown = ", ".join(map(str, check.where[:10]))
    more = f" and {len(check.where) - 10:,} more" if len(check.where) > 10 else ""
    where = f"images {shown}{more}" if check.where else ""
    severity, means = SEVERITY[check.status], check.means.replace("`", "")
    return {"rule": check.id, "severity": severity, "message": f"{check.name}: {check.message}; {means}", "where": where}


def limitations(
    found: Robustness, checked: Sanity, entries: Sequence[Entry], surrogate: bool, train: bool, study: Mapping[str, Any] | None
) -> list[str]:
    """Return what the figure leaves open."""
    tried = ", ".join(found.by_attack)
    missing = "" if any(entry.row and entry.row.name == "autoattack" for entry in entries) else "AutoAttack and "
    said = [
        "One seed: another seed gives other numbers.",
        f"Robust accuracy is an upper bound: tried were {tried}; {missing}attacks made for this very network "
        "were not, and may leave less.",
        f"Only one kind of change was tried ({found.threat}): no other norm, nor rotations, patches or other changes of scene.",
        f"The checks looked at {checked.upper_bound.n:,} of {len(found.outcomes.y):,} images.",
        "Images are numbered as they were measured, from 0: with --limit these are not their places in the file.",
        "No backdoor was looked for.",
    ]
    if study:
        said.append(
            f"The layer study looked at {study['images']:,} of {len(found.outcomes.y):,} images, under {study['attack']} alone."
        )
    if not surrogate:
        said.append("No surrogate was given: images made on another network, such as that before a repair, were not tried.")
    if not train:
        said.append("No training images were given: whether the network was trained on these images was not looked into.")
    return said
