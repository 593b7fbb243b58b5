"""Quantisation as a bundle keeps it: what the field ``quant`` of ``arch.json`` may hold; steps of weights are in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError

FILE = "quant.safetensors"
FIELDS = ("weight_bits", "activation_bits", "weights", "activations")
FEWEST_BITS, MOST_BITS, MOST_SITES = 2, 8, 10_000
SMALLEST, LARGEST = 1e-30, 1e30  # steps of a grid: below, float32 has no whole digits left


def check_quant(quant: Any) -> dict[str, Any]:
    """Return a quantisation as plain values; `ModelError` names the first that is wrong.

    It is ``{"weight_bits", "activation_bits", "weights": "quant.safetensors", "activations": {site: {"scale",
    "zero_point"}}}``.
    """
    if not isinstance(quant, Mapping) or set(quant) != set(FIELDS):
        found = ", ".join(map(str, quant)) if isinstance(quant, Mapping) else type(quant).__name__
        raise ModelError(f"quant must have {', '.join(FIELDS)} and nothing else, got {_short(found)}")
    for name in ("weight_bits", "activation_bits"):
        check_bits(f"quant: {name}", quant[name])
    if quant["weights"] != FILE:
        raise ModelError(f"quant: weights must be '{FILE}', got {_short(quant['weights'])}")
    sites = quant["activations"]
    if not isinstance(sites, Mapping) or not 0 < len(sites) <= MOST_SITES:
        raise ModelError(f"quant: activations must be an object of 1 to {MOST_SITES} sites")
    top = 2 ** quant["activation_bits"] - 1
    checked = {_site(site): _grid(site, grid, top) for site, grid in sites.items()}
    return {**{name: quant[name] for name in FIELDS}, "activations": checked}


def check_bits(name: str, bits: Any) -> None:
    """Raise `ModelError` unless ``bits`` is a whole number that this project quantises to."""
    if type(bits) is not int or not FEWEST_BITS <= bits <= MOST_BITS:
        raise ModelError(f"{name} must be a whole number in [{FEWEST_BITS}, {MOST_BITS}], got {_short(bits)}")


def _site(site: Any) -> str:
    if not isinstance(site, str) or not 0 < len(site) <= 1000 or not site.isprintable():
        raise ModelError(f"quant: a site must be a name of 1 to 1000 printable characters, got {_short(site)}")
    return site


def _grid(site: str, grid: Any, top: int) -> dict[str, Any]:
    if not isinstance(grid, Mapping) or set(grid) != {"scale", "zero_point"}:
        raise ModelError(f"quant: site {_short(site)} must have scale and zero_point and nothing else")
    scale, zero = grid["scale"], grid["zero_point"]
    if type(scale) not in (int, float) or not SMALLEST <= scale <= LARGEST:
        rule = f"must be a number in [{SMALLEST:g}, {LARGEST:g}]"
        raise ModelError(f"quant: the scale of {_short(site)} {rule}, got {_short(scale)}")
    if type(zero) is not int or not 0 <= zero <= top:
        raise ModelError(f"quant: the zero_point of {_short(site)} must be a whole number in [0, {top}], got {_short(zero)}")
    return {"scale": float(scale), "zero_point": zero}


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
