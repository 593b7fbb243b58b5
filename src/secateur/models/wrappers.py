"""Edits of feature maps as a bundle keeps them: what the field ``wrappers`` of ``arch.json`` may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError

KINDS: Mapping[str, tuple[str, ...]] = {"clamp": ("low", "high"), "round": ("decimals",)}
LARGEST, DECIMALS, MOST = 1e9, 8, 1000


def check_wrappers(wrappers: Any) -> list[dict[str, Any]]:
    """Return edits of feature maps as plain dicts, ``{"after", "kind", ...}``; `ModelError` names the first that is wrong."""
    if not isinstance(wrappers, list | tuple) or len(wrappers) > MOST:
        raise ModelError(f"wrappers must be a list of at most {MOST}, got {_short(wrappers)}")
    return [_checked(wrapper) for wrapper in wrappers]


def _checked(wrapper: Any) -> dict[str, Any]:
    kind = wrapper.get("kind") if isinstance(wrapper, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(f"wrappers must be objects whose kind is one of {', '.join(KINDS)}, got {_short(wrapper)}")
    fields = ("after", "kind", *KINDS[kind])
    if set(wrapper) != set(fields):
        found = _short(", ".join(map(str, wrapper)))
        raise ModelError(f"wrappers of kind '{kind}' must have {', '.join(fields)} and nothing else, got {found}")
    after = wrapper["after"]
    if not isinstance(after, str) or not 0 < len(after) <= 1000 or not after.isprintable():
        raise ModelError(f"wrappers: after must name a layer, got {_short(after)}")
    if kind == "round":
        decimals = wrapper["decimals"]
        if type(decimals) is not int or not 0 <= decimals <= DECIMALS:
            raise ModelError(f"wrappers: decimals must be a whole number in [0, {DECIMALS}], got {_short(decimals)}")
        return {"after": after, "kind": kind, "decimals": decimals}
    low, high = wrapper["low"], wrapper["high"]
    if not (_is_number(low) and _is_number(high) and low <= high):
        raise ModelError(
            f"wrappers: low and high must be numbers in [-{LARGEST:g}, {LARGEST:g}] with low <= high, "
            f"got {_short(low)} and {_short(high)}"
        )
    return {"after": after, "kind": kind, "low": float(low), "high": float(high)}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST and math.isfinite(value)


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
