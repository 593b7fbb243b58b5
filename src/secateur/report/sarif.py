"""Findings as SARIF 2.1.0 (OASIS), which code-scanning services read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
PAGE = "docs/threat-model.md"
LEVELS = {"info": "note", "low": "note", "medium": "warning", "high": "error", "critical": "error"}
SCORES = {"info": "0.0", "low": "2.0", "medium": "5.0", "high": "8.0", "critical": "10.0"}  # CVSS-like, read by GitHub


def to_sarif(
    findings: Iterable[Mapping[str, str]],
    *,
    rules: Mapping[str, Mapping[str, str]],
    file: str,
    version: str,
    sha256: str | None = None,
) -> str:
    """Return a SARIF log of one run.

    Args:
        findings: Each ``rule``, ``severity``, ``message``, ``where``.
        rules: Rule id -> ``severity``, ``title``, ``remedy``; those that the findings name are written.
        file: What was looked into.
        version: Of this tool.
        sha256: Of the file.
    """
    found = list(findings)
    used = sorted({finding["rule"] for finding in found})
    run: dict[str, Any] = {
        "tool": {"driver": {"name": "secateur", "version": version, "rules": [_rule(name, rules[name]) for name in used]}},
        "artifacts": [{"location": {"uri": _uri(file)}, **({"hashes": {"sha-256": sha256}} if sha256 else {})}],
        "results": [_result(finding, used.index(finding["rule"]), file) for finding in found],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(name: str, rule: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": rule["title"]},
        "help": {"text": rule["remedy"]},
        "fullDescription": {"text": f"{rule['title']}. {rule['remedy']} ({PAGE}, {name})"},
        "defaultConfiguration": {"level": LEVELS[rule["severity"]]},
        "properties": {"security-severity": SCORES[rule["severity"]], "tags": ["security"]},
    }


def _result(finding: Mapping[str, str], index: int, file: str) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(file), "index": 0}}}
    if finding["where"]:
        location["logicalLocations"] = [{"fullyQualifiedName": finding["where"]}]
    return {
        "ruleId": finding["rule"],
        "ruleIndex": index,
        "level": LEVELS[finding["severity"]],
        "message": {"text": finding["message"]},
        "locations": [location],
    }


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else path.as_posix().replace("%", "%25").replace(" ", "%20")
