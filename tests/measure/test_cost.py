"""Costs by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.measure import cost, latencies_ms
from secateur.models import Classifier, build
from secateur.prune import apply_mask
from secateur.types import WeightMask


def test_convolutional_network_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 4 * 27 * 64 places
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),  # 4 * 9 * 16
        nn.Flatten(),
        nn.Linear(64, 5),  # 320
    )
    found = cost(net, (3, 8, 8))
    assert found.macs == 4 * 27 * 64 + 4 * 9 * 16 + 320
    assert found.parameters == (4 * 27 + 4) + (4 + 4) + 4 * 9 + (320 + 5)
    # 4 bytes each, with running mean and variance, and an int64 counter
    assert found.size_bytes == 4 * (found.parameters + 8) + 8
    assert found.latency_ms is None


def test_resnet20_costs_what_its_paper_says():
    found = cost(build("resnet20"), (3, 32, 32))
    stages = [6 * 16 * 16 * 9 * 32 * 32, (16 + 5 * 32) * 32 * 9 * 16 * 16, (32 + 5 * 64) * 64 * 9 * 8 * 8]
    assert found.macs == 3 * 16 * 9 * 32 * 32 + sum(stages) + 640
    assert found.macs == pytest.approx(40.8e6, rel=0.01)
    assert found.parameters == pytest.approx(0.27e6, rel=0.01)


def test_linear_layers_count_every_token():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 5, bias=False))
    assert cost(net, (3, 4, 4)).macs == 3 * 16 * 5


def test_nonzero_counts_what_a_mask_leaves(tiny):
    model = tiny()
    keep = torch.arange(36).reshape(4, 1, 3, 3) % 3 != 0
    before, after = cost(model, (1, 12, 12)), cost(apply_mask(model, WeightMask({"conv1.weight": keep})), (1, 12, 12))
    assert before.nonzero - after.nonzero == 12
    assert (before.parameters, before.macs, before.size_bytes) == (after.parameters, after.macs, after.size_bytes)


def test_normalisation_costs_nothing(tiny):
    model = tiny()
    assert cost(model, (1, 12, 12)) == cost(model.net, (1, 12, 12))
    assert isinstance(model, Classifier)


def test_latency_is_measured_on_request(tiny):
    latency = cost(tiny(), (1, 12, 12), repeats=3).latency_ms
    assert latency is not None
    assert 0 < latency < 1000


def test_the_network_is_left_as_it_was(tiny):
    model = tiny()
    model.net.bn1.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, (1, 12, 12), repeats=1)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.net.bn1.training
    assert not model.net.bn2.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_go_when_the_network_fails(tiny):
    model = tiny()
    with pytest.raises(RuntimeError):
        cost(model, (7, 12, 12))
    assert not any(module._forward_hooks for module in model.modules())


def test_networks_take_turns(tiny):
    order = []
    one, two = tiny(), tiny(1)
    for name, model in (("one", one), ("two", two)):
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    assert len(latencies_ms([one, two], (1, 12, 12), repeats=3)) == 2
    assert order == ["one", "two"] * 6  # once to see whether they take an image alone


def test_a_network_that_takes_no_image_alone_has_a_size_and_no_time(tiny):
    model = tiny()
    crowd = Crowd(model)
    assert cost(crowd, (1, 12, 12)).macs == cost(model, (1, 12, 12)).macs > 0
    assert latencies_ms([crowd, model], (1, 12, 12), repeats=1)[0] is None


class Crowd(nn.Module):
    """Takes no image alone, as batch norm without running statistics."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        if len(x) == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return self.network(x)
