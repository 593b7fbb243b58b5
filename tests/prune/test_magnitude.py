"""Magnitude scores and the layers they speak of."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import MethodError, ModelError
from secateur.models import build
from secateur.models.channels import trace_channels
from secateur.prune import Count, Sentence, choose_layers, prunable_layers, prune, select
from secateur.prune.layers import filters
from secateur.prune.magnitude import l1, l2, random
from secateur.types import ImageSet

SCORES = {"l1": l1, "l2": l2, "random": random}
CONV = {"conv1", "conv2", "conv3", "conv4"}


def rgb(size: int) -> ImageSet:
    return ImageSet(torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))


@pytest.mark.parametrize("score", [l1, l2])
def test_planted_small_filter_is_cut_first(tiny, images, gen, score):
    model = tiny()
    with torch.no_grad():
        for layer, index in {"conv1": 2, "conv2": 5, "conv3": 0, "conv4": 15}.items():
            model.net.get_submodule(layer).weight[index] *= 1e-3
    mask = select(score(model, images, granularity="channel", generator=gen), Count(1))
    cut = {site: (~keep).nonzero().flatten().tolist() for site, keep in mask.keep.items()}
    assert cut == {"bn1": [2], "bn2": [5], "bn3": [0], "bn4": [15]}


def test_filter_norms_by_closed_form(tiny, images, gen):
    model = tiny()
    weight = model.net.conv2.weight.detach().double()
    one = l1(model, images, granularity="channel", generator=gen).values["bn2"].double()
    two = l2(model, images, granularity="channel", generator=gen).values["bn2"].double()
    for k in range(len(weight)):
        values = weight[k].flatten().tolist()
        assert float(one[k]) == pytest.approx(math.fsum(abs(v) for v in values), rel=1e-5)
        assert float(two[k]) == pytest.approx(math.sqrt(math.fsum(v * v for v in values)), rel=1e-5)


def test_l1_and_l2_disagree_on_a_peaked_filter(tiny, images, gen):
    model = tiny()
    with torch.no_grad():
        weight = model.net.conv1.weight
        weight[:] = 10
        weight[0] = 0.5  # l1 4.5, l2 1.5
        weight[1] = 0
        weight[1, 0, 0, 0] = 3  # l1 3, l2 3
    first = [
        select(score(model, images, granularity="channel", generator=gen), Count(1)).keep["bn1"].int().argmin().item()
        for score in (l1, l2)
    ]
    assert first == [1, 0]


def test_weight_scores_are_magnitudes_without_biases_and_norms(tiny, images, gen):
    model = tiny()
    for score in (l1, l2):
        scores = score(model, images, generator=gen)
        assert scores.granularity == "weight"
        assert list(scores.values) == [f"{name}.weight" for name in ("conv1", "conv2", "conv3", "conv4", "linear")]
        for name, values in scores.values.items():
            assert torch.allclose(values, model.net.get_parameter(name).detach().abs())


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_random_is_reproducible_and_only_from_its_generator(tiny, images, granularity):
    model = tiny()

    def draw(seed: int) -> list[torch.Tensor]:
        scores = random(model, images, granularity=granularity, generator=torch.Generator().manual_seed(seed))
        return list(scores.values.values())

    state = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool(((values >= 0) & (values < 1)).all()) for values in first)
    assert len(torch.cat([values.flatten() for values in first]).unique()) > 30


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_scores_leave_the_model_alone(tiny, images, gen, score, granularity):
    model = tiny()
    model.net.bn2.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = score(model, images, granularity=granularity, generator=gen)
    for values in scores.values.values():
        assert not values.requires_grad
        values.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.net.bn2.training
    assert all(p.grad is None for p in model.parameters())


def test_channel_scores_cover_each_written_site_but_the_classes(images, gen):
    net = build("preact_resnet18", width=2)
    scores = l1(net, rgb(32), granularity="channel", generator=gen)
    graph = trace_channels(net, (3, 32, 32))
    reading = {site.name for site in graph.sites if site.writer is None}
    assert "layer1.0.bn1" in reading
    assert not reading & set(scores.values)
    assert "linear" not in scores.values
    assert {site: len(rows) for site, rows in filters(net, graph).items()} == {s: len(v) for s, v in scores.values.items()}


def test_unknown_granularity(tiny, images, gen):
    with pytest.raises(MethodError, match="unknown granularity 'channels'; did you mean 'channel'"):
        l1(tiny(), images, granularity="channels", generator=gen)


@pytest.mark.parametrize(("place", "expected"), [
    ("all", {*CONV, "linear"}),
    ("early", {"conv1"}),
    ("middle", {"conv2", "conv3"}),
    ("late", {"conv4"}),
    ("last-conv", {"conv4"}),
    ("last-layer", {"linear"}),
    ("conv1, linear", {"conv1", "linear"}),
    (["conv3"], {"conv3"}),
])  # fmt: skip
def test_places_in_the_small_network(tiny, place, expected):
    assert choose_layers(tiny(), place) == expected


@pytest.mark.parametrize(("name", "kwargs", "last_conv", "last_layer", "first", "last"), [
    ("resnet20", {"width": 2}, "layer3.2.conv2", "linear", "conv1", "layer3.2.conv2"),
    ("vit", {"dim": 8, "depth": 2, "heads": 1, "hidden": 8, "patch": 8}, "patch_embed.proj", "head", "patch_embed.proj",
     "blocks.1.mlp.fc2"),
])  # fmt: skip
def test_places_in_larger_networks(name, kwargs, last_conv, last_layer, first, last):
    net = build(name, **kwargs)
    body = prunable_layers(net)[:-1]
    thirds = [choose_layers(net, place) for place in ("early", "middle", "late")]
    assert choose_layers(net, "last-conv") == {last_conv}
    assert choose_layers(net, "last-layer") == {last_layer}
    assert sum(map(len, thirds)) == len(body)
    assert frozenset().union(*thirds) == set(body)
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert first in thirds[0]
    assert last in thirds[2]


def test_unknown_layer_has_a_suggestion(tiny):
    with pytest.raises(MethodError, match="unknown layer 'conv_1'; did you mean 'conv1'"):
        choose_layers(tiny(), "conv_1")
    with pytest.raises(MethodError, match="unknown layer 'latest'; did you mean 'late'"):
        choose_layers(tiny(), "latest")


def test_networks_without_layers_or_convolutions():
    with pytest.raises(MethodError, match="no convolution or linear layer"):
        choose_layers(torch.nn.Sequential(torch.nn.ReLU()), "all")
    with pytest.raises(MethodError, match="needs a convolution"):
        choose_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "last-conv")


def test_classes_are_not_channels(tiny, images, gen):
    with pytest.raises(
        MethodError, match="no channels can be cut in layers 'last-layer': a filter of the last layer is a class"
    ):
        prune(tiny(), images, Sentence(l1, Count(1), "channel", layers="last-layer"), generator=gen)


def test_weights_of_the_last_layer_can_be_cut(tiny, images, gen):
    repaired = prune(tiny(), images, Sentence(l1, Count(7), "weight", layers="last-layer"), generator=gen)
    assert set(repaired.mask.keep) == {"linear.weight"}
    assert int((repaired.model.net.linear.weight == 0).sum()) == 7


def test_a_network_that_cannot_be_traced_has_weight_scores_only(gen):
    class Fork(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    data = ImageSet(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    assert set(l1(Fork(), data, generator=gen).values) == {"fc.weight"}
    with pytest.raises(ModelError, match="cannot follow the channels of Fork"):
        l1(Fork(), data, granularity="channel", generator=gen)
