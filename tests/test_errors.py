"""What errors say, and how the command line ends on them."""

from __future__ import annotations

import inspect
import math

import pytest

from secateur import errors
from secateur.errors import (
    DataError,
    InconclusiveError,
    MethodError,
    ModelError,
    RefusedError,
    SecateurError,
    check_choice,
    check_range,
    unknown,
)


def test_exit_codes():
    codes = {DataError: 2, ModelError: 2, MethodError: 2, InconclusiveError: 3, RefusedError: 4, SecateurError: 2}
    tree = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)}
    assert tree == set(codes)
    for kind, code in codes.items():
        assert kind("x").exit_code == code
        assert issubclass(kind, SecateurError)


def test_the_docstring_draws_the_tree():
    rows = [line.replace("|--", "").replace("`--", "").split() for line in errors.__doc__.splitlines()]
    drawn = {row[0]: int(row[1]) for row in rows if row and row[0].endswith("Error")}
    assert drawn == {name: kind.exit_code for name, kind in vars(errors).items() if name.endswith("Error")}


@pytest.mark.parametrize(("value", "allowed", "text"), [
    ("resnet2", ["resnet20", "vit"], "unknown architecture 'resnet2'; did you mean 'resnet20'?"),
    ("zzz", ["vit", "resnet20"], "unknown architecture 'zzz'; choose from: resnet20, vit"),
])  # fmt: skip
def test_unknown(value, allowed, text):
    assert unknown("architecture", value, allowed) == text


def test_unknown_takes_any_iterable():
    assert unknown("name", "a", iter(["b"])) == "unknown name 'a'; choose from: b"


@pytest.mark.parametrize("value", [0, 512, 3.5])
def test_inside_the_range(value):
    check_range("count", value, 0, 512)


@pytest.mark.parametrize(("value", "low", "high", "text"), [
    (600, 0, 512, "count must lie in [0, 512], got 600"),
    (-1, 0, 512, "count must lie in [0, 512], got -1"),
    (1.5, 0, 1, "count must lie in [0, 1], got 1.5"),
    (math.nan, 0, 1, "count must lie in [0, 1], got nan"),
    (math.inf, 0, 1, "count must lie in [0, 1], got inf"),
    (11173963, 0, 11173962, "count must lie in [0, 11173962], got 11173963"),
    (1.0000001, 0, 1, "count must lie in [0, 1], got 1.0000001"),
    (1, 0, 1 - 1e-9, "count must lie in [0, 0.999999999], got 1"),
])  # fmt: skip
def test_outside_the_range_the_message_shows_the_difference(value, low, high, text):
    with pytest.raises(MethodError) as caught:
        check_range("count", value, low, high)
    assert str(caught.value) == text


def test_choice():
    check_choice("order", "smallest", ("smallest", "largest"))
    with pytest.raises(MethodError, match=r"^unknown order 'larges'; did you mean 'largest'\?$"):
        check_choice("order", "larges", ("smallest", "largest"))
    with pytest.raises(MethodError, match=r"^unknown order 'x'; choose from: largest, smallest$"):
        check_choice("order", "x", iter(("smallest", "largest")))
