"""``secateur info``: what a file is and what speaks against it; nothing from it is run."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import __version__
from .console import complain, out
from .options import Flag

if TYPE_CHECKING:
    from ..intake.inspect import Inspection

SHOWN = 12
FACTS = 12
BUNDLE = ("arch", "input", "classes", "steps", "wrappers", "masks", "bits", "ancestor_sha256")
HEADLINES = {
    "readable": "readable here, running nothing of it",
    "refused": "REFUSED: do not load this file where it can run code",
    "unusable": "unusable",
}


def info(
    file: Path,
    /,
    *,
    format: Literal["text", "json", "sarif"] = "text",
    fail_on: Literal["info", "low", "medium", "high", "critical"] = "high",
    quick: Flag = False,
    all: Flag = False,
) -> int:
    """Tell what a checkpoint is and what speaks against it, without running anything from it.

    Exits with 1 when a finding is at or above --fail-on, with 4 when the file must not be loaded.

    Args:
        file: Checkpoint, bundle or Hugging Face folder.
        format: How to print it.
        fail_on: The lowest severity that makes the exit code 1.
        quick: Do not look for the architecture, which takes seconds because it needs torch.
        all: Print all tensors, not only the first ones.
    """
    from ..intake.findings import RULES, at_least
    from ..intake.inspect import inspect

    found = inspect(file, match=not quick)
    if format == "json":
        out(json_format.dumps(record(found), indent=2, allow_nan=False))
    elif format == "sarif":
        from ..report.sarif import to_sarif

        rules = {name: asdict(rule) for name, rule in RULES.items()}
        findings = [finding.record() for finding in found.findings]
        out(to_sarif(findings, rules=rules, file=str(file), version=__version__, sha256=found.sha256))
    else:
        out("\n".join(_lines(found, all)))
    if found.verdict == "refused":
        complain(str(found.why))
        return 4
    if found.verdict == "unusable" and found.format != "onnx":
        if any(finding.rule == "LOD-007" for finding in found.findings):
            return 1
        complain(str(found.why))
        return 2
    return 1 if any(at_least(finding.severity, fail_on) for finding in found.findings) else 0


def record(found: Inspection) -> dict[str, Any]:
    """Return an inspection as plain data; ``info.schema.json`` describes it."""
    told = asdict(found)
    findings = [finding.record() for finding in found.findings]
    head = {"schema_version": 1, "kind": "info", "tool": {"name": "secateur", "version": __version__}}
    return {**head, **told, "findings": findings, "parameters": found.parameters, "facts": _plain(found.facts)}


def _lines(found: Inspection, all: bool) -> Iterator[str]:
    yield f"{_text(found.path)}: {HEADLINES[found.verdict]}"
    yield f"  format      {found.format}, {found.size:,} bytes"
    yield f"  sha256      {found.sha256}"
    if found.weights_sha256:
        yield f"  weights     {found.weights_sha256} (sha256 of names and values, whatever the container)"
    if found.architecture:
        yield f"  network     {_network(found.architecture)}"
    elif found.unmatched:
        yield f"  network     {found.unmatched}"
    if found.tensors:
        kinds = sorted({tensor.dtype for tensor in found.tensors})
        yield f"  tensors     {len(found.tensors)} with {found.parameters:,} values, {', '.join(kinds)}"
    for key, value in list(found.facts.items())[: None if all else FACTS]:
        if key not in BUNDLE or found.format != "bundle":
            yield f"  {_text(key)[:11]:<11} {_text(str(value))}"
    yield from _bundle(found, all) if found.format == "bundle" else ()
    if wrappers := [_wrapper(wrapper) for wrapper in _wrappers(found)]:
        shown = wrappers if all else wrappers[:FACTS]
        left = len(wrappers) - len(shown)
        yield f"  wrappers    {'; '.join(shown)}" + (f"; and {left} more (--all)" if left else "")
    if any(finding.rule == "LOD-002" for finding in found.findings):
        yield "  note        it names objects of unknown code: do not unpickle it elsewhere"
    for title, rows in (("findings", _findings(found)), ("tensors", _tensors(found, all))):
        if rows:
            yield from ("", f"  {title}", *(f"    {row}" for row in rows))


def _findings(found: Inspection) -> list[str]:
    return [f"{f.severity:<8}  {f.rule}  {f.message}" for f in found.findings]


def _tensors(found: Inspection, all: bool) -> list[str]:
    shown = found.tensors if all else found.tensors[:SHOWN]
    width = min(60, max((len(_text(tensor.name)) for tensor in shown), default=0))
    rows = [f"{_text(t.name):<{width}}  {t.dtype:<8}  {'x'.join(map(str, t.shape)) or 'scalar'}" for t in shown]
    left = len(found.tensors) - len(shown)
    return [*rows, f"... and {left} more (--all)"] if left else rows


def _network(architecture: Any) -> str:
    if architecture.get("factory"):
        return f"of its author's code {_text(str(architecture['factory'].get('ref')))}"
    arguments = ", ".join(f"{key}={value}" for key, value in architecture["kwargs"].items())
    return f"{_text(architecture['name'])}({_text(arguments)})"


def _bundle(found: Inspection, all: bool) -> Iterator[str]:
    """Return what was done to the network of a bundle, and what it came from."""
    steps = found.facts.get("steps", ())
    for step in steps if all else steps[:FACTS]:
        arguments = ", ".join(f"{name}={value}" for name, value in step["args"].items())
        yield f"  step        {_text(step['method'])} {step['version']} ({_text(arguments)})"
    if left := 0 if all else len(steps[FACTS:]):
        yield f"  step        ... and {left} more (--all)"
    if bits := found.facts.get("bits"):
        yield f"  quantised   weights to {bits['weight']} bit, feature maps to {bits['activation']} bit"
    if found.facts.get("masks"):
        yield "  masks       what was cut is in masks.safetensors"
    if ancestor := found.facts.get("ancestor_sha256"):
        yield f"  ancestor    {_text(ancestor)} (sha256 of what it was made of)"


def _wrappers(found: Inspection) -> Sequence[Mapping[str, Any]]:
    """Return the edits of feature maps that a bundle keeps; another format may have facts of that name that are none."""
    return found.facts.get("wrappers", ()) if found.format == "bundle" else ()


def _wrapper(wrapper: Mapping[str, Any]) -> str:
    """Return what one edit does to which feature maps."""
    after = _text(wrapper["after"])
    if wrapper["kind"] == "round":
        return f"rounded to {wrapper['decimals']} decimals after {after}"
    return f"clamped to [{wrapper['low']:g}, {wrapper['high']:g}] after {after}"


def _text(value: str) -> str:
    """Return a text from a file, printable and short."""
    return ascii(value[:200])[1:-1]


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: no NaN, tuples as lists, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
