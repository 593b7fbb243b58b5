"""AWM against its formulas: gradients by autograd on plain weights, Adam and clamping by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.data import sample
from secateur.errors import MethodError
from secateur.measure import evaluate
from secateur.repair.awm import awm
from secateur.state import generator

CONVS = ("conv1", "conv2", "conv3", "conv4")


class ByHand:
    """The factors' course: weights ``m * w`` put into a copy, Adam with its bias corrections, clamping."""

    def __init__(self, model, lr: float) -> None:
        self.net, self.lr, self.steps = deepcopy(model).eval(), lr, 0
        self.first = [self.net.net.get_submodule(name).weight.detach().clone() for name in CONVS]
        self.factors = [torch.ones_like(weight) for weight in self.first]
        self.mean = [torch.zeros_like(weight) for weight in self.first]
        self.square = [torch.zeros_like(weight) for weight in self.first]

    def load(self) -> None:
        with torch.no_grad():
            for name, weight, factor in zip(CONVS, self.first, self.factors, strict=True):
                self.net.net.get_submodule(name).weight.copy_(weight * factor)

    def descend(self, loss_of, sparsity: float) -> None:
        weights = [self.net.net.get_submodule(name).weight for name in CONVS]
        slopes = torch.autograd.grad(loss_of(self.net), weights)
        self.steps += 1
        for i, (slope, weight) in enumerate(zip(slopes, self.first, strict=True)):
            slope = slope * weight + sparsity
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * slope
            self.square[i] = 0.999 * self.square[i] + 0.001 * slope**2
            step = self.mean[i] / (1 - 0.9**self.steps) / ((self.square[i] / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            self.factors[i] = (self.factors[i] - self.lr * step).clamp(0, 1)
        self.load()


@pytest.mark.parametrize(("radius", "trade_off"), [(1000.0, 0.9), (1e6, 0.3), (0.0, 0.5)])
def test_the_factors_by_hand(radius, trade_off, tiny, images):
    model = tiny()
    hand, random = ByHand(model, lr=0.05), generator(4)
    for _ in range(2):
        batches = list(sample(images, 40, 6, generator=random))
        shift = torch.zeros(1, *images.shape)
        for x, _ in batches[:3]:
            shift.requires_grad_()
            loss = F.cross_entropy(hand.net((x + shift).clamp(0, 1)), hand.net(x).argmax(1))
            shift = (shift + 3.0 * torch.autograd.grad(loss, shift)[0]).detach()
        limit = radius * 144 / 3072
        if shift.abs().sum() > limit:
            shift = shift / shift.abs().sum() * limit
        for x, y in batches[3:]:
            hand.descend(
                lambda net, x=x, y=y, shift=shift: (
                    trade_off * F.cross_entropy(net(x), y) + (1 - trade_off) * F.cross_entropy(net((x + shift).clamp(0, 1)), y)
                ),
                sparsity=1e-3,
            )
    repaired = awm(
        model, images, rounds=2, iterations=3, lr=0.05, trade_off=trade_off, sparsity=1e-3, radius=radius, ascent=3.0,
        batch_size=40, generator=generator(4),
    )  # fmt: skip
    for name, factor, weight in zip(CONVS, hand.factors, hand.first, strict=True):
        found = repaired.mask.scale[f"{name}.weight"]
        assert torch.allclose(found, factor, atol=2e-3)
        assert torch.equal(repaired.model.net.get_submodule(name).weight, weight * found)
    assert min(float(factor.min()) for factor in hand.factors) < 0.8
    assert repaired.log["mean_factor"] == pytest.approx(float(torch.cat([f.flatten() for f in hand.factors]).mean()), abs=1e-3)


def test_nothing_else_changes(trained, images):
    steps = []
    repaired = awm(
        trained, images, rounds=2, iterations=3, on_step=lambda step, of: steps.append((step, of)), generator=generator(0)
    )
    assert steps == [(step, 6) for step in range(1, 7)]
    changed = {
        name for name, value in repaired.model.state_dict().items() if not torch.equal(value, trained.state_dict()[name])
    }
    assert changed == {f"net.{name}.weight" for name in CONVS}


def test_the_backdoor_weakens(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = awm(victim.model, victim.clean, rounds=4, iterations=6, lr=0.05, ascent=1.0, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.attack_success.value < before.attack_success.value - 0.3
    assert after.accuracy.value > 0.8


def test_sparsity_is_told(tiny, images):
    repaired = awm(tiny(), images, rounds=2, iterations=10, lr=0.2, sparsity=1e6, generator=generator(0))
    assert repaired.log["removed_share"] == repaired.log["halved_share"] == 1.0
    assert repaired.log["mean_factor"] == 0.0
    assert repaired.log["removed"] == sum(factor.numel() for factor in repaired.mask.scale.values())
    assert repaired.notes[0].startswith(f"{int(repaired.log['removed'])} of {int(repaired.log['removed'])} weights")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rounds", -1), ("iterations", 0), ("lr", 0.0), ("trade_off", 1.1), ("sparsity", -1.0), ("radius", -1.0), ("ascent", -1.0),
     ("batch_size", 0)],
)  # fmt: skip
def test_settings_out_of_range(setting, value, tiny, images):
    with pytest.raises(MethodError, match=rf"^{setting} must lie in"):
        awm(tiny(), images, **{setting: value}, generator=generator(0))


def test_a_network_without_convolutions_is_refused(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MethodError, match=r"^awm needs a network with convolutions, got one without; use another method$"):
        awm(net, images, generator=generator(0))
