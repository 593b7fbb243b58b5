"""What the page of checks says of each: why, with a source, and the verdicts that its function can come to, no others."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from secateur.measure.sanity import RULES, attacks, judging, network
from secateur.measure.sanity.table import Rule

PAGE = (Path(__file__).parents[2] / "docs" / "checks.md").read_text("utf-8")
HELPERS = {
    name: inspect.getsource(found)
    for module in (attacks, judging, network)
    for name, found in vars(module).items()
    if inspect.isfunction(found) and found.__module__ == module.__name__
}


def code(name: str, seen: set[str]) -> str:
    """Return the code of a function and of all that it calls, without their docstrings."""
    seen.add(name)
    own = re.sub(r'"""[\s\S]*?"""', "", HELPERS[name])
    called = [other for other in HELPERS if other not in seen and re.search(rf"\b{other}\(", own)]
    return own + "".join(code(other, seen) for other in called if other not in seen)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_check_says_why_and_when(rule: Rule) -> None:
    *_, why, last = inspect.cleandoc(rule.judge.__doc__ or "").split("\n\n")
    assert re.match(r"Why: [a-z][^(]+\(.*(arXiv:\d{4}\.\d{5}|doi:10\.)", why.replace("\n", " "))
    told = re.findall(r"^([A-Z]+): ", last, re.MULTILINE)
    can = [status for status in ("PASS", "WARN", "FAIL") if f'"{status}"' in code(rule.judge.__name__, set())]
    assert told == can


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_page_has_an_anchor_for_each(rule: Rule) -> None:
    assert PAGE.count(f'<a id="{rule.id.lower()}"></a>\n\n## {rule.id} {rule.name}\n') == 1
    assert rule.remedy[1:] in PAGE
    assert rule.means[1:] in PAGE
