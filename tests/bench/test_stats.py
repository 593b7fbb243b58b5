"""Means, paired differences and ranks against scipy and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, t, wilcoxon

from secateur.bench.stats import by_victim, mean_ranks, paired, signed_rank_p, summary
from secateur.errors import InconclusiveError

RATES = st.floats(0, 1).map(lambda value: round(value, 3))


@settings(max_examples=50, deadline=None)
@given(st.lists(RATES, min_size=2, max_size=12))
def test_interval_against_scipy(values):
    found = summary(values)
    mean = sum(values) / len(values)
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert (found.mean, found.sd) == (pytest.approx(mean), pytest.approx(sd, abs=1e-12))
    if sd > 1e-9:
        low, high = t.interval(0.95, len(values) - 1, loc=mean, scale=sd / math.sqrt(len(values)))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_interval_by_hand():
    found = summary([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2, 1, 3)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)  # t of 2 degrees of freedom, from the tables


def test_one_value_has_no_interval_and_none_no_mean():
    found = summary([0.25])
    assert (found.mean, found.sd, found.low, found.high, found.n) == (0.25, None, None, None, 1)
    with pytest.raises(InconclusiveError, match="at least one value, got 0"):
        summary([])


def test_repair_seeds_are_no_repeats():
    values = {(0, 0): 0.1, (0, 1): 0.3, (1, 0): 0.5}
    assert by_victim(values) == [pytest.approx(0.2), 0.5]
    assert summary(by_victim(values)).n == 2


def test_paired_by_hand():
    a = {(0, 0): 0.5, (0, 1): 0.3, (1, 0): 0.6, (2, 0): 0.9}
    b = {(0, 0): 0.4, (0, 1): 0.4, (1, 0): 0.3, (3, 0): 0.0}
    found = paired(a, b)  # victim 0: (0.1 - 0.1) / 2, victim 1: 0.3
    assert (found.mean, found.n, found.blocks) == (pytest.approx(0.15), 2, 3)
    assert found.high == pytest.approx(0.15 + 12.7062 * 0.3 / 2, abs=1e-4)
    assert found.p == 1  # one difference is left, and either sign is as likely


def test_one_victim_gives_a_difference_without_interval():
    found = paired({(0, 0): 0.5, (0, 1): 0.7}, {(0, 0): 0.1, (0, 1): 0.2})
    assert (found.mean, found.low, found.high, found.p, found.n, found.blocks) == (pytest.approx(0.45), None, None, None, 1, 2)
    with pytest.raises(InconclusiveError, match="both methods have, got 0"):
        paired({(0, 0): 0.5}, {(1, 0): 0.5})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-500, 500).filter(bool), min_size=1, max_size=20, unique_by=abs))
def test_signed_rank_p_against_scipy(values):
    expected = wilcoxon(values, method="exact").pvalue
    assert signed_rank_p([value / 1000 for value in values]) == pytest.approx(expected)


def test_signed_rank_p_with_ties_and_zeros_by_hand():
    assert signed_rank_p([0.1, 0.1, 0.1]) == 0.25  # 2 of the 8 choices of signs
    assert signed_rank_p([0.3 - 0.2, 0.1, 0.1, 0.0]) == 0.25  # equal but for rounding
    assert signed_rank_p([1, 1, -2]) == 1  # ranks 1.5, 1.5 and -3
    assert signed_rank_p([0.0, 0.0]) == 1
    assert signed_rank_p([0.01 * i for i in range(1, 6)]) == pytest.approx(2 / 32)
    assert signed_rank_p(range(1, 201)) < 1e-30


def test_ranks_with_ties_by_hand():
    found = mean_ranks([{"a": 0.1, "b": 0.1, "c": 0.5}, {"a": 0.3, "b": 0.2, "c": 0.1}], lower=True)
    assert found.mean == {"a": 2.25, "b": 1.75, "c": 2.0}
    assert found.blocks == 2
    assert mean_ranks([{"a": 0.9, "b": 0.5}], lower=False).mean == {"a": 1, "b": 2}


def test_failed_and_absent_methods_rank_last():
    for lower in (True, False):
        assert mean_ranks([{"a": None, "b": 1.0, "c": 0.0}], lower=lower).mean["a"] == 3
    assert mean_ranks([{"a": None, "b": 0.5, "c": None}], lower=True).mean == {"a": 2.5, "b": 1, "c": 2.5}
    assert mean_ranks([{"a": 1.0, "b": 0.0}, {"a": 1.0}], lower=True).mean == {"a": 1.5, "b": 1.5}
    assert mean_ranks([], lower=True).blocks == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(RATES, min_size=4, max_size=4), min_size=1, max_size=8), st.booleans())
def test_ranks_against_scipy(table, lower):
    found = mean_ranks([dict(zip("abcd", values, strict=True)) for values in table], lower=lower)
    expected = sum(rankdata(values if lower else [-value for value in values]) for values in table) / len(table)
    assert list(found.mean.values()) == pytest.approx(list(expected))
    assert sum(found.mean.values()) == pytest.approx(10)
