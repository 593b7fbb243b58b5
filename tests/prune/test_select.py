"""Selection cuts exactly what was asked for, in a fixed order, also among ties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import MethodError
from secateur.prune import Below, Compression, Count, Fraction, Outliers, rank, removed, select
from secateur.prune.select import restrict
from secateur.types import ChannelMask, Scores, WeightMask

TIED = st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=9), min_size=1, max_size=4)
ORDERS = st.sampled_from(["smallest", "largest"])
SCOPES = st.sampled_from(["layer", "global"])


def channel(*layers: list[float]) -> Scores:
    return Scores({f"l{i}": torch.tensor(layer) for i, layer in enumerate(layers)}, "channel")


def gone(mask: ChannelMask | WeightMask) -> list[tuple[str, int]]:
    return [(name, i) for name, keep in mask.keep.items() for i in (~keep).flatten().nonzero().flatten().tolist()]


def in_cutting_order(layers: list[list[float]], order: str) -> list[tuple[str, int]]:
    """All entries by score, ties by layer and then index: Python's own stable sort of tuples is the oracle."""
    sign = 1 if order == "smallest" else -1
    keyed = sorted((sign * score, i, j) for i, layer in enumerate(layers) for j, score in enumerate(layer))
    return [(f"l{i}", j) for _, i, j in keyed]


@settings(max_examples=80, deadline=None)
@given(TIED, ORDERS, st.data())
def test_global_count_cuts_the_first_by_score_layer_and_index(layers, order, data):
    count = data.draw(st.integers(0, sum(map(len, layers))))
    mask = select(channel(*layers), Count(count), order=order, scope="global")
    assert sorted(gone(mask)) == sorted(in_cutting_order(layers, order)[:count])


@settings(max_examples=80, deadline=None)
@given(TIED, ORDERS, st.data())
def test_count_per_layer_is_exact_in_each(layers, order, data):
    count = data.draw(st.integers(0, min(map(len, layers))))
    mask = select(channel(*layers), Count(count), order=order)
    for i, layer in enumerate(layers):
        wanted = [("l0", j) for _, j in in_cutting_order([layer], order)[:count]]
        assert sorted(("l0", j) for name, j in gone(mask) if name == f"l{i}") == sorted(wanted)


@settings(max_examples=40, deadline=None)
@given(TIED, ORDERS, SCOPES)
def test_cutting_one_more_keeps_all_cuts(layers, order, scope):
    ranking = rank(channel(*layers), order=order, scope=scope)
    most = ranking.size if scope == "global" else min(map(len, layers))
    cuts = [set(gone(ranking.cut(Count(k)))) for k in range(most + 1)]
    assert all(small < large for small, large in pairwise(cuts))


@settings(max_examples=60, deadline=None)
@given(TIED, st.integers(0, 20), SCOPES)
def test_fraction_rounds_down(layers, twentieths, scope):
    mask = select(channel(*layers), Fraction(twentieths / 20), scope=scope)
    sizes = [len(layer) for layer in layers]
    if scope == "global":
        assert len(gone(mask)) == twentieths * sum(sizes) // 20
    else:
        assert list(removed(mask).values()) == [twentieths * size // 20 for size in sizes]


def test_fraction_survives_floating_point():
    assert 0.29 * 100 < 29
    assert len(gone(select(channel([1.0] * 100), Fraction(0.29)))) == 29
    assert len(gone(select(channel([1.0] * 100), Fraction(0.2899)))) == 28


def test_three_hundred_ties_and_two_hundred_cuts():
    assert len(gone(select(channel([0.0] * 300), Count(200)))) == 200


def test_ties_break_by_the_order_of_the_layers_not_of_their_names():
    scores = Scores({"b": torch.zeros(2), "a": torch.zeros(2)}, "channel")
    assert gone(select(scores, Count(3), scope="global")) == [("b", 0), ("b", 1), ("a", 0)]
    assert gone(select(scores, Count(3), scope="global", order="largest")) == [("b", 0), ("b", 1), ("a", 0)]


def test_weights_keep_their_shape():
    mask = select(Scores({"c.weight": torch.arange(24.0).reshape(2, 3, 2, 2)}, "weight"), Count(5))
    assert isinstance(mask, WeightMask)
    assert mask.keep["c.weight"].shape == (2, 3, 2, 2)
    assert gone(mask) == [("c.weight", i) for i in range(5)]


@pytest.mark.parametrize("count", [-1, 4])
def test_count_out_of_range_per_layer(count):
    with pytest.raises(MethodError, match=rf"^count must lie in \[0, 3\], got {count}$"):
        select(channel([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), Count(count))


def test_count_out_of_range_over_all():
    with pytest.raises(MethodError, match=r"^count must lie in \[0, 512\], got 600$"):
        select(channel([0.0] * 500, [0.0] * 12), Count(600), scope="global")


def test_count_per_layer_is_bounded_by_the_smallest_layer():
    with pytest.raises(MethodError, match=r"count must lie in \[0, 2\], got 3"):
        select(channel([1.0] * 9, [1.0] * 2), Count(3))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_fraction_out_of_range(fraction):
    with pytest.raises(MethodError, match=r"fraction must lie in \[0, 1\]"):
        select(channel([1.0]), Fraction(fraction))


def test_below_is_strict_and_needs_no_rank():
    scores = channel([1.0, 2.0, 3.0], [2.0, 2.0])
    assert gone(select(scores, Below(2.0))) == [("l0", 0)]
    assert gone(select(scores, Below(2.0001))) == [("l0", 0), ("l0", 1), ("l1", 0), ("l1", 1)]
    assert gone(select(scores, Below(2.0), order="largest")) == [("l0", 2)]


def test_outliers_by_hand_per_layer_and_over_all():
    # l0: mean 8, sample deviation 4.472; 8 - 1.5 * 4.472 = 1.29.  l1: mean 10, deviation 0.
    layers = [[0.0, 10.0, 10.0, 10.0, 10.0], [10.0, 10.0]]
    assert math.isclose(torch.tensor(layers[0]).std().item(), math.sqrt(20), rel_tol=1e-6)
    assert gone(select(channel(*layers), Outliers(1.5))) == [("l0", 0)]
    assert gone(select(channel(*layers), Outliers(1.79))) == []  # 8 - 1.79 * 4.472 < 0
    assert gone(select(channel(*layers), Outliers(1.5), order="largest")) == []
    # over all: mean 60 / 7 = 8.571, deviation 3.780; the threshold for k = 2.2 is 0.256.
    assert gone(select(channel(*layers), Outliers(2.2), scope="global")) == [("l0", 0)]


def test_outliers_at_the_large_end_mirror_those_at_the_small_end():
    layer = [0.0, 0.1, 0.2, 0.1, 9.0]
    assert gone(select(channel(layer), Outliers(1.0), order="largest")) == [("l0", 4)]
    assert gone(select(channel([-v for v in layer]), Outliers(1.0))) == [("l0", 4)]


def test_one_score_is_no_outlier():
    assert gone(select(channel([5.0], [1.0, 1.0]), Outliers(0.0))) == []


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("compression", "kept"), [(1.0, 800), (2.0, 300), (4.0, 50), (5.0, 0)])
def test_compression_by_the_formula(compression, kept, scope):
    # 1000 parameters, 800 of them ranked: keep (1000 / compression - 200) / 800 of these.
    scores = Scores({"a.weight": torch.rand(20, 10), "b.weight": torch.rand(20, 30)}, "weight")
    mask = select(scores, Compression(compression, total=1000), scope=scope)
    assert sum(int(keep.sum()) for keep in mask.keep.values()) == kept
    if scope == "layer":
        assert int(mask.keep["a.weight"].sum()) == round(kept / 4)


@pytest.mark.parametrize("compression", [0.99, 5.01])
def test_compression_has_limits(compression):
    scores = Scores({"a.weight": torch.rand(800)}, "weight")
    with pytest.raises(MethodError, match=rf"^target compression must lie in \[1, 5\], got {compression}$"):
        select(scores, Compression(compression, total=1000))


def test_compression_of_channels_is_refused():
    with pytest.raises(MethodError, match="needs weight scores"):
        select(channel([1.0, 2.0]), Compression(2.0, total=10))


def test_nan_is_refused_and_named():
    with pytest.raises(MethodError, match="got NaN in 'l1'"):
        rank(channel([1.0], [1.0, math.nan]))


def test_nothing_to_rank_is_refused():
    with pytest.raises(MethodError, match="nothing to prune"):
        rank(Scores({}, "weight"))


@pytest.mark.parametrize(("setting", "value"), [("order", "smalest"), ("scope", "globally")])
def test_unknown_words(setting, value):
    with pytest.raises(MethodError, match=f"unknown {setting} '{value}'; did you mean"):
        rank(channel([1.0]), **{setting: value})


def test_restrict_keeps_order_and_granularity():
    kept = restrict(channel([1.0], [2.0], [3.0]), {"l0": "x", "l1": "y", "l2": "x"}, frozenset({"x"}))
    assert list(kept.values) == ["l0", "l2"]
    assert kept.granularity == "channel"
