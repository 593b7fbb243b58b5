"""A network as graphs: who is a neuron, who goes together, and who is whose neighbour."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import MethodError
from secateur.models import build
from secateur.models.channels import trace_channels
from secateur.repair.onp.layers import Feeding, layers, nearest
from secateur.state import generator, seeded


def net(name, **kind):
    with seeded(generator(0)):
        return build(name, classes=10, **kind).eval()


def test_neighbours_are_those_with_the_largest_cosine_and_lengths_do_not_matter():
    vectors = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [0.1, 2.0]])
    edges = set(map(tuple, nearest(vectors, 1).T.tolist()))
    assert edges == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_who_is_chosen_is_tied_to_who_chose_it():
    """Row 2 is nobody's first choice, but has one."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.4, 1.0]])
    assert set(map(tuple, nearest(vectors, 1).T.tolist())) == {(0, 1), (1, 0), (1, 2), (2, 1)}


@pytest.mark.parametrize(("size", "degree", "edges"), [(1, 8, 0), (3, 0, 0), (3, 8, 6)])
def test_no_more_neighbours_than_there_are(size, degree, edges):
    assert nearest(torch.rand(size, 4, generator=generator(0)), degree).shape == (2, edges)


def test_the_channels_of_a_residual_stream_are_one_layer():
    found = layers(net("resnet20", width=4), (3, 32, 32))
    assert [(len(layer.sites), layer.size) for layer in found[:3]] == [(4, 4), (1, 4), (1, 4)]
    assert found[0].sites[1:] == ("layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2")
    assert [layer.depth for layer in found] == [number / (len(found) - 1) for number in range(len(found))]
    apart = layers(net("resnet20", width=4), (3, 32, 32), residual="apart")
    assert all(len(layer.sites) == 1 for layer in apart)
    assert {site for layer in found for site in layer.sites} == {layer.sites[0] for layer in apart}


def test_the_answers_are_no_neurons():
    model = net("lenet5")
    assert not any(
        site.startswith("fc3") or site == "classifier" for layer in layers(model, (3, 32, 32)) for site in layer.sites
    )
    graph = trace_channels(model, (3, 32, 32))
    named = {site for layer in layers(model, (3, 32, 32)) for site in layer.sites}
    assert named == {site.name for site in graph.sites if not graph.is_output(site.name)}


class Small(nn.Module):
    """Two convolutions, a norm that reads the sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(2), nn.Linear(2, 10)

    def forward(self, x):
        x = self.one(x)
        return self.last(torch.relu(self.norm(x + self.two(x))).mean((2, 3)))


def test_strengths_by_hand():
    model = Small().eval()
    with torch.no_grad():
        model.one.weight.copy_(torch.tensor([[1.0, -2, 3], [0, 0, 1]]).view(2, 3, 1, 1))
        model.two.weight.copy_(torch.tensor([[1.0, -5], [2, 0]]).view(2, 2, 1, 1))
        model.last.weight.zero_()[0] = torch.tensor([7.0, -8.0])
    graph = trace_channels(model, (3, 4, 4))
    feeding, sites = Feeding(model, graph), {site.name: site for site in graph.sites}
    fed, feeds = feeding.strengths(sites["one"])
    assert fed.tolist() == [6, 1]
    assert feeds.tolist() == [3 + 7, 5 + 8]  # what reads the stream reads this channel
    fed, feeds = feeding.strengths(sites["norm"])
    assert fed.tolist() == [0, 0]
    vectors = feeding.vectors(sites["norm"])
    assert vectors.shape[0] == 2
    assert 7 in vectors[0].tolist()


def test_refusals():
    with pytest.raises(MethodError, match="no neurons"):
        layers(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4))
    with pytest.raises(MethodError, match="residual"):
        layers(net("lenet5"), (3, 32, 32), residual="both")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="degree"):
        layers(net("lenet5"), (3, 32, 32), degree=-1)
