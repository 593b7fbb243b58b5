"""Whole-model compression on networks of the registry: what was asked for is what is left, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import MethodError
from secateur.measure import cost
from secateur.models import build
from secateur.prune import Compression, Count, Sentence, collapsed, prune, rank, removed, select
from secateur.prune.gap import gap
from secateur.prune.magnitude import l1, random
from secateur.prune.select import shared
from secateur.state import generator, seeded
from secateur.types import ImageSet, Scores, WeightMask

NETWORKS = {"resnet20": {}, "vgg11_bn": {"width": 32}, "mobilenet_v2": {"classes": 10}}
FEW = ImageSet(torch.randint(0, 256, (4, 3, 32, 32), generator=generator(0), dtype=torch.uint8), torch.arange(4), tuple("abcd"))


def network(name: str):
    with seeded(generator(0)):
        return build(name, **NETWORKS[name]).eval()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_compression_asked_for_is_met_within_a_thousandth(name, scope):
    net = network(name)
    total = sum(parameter.numel() for parameter in net.parameters())
    ranking = rank(random(net, FEW, generator=generator(0)), scope=scope)
    for compression in (2, 4, 8, 16, 32):
        cut = removed(ranking.cut(Compression(compression, total)))
        assert total / (total - sum(cut.values())) == pytest.approx(compression, rel=1e-3)
        if scope == "layer":
            shares = [gone / net.get_parameter(layer).numel() for layer, gone in cut.items() if gone > 500]
            assert max(shares) - min(shares) < 2e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_so_it_is_for_what_gap_may_cut(name):
    net = network(name)
    total = cost(net, FEW.shape).parameters
    scores = gap(net, FEW, steps=1, generator=generator(0))
    size = sum(value.numel() for value in scores.values.values())
    assert size < total
    for scope in ("layer", "global"):
        ranking = rank(scores, order="largest", scope=scope)
        for compression in (2, 8, 16):
            left = total - sum(removed(ranking.cut(Compression(compression, total))).values())
            assert total / left == pytest.approx(compression, rel=1e-3)
        most = total / (total - size)
        with pytest.raises(MethodError, match=rf"^target compression must lie in \[1, {int(most * 100) / 100:g}\], got 1000$"):
            ranking.cut(Compression(1000, total))


def test_the_network_itself_has_so_many_zeros():
    net = network("resnet20")
    total = cost(net, FEW.shape).parameters
    for value in net.parameters():  # biases and shifts of a fresh network are 0
        torch.nn.init.uniform_(value, 0.1, 1.0)
    pruned = prune(net, FEW, Sentence(l1, Compression(16, total), scope="global"), generator=generator(0))
    assert total / cost(pruned.model, FEW.shape).nonzero == pytest.approx(16, rel=1e-3)


def test_a_total_below_what_is_ranked_is_refused():
    scores = Scores({"a.weight": torch.rand(800)}, "weight")
    with pytest.raises(MethodError, match=r"^total must lie in \[800, "):
        select(scores, Compression(2, total=700))


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(SIZES)
def test_shares_add_up_and_never_shrink(sizes):
    before = [0] * len(sizes)
    for cut in range(sum(sizes) + 1):
        counts = shared(cut, sizes)
        assert sum(counts) == cut
        assert all(old <= count <= size for old, count, size in zip(before, counts, sizes, strict=True))
        before = counts


@settings(max_examples=100, deadline=None)
@given(SIZES, st.floats(0, 1))
def test_shares_are_those_of_the_plain_rule(sizes, part):
    turns = sorted((2 * j - 1, size, i) for i, size in enumerate(sizes) for j in range(1, size + 1))
    turns.sort(key=lambda turn: (turn[0] / turn[1], turn[2]))
    cut = int(part * sum(sizes))
    first = [i for _, _, i in turns[:cut]]
    assert shared(cut, sizes) == [first.count(i) for i in range(len(sizes))]


@settings(max_examples=100, deadline=None)
@given(SIZES, st.data())
def test_shares_with_a_least_are_those_of_the_plain_rule(sizes, data):
    least = [data.draw(st.integers(0, size)) for size in sizes]
    turns = [((2 * j - 1) / size, i) for i, size in enumerate(sizes) for j in range(least[i] + 1, size + 1)]
    cut = data.draw(st.integers(sum(least), sum(sizes)))
    rest = [i for _, i in sorted(turns)[: cut - sum(least)]]
    assert shared(cut, sizes, least=least) == [first + rest.count(i) for i, first in enumerate(least)]


def test_a_least_beyond_the_cut_means_nothing():
    assert shared(4, [6, 2], least=[0, 5]) == shared(4, [6, 2]) == [3, 1]


def test_a_layer_without_weights_is_told_and_one_without_biases_is_not(tiny, images, gen):
    keep = {"a.weight": torch.zeros(3, dtype=torch.bool), "a.bias": torch.zeros(3, dtype=torch.bool)}
    assert collapsed(WeightMask(keep)) == ("a.weight",)
    assert collapsed(WeightMask({**keep, "a.weight": torch.ones(3, dtype=torch.bool)})) == ()
    sentence = Sentence(l1, Count(36), layers="conv1")
    assert prune(tiny(), images, sentence, generator=gen).notes == ("layer collapse: nothing is left of 'conv1.weight'",)
