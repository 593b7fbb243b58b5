"""The activation score: Wanda's product for weights, what readers see for channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import DataError
from secateur.models import build
from secateur.prune.activity import activation
from secateur.prune.readers import last_channels
from secateur.types import ImageSet, to_float


def test_weights_by_closed_form_on_a_linear_network(gen):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randint(0, 256, (5, 1, 2, 2), generator=gen, dtype=torch.uint8)
    clean = ImageSet(x, torch.zeros(5, dtype=torch.int64), ("a",))
    sizes = to_float(x).flatten(1).square().mean(dim=0).sqrt()
    found = activation(net, clean, generator=gen).values
    assert list(found) == ["1.weight"]
    assert torch.allclose(found["1.weight"], net[1].weight.detach().abs() * sizes, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_of_grouped_convolutions_meet_their_own_inputs(gen, groups):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Flatten(), nn.Linear(8 * 4, 2))
    x = torch.randint(0, 256, (6, 4, 4, 4), generator=gen, dtype=torch.uint8)
    x[:, 3] = 0
    found = activation(net, ImageSet(x, torch.zeros(6, dtype=torch.int64), ("a",)), generator=gen).values["0.weight"]
    sizes = to_float(x).square().mean(dim=(0, 2, 3)).sqrt()
    weight = net[0].weight.detach()
    for out in range(8):
        for position in range(4 // groups):
            channel = out // (8 // groups) * (4 // groups) + position
            assert torch.allclose(found[out, position], weight[out, position].abs() * sizes[channel], atol=1e-6)


def test_channels_are_what_their_readers_see(trained, images, gen):
    found = activation(trained, images, granularity="channel", generator=gen).values
    assert list(found) == ["bn1", "bn2", "bn3", "bn4"]
    seen = {}
    handle = trained.net.conv3.register_forward_pre_hook(lambda _, given: seen.update(x=given[0].detach()))
    with torch.inference_mode():
        trained(to_float(images.x))
    handle.remove()
    assert torch.allclose(found["bn2"], seen["x"].abs().mean(dim=(0, 2, 3)), rtol=1e-4)
    last = last_channels(trained, images.shape)
    assert torch.allclose(found["bn4"].double(), last.activations(trained, images), rtol=1e-5)


def test_writers_of_a_stream_share_its_activation(gen):
    net = build("resnet20", width=2).eval()
    x = torch.randint(0, 256, (4, 3, 32, 32), generator=gen, dtype=torch.uint8)
    found = activation(net, ImageSet(x, torch.zeros(4, dtype=torch.int64), ("a",)), granularity="channel", generator=gen).values
    assert torch.equal(found["bn1"], found["layer1.0.bn2"])
    assert not torch.equal(found["bn1"], found["layer1.0.bn1"])
    assert all(bool((values >= 0).all()) and float(values.max()) > 0 for values in found.values())


def test_no_images_no_activation(tiny, images, gen):
    with pytest.raises(DataError, match="at least one image, got 0"):
        activation(tiny(), images.subset(torch.arange(0)), generator=gen)
