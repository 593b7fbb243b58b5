"""The movement score against a hand-made fine-tuning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import MethodError, ModelError
from secateur.prune.movement import movement
from secateur.state import generator
from secateur.types import ImageSet, to_float


def few() -> tuple[nn.Sequential, ImageSet]:
    draw = generator(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(3, 4, generator=draw))
    x = torch.randint(0, 256, (6, 1, 2, 2), generator=draw, dtype=torch.uint8)
    return net, ImageSet(x, torch.arange(6) % 3, ("a", "b", "c"))


def test_two_steps_by_hand(gen):
    net, clean = few()
    x, target = to_float(clean.x).double().flatten(1), F.one_hot(clean.y, 3)
    weight, bias, lr = net[1].weight.detach().clone(), net[1].bias.detach().clone(), 0.3
    total = torch.zeros_like(weight)
    for _ in range(2):
        off = ((x @ weight.T + bias).softmax(dim=1) - target) / len(x)
        total -= lr * (off.T @ x) * weight
        weight, bias = weight - lr * (off.T @ x), bias - lr * off.sum(dim=0)
    found = movement(net, clean, epochs=2, lr=lr, batch_size=6, generator=gen).values["1.weight"]
    assert torch.allclose(found, total, atol=1e-6)
    assert bool((found > 0).any())
    assert bool((found < 0).any())


def test_one_step_away_from_zero_counts_for_and_towards_it_against(gen):
    net, clean = few()
    before = net[1].weight.detach().clone()
    loss = F.cross_entropy(net(to_float(clean.x).double()), clean.y)
    [slope] = torch.autograd.grad(loss, [net[1].weight])
    found = movement(net, clean, epochs=1, lr=1e-3, batch_size=6, generator=gen).values["1.weight"]
    grew = (before - 1e-3 * slope).abs() > before.abs()
    assert torch.equal(found > 0, grew)


def test_a_channel_s_movement_is_that_of_its_site(trained, images):
    weights = movement(trained, images, granularity="channel", epochs=1, generator=generator(0)).values
    again = movement(trained, images, granularity="channel", epochs=1, lr=0.04, generator=generator(0)).values
    assert list(weights) == ["bn1", "bn2", "bn3", "bn4"]
    assert not torch.allclose(again["bn4"], weights["bn4"])


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("lr", 0.0), ("batch_size", 0)])
def test_settings_out_of_range(tiny, images, gen, setting, value):
    with pytest.raises(MethodError, match=f"{setting} must lie in"):
        movement(tiny(), images, generator=gen, **{setting: value})


def test_divergence_is_told(tiny, images, gen):
    with pytest.raises(ModelError, match="must be finite"):
        movement(tiny(), images, lr=1e6, generator=gen)
