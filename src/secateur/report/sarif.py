"""Findings as SARIF 2.1.0 (OASIS), which code-scanning services read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..intake.findings import RULES

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
PAGES = {"LOD": "threat-model.md", "ADV": "checks.md"}  # in docs/, with an anchor for each rule
DOCS = "urn:secateur:docs"
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


def record_to_sarif(result: Mapping[str, Any]) -> str:
    """Return the findings of a record as a SARIF log of one run; checks that found something tell what they mean."""
    found = [{**finding, "message": finding["message"] or finding["rule"]} for finding in result["findings"]]
    rules = {finding["rule"]: _unknown(finding) for finding in found}
    rules |= {name: {"severity": rule.severity, "title": rule.title, "remedy": rule.remedy} for name, rule in RULES.items()}
    for check in result["checks"]:
        if check["status"] == "finding":
            title = f"{check.get('name') or check['id']}: {check.get('means') or check['why']}"
            rules[check["id"]] = {"severity": check.get("severity", "high"), "title": title, "remedy": check.get("remedy", "")}
    first = result["inputs"][0] if result["inputs"] else {}
    digest = first.get("sha256")
    return to_sarif(
        found,
        rules=rules,
        file=str(first.get("path") or "network"),
        version=result["tool"]["version"],
        sha256=digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None,
    )


def _unknown(finding: Mapping[str, str]) -> dict[str, str]:
    """Return what is known of a rule that only a finding names."""
    return {"severity": finding["severity"], "title": finding["rule"], "remedy": ""}


@cache
def docs_home() -> str:
    """Return where the documentation stands: the ``Documentation`` URL of the installed package, or else a name for it."""
    try:
        urls = metadata("secateur").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    pairs = (url.partition(",") for url in urls)
    return next((url.strip().rstrip("/") for label, _, url in pairs if label.strip().lower() == "documentation"), DOCS)


def help_uri(rule: str) -> str | None:
    """Return the address of a rule's part of the documentation; None for one that has none."""
    page = PAGES.get(rule.partition("-")[0])
    return f"{docs_home()}/{page}#{rule.lower()}" if page and re.fullmatch("[A-Z]{3}-[0-9]{3}", rule) else None


def _rule(name: str, rule: Mapping[str, str]) -> dict[str, Any]:
    page, remedy = help_uri(name), rule["remedy"] or "see the message"
    where = f" (docs/{PAGES[name[:3]]}, {name})" if page else ""
    return {
        "id": name,
        **({"helpUri": page} if page else {}),
        "shortDescription": {"text": rule["title"]},
        "help": {"text": remedy},
        "fullDescription": {"text": f"{rule['title']}. {remedy}{where}"},
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
    """Return a path as a URI, which has neither spaces nor letters beyond ASCII."""
    path = Path(file)
    text = quote(path.as_posix(), errors="replace")
    return f"file://{text}" if path.is_absolute() else text
