"""Records to render: realistic ones, their variants and hostile ones."""

from __future__ import annotations

import base64
import copy
import math
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script></style></title><script>alert(3)</script>",
    "javascript:alert(4)",
    "' onmouseover='alert(5)",
    "{{ 7 * 7 }} {% raw %}",
    "[link](https://example.org) ![img](http://example.org/x.png) | cell",
    "\x1b[31mred\x1b[0m\r\nnew line \u202egnol",
    "\ud800 lone surrogate",
)


def rate(value: float, n: int = 2000) -> dict[str, Any]:
    margin = 2 * (value * (1 - value) / n) ** 0.5 + 2 / n
    return {"value": value, "low": max(value - margin, 0.0), "high": min(value + margin, 1.0), "n": n}


def png(width: int = 144, height: int = 36, patch: bool = False) -> str:
    """Return a small striped picture as a data: URI, with a white corner when ``patch``."""
    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            lit = patch and y >= height - 8 and x % 36 >= 28
            rows += b"\xff\xff\xff" if lit else bytes(((x * 5) % 200, (y * 6) % 180, 90 + (x // 36) * 30))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(rows))),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def measured(accuracy: float, attack: float | None, triggered: float | None, parameters: int) -> dict[str, Any]:
    return {
        "accuracy": rate(accuracy),
        "attack_success": None if attack is None else rate(attack, 1800),
        "triggered_accuracy": None if triggered is None else rate(triggered, 1800),
        "adversarial_accuracy": None,
        "parameters": parameters,
        "nonzero": parameters - 1203,
        "size_bytes": parameters * 4 + 5120,
        "macs": parameters * 151,
        "latency_ms": 1.8374,
    }


def layers() -> list[dict[str, Any]]:
    found = [{"name": "bn1", "total": 16, "removed": 0}]
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            cut = round(width * (0, 0.1, 0.2, 0.35, 0.5, 0.6)[stage - 1 + block])
            found.append({"name": f"layer{stage}.{block}.bn1", "total": width, "removed": cut})
            found.append({"name": f"layer{stage}.{block}.bn2", "total": width, "removed": cut // 2})
    return found


def record() -> dict[str, Any]:
    """Return the record of one repair as ``runs.repair`` builds it, with everything a record can hold."""
    found = layers()
    cut = sum(layer["removed"] for layer in found)
    path = [(0.05, 0.9117), (0.1, 0.911), (0.15, 0.9088), (0.2, 0.9092), (0.25, 0.9051), (0.3, 0.8993), (0.35, 0.894)]
    steps = [{"amount": a, "removed": cut if a == 0.3 else round(cut * a / 0.3), "holdout": rate(v, 1000)} for a, v in path]
    steps.append({"amount": 0.4, "removed": round(cut * 4 / 3), "holdout": rate(0.8524, 1000)})
    return {
        "kind": "repair",
        "created": "2026-03-01T12:00:00+00:00",
        "command": ["secateur", "repair", "victim", "--data", "my images.npz", "--set", "drop=0.02", "-o", "out"],
        "tool": {"name": "secateur", "version": "0.1.0", "commit": None},
        "environment": {"python": "3.11.7", "torch": "2.10.0", "device": "cpu", "threads": 1, "platform": "x86_64"},
        "inputs": [{"path": "victim/model.safetensors", "sha256": "ab" * 32, "format": "bundle", "suspicious_globals": []}],
        "data": {
            "clean": {"name": "fashion-mini:clean", "n": 1000, "per_class": [100] * 10, "sha256": "0f" * 32},
            "test": {"name": "fashion-mini:test", "n": 2000, "per_class": [200] * 9 + [199], "sha256": "1e" * 32},
        },
        "method": {
            "name": "norm-pruning",
            "version": 1,
            "args": {
                "norm": "l1",
                "granularity": "channel",
                "layers": "late",
                "fraction": None,
                "drop": 0.02,
                "epochs": 10,
                "lr": 0.02,
            },
            "seed": 0,
        },
        "before": measured(0.9132, 0.9978, 0.0022, 175_290),
        "after": measured(0.9071, 0.0122, 0.8876, 101_458),
        "cost": {"seconds": 12.345},
        "checks": [
            {
                "id": "masked-equals-removed",
                "status": "ok",
                "why": "the network without the pruned channels gives the same answers as the masked one",
                "metrics": {"same": 1.0, "n": 2000},
                "seconds": 0.421,
            },
            {
                "id": "max-asr",
                "status": "finding",
                "why": "attack success must be at most 1 %",
                "metrics": {"high": 0.0187},
                "seconds": 0.0,
            },
        ],
        "findings": [],
        "verdict": None,
        "limitations": [
            "One repair with one seed: another seed gives other numbers.",
            "Robustness to adversarial examples was not measured.",
            "Only the given trigger was tested; other triggers may still work.",
        ],
        "details": {
            "path": steps,
            "layers": found,
            "log": {"removed": float(cut), "removed_share": 0.3, "clean_accuracy_at_cut": 0.8993},
            "notes": ["4 channels of 'layer3.2.bn2' stay in the file, masked: the stream has other writers"],
            "compared": [
                {
                    "name": "fine-tuning",
                    "after": measured(0.9101, 0.8744, 0.1104, 175_290),
                    "seconds": 9.81,
                    "note": "the baseline",
                },
                {
                    "name": "norm-pruning",
                    "after": measured(0.9071, 0.0122, 0.8876, 101_458),
                    "seconds": 12.35,
                    "note": "chosen",
                },
                {
                    "name": "random",
                    "after": measured(0.9012, 0.7633, 0.2101, 101_458),
                    "seconds": 12.2,
                    "note": "control: ranks by chance",
                },
            ],
            "trigger": {"kind": "blend", "target": 0, "sources": None, "clean_png": png(), "triggered_png": png(patch=True)},
        },
        "schema_version": 1,
    }


def without_trigger() -> dict[str, Any]:
    changed = record()
    for part in (changed["before"], changed["after"]):
        part["attack_success"] = part["triggered_accuracy"] = None
    del changed["details"]["trigger"], changed["details"]["compared"]
    changed["limitations"].append("No trigger was given, so attack success was not measured.")
    return changed


def bare() -> dict[str, Any]:
    """Return the least a record may hold."""
    changed = record()
    changed.update(
        kind="audit", command=[], environment={}, inputs=[], data={}, before={}, after={}, checks=[], limitations=[], details={}
    )
    changed["verdict"] = "inconclusive"
    return changed


def audit() -> dict[str, Any]:
    changed = bare()
    changed.update(before=record()["before"], verdict="backdoor-evidence")
    changed["findings"] = [
        {"rule": "BKD-010", "severity": "high", "message": "one class is reached by a small trigger", "where": "class 0"}
    ]
    return changed


def one_cut() -> dict[str, Any]:
    changed = record()
    changed["details"]["path"] = changed["details"]["path"][5:6]
    del changed["details"]["compared"]
    return changed


def graph(sites: list[str], size: int, cut: int, seed: int) -> dict[str, Any]:
    """Return a layer's neurons, each tied to its nearest eight by a few features that come in clusters."""
    draw = random.Random(seed)
    centres = [[draw.gauss(0, 1) for _ in range(4)] for _ in range(max(2, size // 16))]
    at = [[x + draw.gauss(0, 0.6) for x in draw.choice(centres)] for _ in range(size)]
    edges = set()
    for i in range(size):
        others = sorted((j for j in range(size) if j != i), key=lambda j: math.dist(at[i], at[j]))
        edges |= {(min(i, j), max(i, j)) for j in others[:8]}
    gone = sorted(range(size), key=lambda j: math.dist(at[0], at[j]))[:cut]
    return {"sites": sites, "size": size, "edges": [list(edge) for edge in sorted(edges)], "cut": sorted(gone)}


def learned() -> dict[str, Any]:
    """Return the record of a repair that learned which neurons to cut."""
    changed, draw = record(), random.Random(0)
    stream = ["bn1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2", "layer1.3.bn2"]
    changed["details"]["graphs"] = [
        graph(stream, 16, 2, 1),
        graph(["layer1.0.bn1"], 16, 0, 2),
        graph(["layer2.0.bn2", "layer2.1.bn2"], 32, 5, 3),
        graph(["layer3.0.bn1"], 64, 11, 4),
    ]
    changed["details"]["history"] = [
        {
            "games": 8 * i + 8,
            "evaluations": 160 * i + 161,
            "reward": 0.8 - 1.1 * 0.9**i + draw.gauss(0, 0.06),
            "rise": max(0.0, 0.09 * 0.93**i + draw.gauss(0, 0.006)),
            "sign": min(1.0, 0.15 + 0.8 * 0.9**i + draw.gauss(0, 0.03)),
            "cut": 0.3 * 0.96**i + draw.gauss(0, 0.01),
        }
        for i in range(30)
    ]
    return changed


def answers(right: float) -> dict[str, Any]:
    return {
        "clean_accuracy": rate(0.9132, 1000),
        "remnant_accuracy": rate(right, 1000),
        "prediction_change_rate": rate(0.95 - right, 1000),
        "strict_attack_success": rate(1 - right / 0.9132, 913),
    }


def check(number: int, status: str, severity: str | None = None) -> dict[str, Any]:
    made = {
        "id": f"ADV-{number:03}",
        "name": f"name of {number}",
        "status": status,
        "why": f"what check {number} found",
        "means": f"what it means that {number} failed",
        "remedy": f"what to do about {number}",
        "metrics": {} if status == "skipped" else {"value": number / 100},
        "images": [number, number + 1],
        "seconds": 0.0,
    }
    return made if severity is None else {**made, "severity": severity}


def attacked() -> dict[str, Any]:
    """Return the record of a measurement of robustness with a surrogate, in which no check failed."""
    changed = record()
    names = {"pgd (cross-entropy)": 0.42, "square": 0.61, "transfer (mi-fgsm)": 0.78}
    changed.update(kind="attack", after={}, verdict="established", findings=[])
    changed["before"] = measured(0.9132, None, None, 175_290) | {"adversarial_accuracy": rate(0.417, 1000)}
    changed["method"] = {"name": ", ".join(names), "version": 1, "args": {"eps": 8 / 255, "sweep": [0.01, 0.02]}, "seed": 0}
    changed["checks"] = [check(1, "ok"), check(31, "finding", "medium"), check(40, "skipped")]
    changed["findings"] = [{"rule": "ADV-031", "severity": "medium", "message": "name of 31: found", "where": "images 31, 32"}]
    changed["details"] = {
        "notes": ["a note"],
        "robustness": {
            "threat": {"eps": 8 / 255, "norm": "linf", "targeted": False, "knowledge": "white-box"},
            "worst": {"returned": answers(0.417), "stored": answers(0.431)},
            "attacks": [
                {
                    "name": name,
                    "method": name.partition(" ")[0],
                    "version": 1,
                    "budget": f"{name.partition(' ')[0]}(eps=0.03137, steps=10)",
                    "returned": answers(right),
                    "stored": answers(right + 0.01),
                    "refused": 0,
                    "alone": 3 if name == "square" else 0,
                    "alone_images": [5, 60, 700] if name == "square" else [],
                    "seconds": 12.5,
                }
                for name, right in names.items()
            ],
            "checked": {"accuracy": rate(0.91, 200), "upper_bound": rate(0.405, 200), "budgets": {"pgd": "pgd(steps=10)"}},
            "curve": {
                "attacks": ["pgd (cross-entropy)", "pgd (margin)"],
                "points": [{"eps": i / 255, "accuracy": rate(0.9 * 0.9**i, 200)} for i in (0, 2, 4, 8, 16, 32)],
            },
            "transfer": {
                "budget": "mi_fgsm(eps=0.03137)",
                "cells": [
                    {"source": a, "target": b, "success": rate(0.99 if a == b else 0.31, 880)}
                    for a in ("network", "surrogate")
                    for b in ("network", "surrogate")
                ],
            },
        },
    }
    return changed


def studied() -> dict[str, Any]:
    """Return the record of a measurement of robustness with a study of three stages; one of them is silent."""
    changed = attacked()
    shifts: dict[str, float | None] = {"conv1": 0.05, "features.0": None, "layer3.very.long.name.of.a.block": 0.83}
    stages = [
        {
            "stage": name,
            "low": 0.0,
            "high": 6.5,
            "edges": [-0.5, 7.0],
            "clean": [90, 30, 10, 0],
            "adversarial": [70, 40, 15, 5],
            "l2": None if shift is None else {"value": shift, "low": 0.9 * shift, "high": 1.1 * shift, "n": 64},
            "largest": None if shift is None else 0.4,
            "channels": 16,
            "moved": [] if shift is None else [{"channel": 12, "shift": 2 * shift}, {"channel": 3, "shift": shift}],
        }
        for name, shift in shifts.items()
    ]
    weights = [
        {"stage": name, "edges": [-0.4, 0.6], "counts": [3, 40, 20, 1], "mean": 0.01, "std": 0.123456, "zeros": 0.25}
        for name in shifts
    ]
    changed["details"]["study"] = {
        "images": 64,
        "attack": "pgd (cross-entropy)",
        "budget": "pgd(eps=0.03137)",
        "right": 60,
        "stood": 2,
        "stages": stages,
        "weights": weights,
        "stages_left_out": 0,
        "grid": {"png": png(), "scale": 15.9375, "images": [5, 60, 700], "shrunk": 1},
    }
    return changed


def not_established() -> dict[str, Any]:
    """Return the record of a network whose gradient misleads: one attack could not run, another broke the rules."""
    changed = attacked()
    changed["verdict"] = "not-established"
    changed["checks"] += [check(10, "finding", "high"), check(20, "finding", "high")]
    changed["findings"].append({"rule": "ADV-010", "severity": "high", "message": "failed", "where": ""})
    robust = changed["details"]["robustness"]
    robust["attacks"][0]["error"] = "no gradient came back"
    robust["attacks"][1]["refused"] = 7
    robust["transfer"] = {"budget": "", "cells": [], "error": "no gradient came back"}
    robust["curve"]["error"] = "no gradient came back"
    return changed


VARIANTS = {
    "attack": attacked,
    "attack, not established": not_established,
    "attack, studied": studied,
    "full": record,
    "without trigger": without_trigger,
    "bare": bare,
    "audit": audit,
    "one cut": one_cut,
    "learned": learned,
}


def fill(value: Any, text: str) -> Any:
    """Return a copy with every string and every free key replaced by ``text``, but for words from a closed set."""
    closed = {"kind", "verdict", "status", "severity", "clean_png", "triggered_png", "png", "threat"}
    if isinstance(value, dict):
        return {k: copy.deepcopy(v) if k in closed and k != "kind" else fill(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(item, text) for item in value]
    return text if isinstance(value, str) else value


def hostile(text: str, made: Callable[[], dict[str, Any]] = record) -> dict[str, Any]:
    """Return a record that the schema accepts and that says ``text`` wherever it may say anything."""
    changed = fill(made(), text)
    for entry in changed["details"].get("history", ()):
        entry[text] = entry.pop("reward")
    changed["kind"] = "repair"
    changed["findings"] = [{"rule": text, "severity": "high", "message": text, "where": text}]
    changed["method"]["args"] = {text: text, "many": [text, text]}
    changed["environment"] = {text: text}
    changed["inputs"].append({"path": text, text: text})
    changed["data"] = {text: changed["data"]["clean"]}
    changed["details"]["log"] = {text: 1.0}
    changed["checks"][0]["metrics"] = {text: 1.0}
    changed["cost"][text] = 1.0
    return changed
