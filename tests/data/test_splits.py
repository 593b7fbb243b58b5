"""Splits are disjoint, exhaustive, stratified and repeatable."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.data import ImageSet, holdout, split_clean, stratified
from secateur.errors import DataError, MethodError
from secateur.state import generator

labels = st.lists(st.integers(0, 6), max_size=80).map(lambda y: torch.tensor(y, dtype=torch.int64))


def image_set(n: int, classes: int = 2) -> ImageSet:
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return ImageSet(x, torch.arange(n) % classes, tuple(map(str, range(classes))), "toy")


@given(y=labels, cuts=st.lists(st.floats(0, 1), max_size=4), seed=st.integers(0, 99))
def test_disjoint_exhaustive_and_stratified_within_one(y, cuts, seed):
    edges = [0, *sorted(round(cut * len(y)) for cut in cuts), len(y)]
    sizes = [b - a for a, b in pairwise(edges)]
    parts = stratified(y, sizes, generator=generator(seed))
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).sort().values.tolist() == list(range(len(y)))
    left = y.bincount(minlength=7)
    for part, size in zip(parts, sizes, strict=True):
        got = y[part].bincount(minlength=7)
        assert ((got - left * size / max(int(left.sum()), 1)).abs() < 1).all()
        left = left - got
    again = stratified(y, sizes, generator=generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_order_is_shuffled_and_seed_matters():
    y = torch.arange(100) // 50
    a, b = (stratified(y, [60], generator=generator(seed))[0] for seed in (0, 1))
    assert not torch.equal(a, a.sort().values)
    assert not torch.equal(a, b)


def test_ties_are_broken_at_random():
    seen = torch.zeros(20)
    for seed in range(200):
        seen[stratified(torch.arange(20), [5], generator=generator(seed))[0]] += 1
    assert seen.min() > 25
    assert seen.max() < 80


@pytest.mark.parametrize("sizes", [[5, 6], [11], [-1, 3]])
def test_more_than_there_are(sizes):
    with pytest.raises(DataError, match="at most 10 images, got"):
        stratified(torch.arange(10), sizes, generator=generator(0))


def test_split_clean():
    clean, rest = split_clean(image_set(100), 0.1, generator=generator(0))
    assert clean.per_class() == (5, 5)
    assert sorted(clean.x.flatten().tolist() + rest.x.flatten().tolist()) == list(range(100))
    assert (clean.name, rest.name) == ("toy, clean", "toy, rest")
    assert len(split_clean(image_set(10), 1, generator=generator(0))[1]) == 0


def test_holdout():
    fit, hold = holdout(image_set(100), 0.25, generator=generator(0))
    assert (len(fit), len(hold)) == (75, 25)
    assert not set(fit.x.flatten().tolist()) & set(hold.x.flatten().tolist())
    assert (fit.name, hold.name) == ("toy", "toy, hold-out")


def test_shares_that_leave_nothing():
    with pytest.raises(DataError, match=r"share of 0\.001 of 100 images is none; raise it to 0\.01"):
        split_clean(image_set(100), 0.001, generator=generator(0))
    for share in (0, 1):
        with pytest.raises(DataError, match="fit and hold-out need an image each"):
            holdout(image_set(10), share, generator=generator(0))
    with pytest.raises(MethodError, match=r"share must lie in \[0, 1\], got 1.5"):
        split_clean(image_set(10), 1.5, generator=generator(0))
