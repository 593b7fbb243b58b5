"""A record as one HTML page that opens from a file, asks the network for nothing and trusts no string in the record."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import multiples, pareto, svg, sweep
from .neurons import views
from .parts import Bar, Span
from .sections import COUNTS, headline, learned_label, learned_names, method_line, sections, shorten
from .wording import clip, plain

MAX_BYTES = 2_000_000
MAX_PICTURE = 600_000
MAX_POINTS = 300
SORTABLE = frozenset({"checks", "passed", "findings", "compared", "path", "layers"})
LIMITS = ({"rows": 1000, "length": 1000}, {"rows": 10, "length": 100})
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")


def to_html(result: Mapping[str, Any]) -> str:
    """Return a record as one page of at most `MAX_BYTES`; a longer one is cut short and says so."""
    page = ""
    for limits in LIMITS:
        page = _page(result, limits)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def _page(result: Mapping[str, Any], limits: Mapping[str, int]) -> str:
    return _template().render(
        headline=headline(result),
        kind=result["kind"],
        created=plain(result["created"])[:40],
        tool=plain(f"{result['tool']['name']} {result['tool']['version']}")[:80],
        method=method_line(result)[:200],
        sections=[shorten(section, **limits) for section in sections(result)],
        compares=bool(result["before"] and result["after"]),
        sortable=SORTABLE,
        drawn={name: drawing for name, drawing in _drawn(result["details"]) if drawing is not None},
        charts=_multiples(result["details"]),
        graphs=[(view.caption, svg.neurons(view)) for view in views(result["details"].get("graphs", ()))],
        pictures=_pictures(result["details"].get("trigger")),
        sheet=_sheet(result["details"].get("study", {}).get("grid")),
        style=_asset("style.css"),
        script=_asset("script.js"),
        style_hash=_hash("style.css"),
        script_hash=_hash("script.js"),
    )


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("secateur.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(draw=_draw, typeset=_typeset)
    return environment.get_template("template.html.jinja")


def _asset(name: str) -> Markup:
    return Markup(files("secateur.report").joinpath(name).read_text("utf-8"))


def _hash(name: str) -> str:
    """Return the source expression with which the page's policy allows this one style sheet or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()


def _draw(figure: Bar | Span | None) -> Markup:
    if figure is None:
        return Markup("")
    return svg.bar(figure) if isinstance(figure, Bar) else svg.span(figure)


def _typeset(text: str) -> str:
    """Return ``text`` with real minus signs before numbers, and with units and intervals that stay on one line."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d) (?=%)|(?<=,) (?=[\d.]+\])", "\N{NO-BREAK SPACE}", text)


def _drawn(details: Mapping[str, Any]) -> tuple[tuple[str, Markup | None], ...]:
    """Return the drawings that stand for a section's table."""
    stages = details.get("study", {}).get("stages", ())
    return (
        ("path", _curve(details)),
        ("sweep", _sweep(details.get("robustness", {}))),
        ("study", multiples.shifts(stages)),
        ("choices", _choices(details.get("compression", {}).get("choices", ()))),
    )


def _curve(details: Mapping[str, Any]) -> Markup | None:
    path = details.get("path", ())
    removed = sum(layer["removed"] for layer in details.get("layers", ()))
    return svg.curve(path, removed) if len(path) > 1 else None


def _sweep(measured: Mapping[str, Any]) -> Markup | None:
    points = measured.get("curve", {}).get("points", ())
    return sweep.sweep(points, measured["threat"]) if len(points) > 1 and "error" not in measured["curve"] else None


def _choices(choices: Sequence[Mapping[str, Any]]) -> Markup | None:
    return pareto.pareto(choices[:MAX_POINTS]) if len(choices) > 1 else None


def _multiples(details: Mapping[str, Any]) -> dict[str, list[multiples.Multiple]]:
    """Return the small drawings, each with title and caption, of the sections that have some."""
    study = details.get("study", {"stages": (), "weights": ()})
    found = {
        "learning": _charts(details.get("history", ())),
        "maps": multiples.maps(study["stages"]),
        "weights": multiples.weights(study["weights"]),
    }
    return {name: drawings for name, drawings in found.items() if drawings}


def _charts(history: Sequence[Mapping[str, float]]) -> list[multiples.Multiple]:
    """Return title and drawing of each number that a repair noted while it learned."""
    along, *names = learned_names(history) or ("",)
    thinned = [*history[: -1 : 1 + max(0, len(history) - 1) // MAX_POINTS], *history[-1:]]
    drawn = []
    for name in names:
        points = [(entry[along], entry[name]) for entry in thinned if along in entry and name in entry]
        if len(points) > 1 and name not in COUNTS:
            title = clip(learned_label(name), 80)
            drawn.append((title, "", svg.chart(points, name, title, (along, learned_label(along)))))
    return drawn


def _pictures(trigger: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return caption and source of each picture that is one."""
    if trigger is None:
        return []
    pairs = (("without the trigger", trigger["clean_png"]), ("with the trigger", trigger["triggered_png"]))
    return [(caption, source) for caption, source in pairs if len(source) <= MAX_PICTURE and PNG.fullmatch(source)]


def _sheet(grid: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return caption and source of the picture of attacked images, if it is one."""
    if grid is None or len(grid["png"]) > MAX_PICTURE or not PNG.fullmatch(grid["png"]):
        return None
    places = ", ".join(map(str, grid["images"][:10]))
    shrunk = f"; shrunk {grid['shrunk']} times each way" if grid["shrunk"] > 1 else ""
    told = f"Top: images {places}. Middle: under attack. Bottom: the change, {grid['scale']:.3g} times as large{shrunk}; "
    return told + "mid-grey is no change.", grid["png"]
