"""Intervals and tests against formulas worked out here."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from secateur.binomial import tail, wilson_interval
from secateur.errors import InconclusiveError
from secateur.measure import paired_p, wilson

Z = 1.959963984540054


def formula(hits: int, n: int) -> tuple[float, float]:
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_against_newcombe(hits, n, low, high):
    rate = wilson(hits, n)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)
    assert (rate.value, rate.n) == (hits / n, n)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10_000), st.data())
def test_wilson_by_formula_holds_its_rate_and_mirrors(n, data):
    hits = data.draw(st.integers(0, n))
    rate, mirror = wilson(hits, n), wilson(n - hits, n)
    low, high = formula(hits, n)
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert mirror.low == pytest.approx(1 - rate.high, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_both_are_those_of_scipy(n, data):
    hits, p = data.draw(st.integers(0, n)), data.draw(st.floats(1e-3, 1 - 1e-3))
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert tail(hits, n, p) == pytest.approx(binomtest(hits, n, p, alternative="greater").pvalue, rel=1e-8, abs=1e-300)


def test_none_and_all_right_are_still_uncertain():
    none, all_ = wilson(0, 50), wilson(50, 50)
    assert none.value == none.low == 0
    assert all_.value == all_.high == 1
    assert none.high == pytest.approx(Z * Z / (50 + Z * Z))
    assert all_.low == pytest.approx(50 / (50 + Z * Z))


def test_no_images_give_no_rate():
    with pytest.raises(InconclusiveError, match="needs at least one image, got 0") as caught:
        wilson(0, 0)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("lost", "gained"), [(5, 0), (4, 0), (1, 1), (9, 3), (3, 9), (0, 6), (40, 20)])
def test_mcnemar_is_a_binomial_sum(lost, gained):
    trials = lost + gained
    tail = sum(math.comb(trials, k) for k in range(lost, trials + 1)) / 2**trials
    assert paired_p(lost, gained) == pytest.approx(tail, rel=1e-9)


def test_mcnemar_without_a_change_proves_nothing():
    assert paired_p(0, 0) == 1.0
    assert paired_p(0, 9) == 1.0
    assert paired_p(5, 0) == 1 / 32 < 0.05 < paired_p(4, 0) == 1 / 16
