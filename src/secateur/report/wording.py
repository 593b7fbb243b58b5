"""Numbers and sentences as every rendering writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
VERDICTS = {
    "backdoor-evidence": "These checks found evidence of a backdoor.",
    "no-evidence-found": "These checks found no evidence of a backdoor.",
    "inconclusive": "Inconclusive: too little could be evaluated.",
    "established": "These checks found nothing that speaks against the figures.",
    "not-established": "Robustness not established.",
}
SHARES = frozenset({"rise", "sign", "cut"})  # of what a repair notes while it learns

Rate = Mapping[str, Any]


def plain(text: str) -> str:
    """Return ``text`` on one line, without characters that would steer a terminal or reorder the line."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def clip(text: str, length: int) -> str:
    """Return `plain` text of at most ``length`` characters."""
    text = plain(text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def percent(value: float, decimals: int = 1) -> str:
    """Return a share as ``98.7 %``."""
    return f"{100 * value:.{decimals}f} %"


def rate(value: Rate | None) -> str:
    """Return ``98.72 % [98.1, 99.2]``."""
    if value is None:
        return NOT_MEASURED
    return f"{percent(value['value'], 2)} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def signed(value: float, decimals: int) -> str:
    """Return a number with its sign, but no sign on what rounds to zero."""
    text = f"{value:+.{decimals}f}"
    return text if float(text) else text[1:]


def points(before: Rate | None, after: Rate | None) -> str:
    """Return the change of a rate as ``-0.60 points``, or nothing when one of the two was not measured."""
    if before is None or after is None:
        return ""
    return f"{signed(100 * (after['value'] - before['value']), 2)} points"


def relative(before: float | None, after: float | None) -> str:
    """Return the change of a quantity as ``-42.1 %``, or nothing where there is none to speak of."""
    if before is None or after is None or not before:
        return ""
    return f"{signed(100 * (after / before - 1), 1)} %"


def human(value: float, unit: str = "") -> str:
    """Return a large count as ``4.31 MB`` (powers of 1000)."""
    scaled, prefixes = float(value), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(scaled) >= 999.5 and prefix != "P":
        scaled, prefix = scaled / 1000, next(prefixes)
    return f"{scaled:.3g} {prefix}{unit}".rstrip()


def number(value: float) -> str:
    """Return any number, integers in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def learned(name: str, value: float) -> str:
    """Return a number of a history: a share in percent, a count in full."""
    if name in SHARES:
        return percent(value) if abs(value) < 1e6 else number(float(value))
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def places(names: Sequence[str]) -> str:
    """Return names in a row, of many the first three and how many more."""
    more = f" and {len(names) - 3:,} more" if len(names) > 4 else ""
    return plain(", ".join(names[:3] if more else names)) + more


def seconds(value: float) -> str:
    """Return a time as ``12.3 s``."""
    return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


def setting(value: Any) -> str:
    """Return the value of a setting as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    return plain(value) if isinstance(value, str) else json.dumps(value)


def per_class(counts: Sequence[int]) -> str:
    """Return ``10 x 200``, or the counts, or their range where there are many."""
    if len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]:,}"
    if len(counts) <= 12:
        return ", ".join(f"{count:,}" for count in counts)
    return f"{len(counts)} classes, {min(counts):,} to {max(counts):,} each"


def budget(threat: Mapping[str, Any]) -> str:
    """Return ``linf eps 8/255``, or the number itself where that many grey levels take too many digits."""
    levels = f"{255 * threat['eps']:.3g}"
    short = threat["norm"] == "linf" and float(levels) >= 0.01 and abs(255 * threat["eps"] - float(levels)) < 1e-6
    return f"{threat['norm']} eps {levels}/255" if short else f"{threat['norm']} eps {threat['eps']:.4g}"


def headline(result: Mapping[str, Any]) -> str:
    """Return the sentence on top: the verdict, if there is one, and what happened to the rates."""
    before, after = result["before"], result["after"]
    verdict = VERDICTS.get(result["verdict"], "")
    if not before and not after:
        return verdict or "Nothing was measured."
    rates = _changes(before, after) if before and after else _levels(before or after)
    return f"{verdict} {rates}".strip()


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    change = signed(100 * (after["accuracy"]["value"] - before["accuracy"]["value"]), 1)
    accuracy = f"accuracy changed by {change} points" if float(change) else "accuracy did not change"
    return f"{_attack(before['attack_success'], after['attack_success'])}; {accuracy}."


def _attack(before: Rate | None, after: Rate | None) -> str:
    if before is None or after is None:
        return "Attack success was not measured"
    old, new = percent(before["value"]), percent(after["value"])
    if old == new:
        return f"Attack success stayed at {new}"
    verb = "fell" if after["value"] < before["value"] else "rose"
    return f"Attack success {verb} from {old} to {new}"


def _levels(measured: Mapping[str, Any]) -> str:
    attack = measured["attack_success"]
    first = "Attack success was not measured" if attack is None else f"Attack success is {percent(attack['value'])}"
    return f"{first}; accuracy is {percent(measured['accuracy']['value'])}."
