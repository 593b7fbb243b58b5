"""How values on the command line are read."""

from __future__ import annotations

import pytest

from secateur.cli.options import literal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("True", True),
        ("0.5", 0.5),
        ("white", "white"),
        ("truer", "truer"),
        ("(1, 2)", (1, 2)),
    ],
)
def test_a_value_is_a_literal_or_text_and_switches_are_spelt_as_in_a_plan(text, value):
    found = literal(text)
    assert found == value
    assert type(found) is type(value)
