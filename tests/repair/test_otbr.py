"""OTBR against transport plans known otherwise, and against its formula in plain loops."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from conftest import make_images
from secateur.errors import MethodError
from secateur.models import build
from secateur.repair.otbr import fuse, fusible, matched, otbr, transport, unlearn_noise
from secateur.state import generator, seeded
from secateur.types import WeightMask

QUICK = {"iterations": 5, "lr": 0.02, "batch_size": 32}


def test_equal_masses_are_an_assignment():
    cost = np.random.default_rng(0).random((7, 7))
    plan = transport(cost, np.full(7, 1 / 7), np.full(7, 1 / 7))
    rows, columns = linear_sum_assignment(cost)
    expected = np.zeros((7, 7))
    expected[rows, columns] = 1 / 7
    assert plan == pytest.approx(expected, abs=1e-8)


def test_on_a_line_the_plan_keeps_the_order():
    """With ``|x - y|`` as cost the north-west corner rule on sorted points is optimal."""
    draw = np.random.default_rng(1)
    x, y, given, wanted = (
        np.sort(draw.random(5)),
        np.sort(draw.random(4)),
        draw.dirichlet(np.ones(5)),
        draw.dirichlet(np.ones(4)),
    )
    cost = np.abs(x[:, None] - y[None])
    plan = transport(cost, given, wanted)
    expected, left, want = np.zeros((5, 4)), given.copy(), wanted.copy()
    i = j = 0
    while i < 5 and j < 4:
        moved = min(left[i], want[j])
        expected[i, j] += moved
        left[i], want[j] = left[i] - moved, want[j] - moved
        i, j = (i + 1, j) if left[i] <= want[j] else (i, j + 1)
    assert (plan * cost).sum() == pytest.approx((expected * cost).sum(), abs=1e-8)
    assert plan.sum(1) == pytest.approx(given, abs=1e-8)
    assert plan.sum(0) == pytest.approx(wanted, abs=1e-8)


def test_each_row_of_a_matching_is_a_mean():
    """Also for a filter that did not change at all and so gets no mass."""
    draw = generator(0)
    weight = torch.randn(6, 3, 3, 3, generator=draw)
    rows = matched(weight, weight, torch.tensor([1.0, 2, 3, 0, 1, 1]))
    assert rows.sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    assert bool((rows >= 0).all())
    assert rows[3, 3] == 1


def test_the_fusion_by_hand():
    """Three layers in a chain, the first whole: ``l * D^-1 T' P A + (1 - l) * W`` from the second on."""
    draw = generator(2)
    own = {"a": torch.randn(4, 2, 3, 3, generator=draw), "b": torch.randn(5, 4, 3, 3, generator=draw)}
    own["c"] = torch.randn(3, 5, 1, 1, generator=draw)
    changes = {name: torch.rand(weight.shape, generator=draw) for name, weight in own.items()}
    keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in own.items()}
    keep["b"][[1, 3]] = False
    found = fuse(own, WeightMask(keep), changes, {"a": None, "b": "a", "c": "b"}, fusion=0.3)
    assert list(found) == ["b", "c"]
    previous = np.eye(4)
    for name in ("b", "c"):
        pruned, weight = ((own[name] * k).double().numpy() for k in (keep[name], 1))
        n, mass = len(weight), changes[name].double().sum((1, 2, 3)).numpy()
        mass = mass / mass.sum()
        cost = np.array([[np.linalg.norm(p - w) for w in weight] for p in pruned])
        plan = transport(cost, np.full(n, 1 / n), mass)
        aligned = np.zeros_like(pruned)
        for o in range(n):
            for j in range(weight.shape[1]):
                for i in range(weight.shape[1]):
                    aligned[o, j] += pruned[o, i] * previous[i, j]
        expected = np.zeros_like(weight)
        for k in range(n):
            expected[k] = 0.7 * weight[k] + 0.3 * sum(plan[o, k] / mass[k] * aligned[o] for o in range(n))
        assert found[name].numpy() == pytest.approx(expected, abs=1e-5)
        previous = plan / mass


def test_unlearning_noise_by_hand(tiny, images):
    model = tiny()
    found = unlearn_noise(model, images, iterations=3, lr=0.05, batch_size=16, on_step=None, generator=generator(6))
    hand, random = deepcopy(model).train(), generator(6)
    speed = {name: torch.zeros_like(p) for name, p in hand.named_parameters()}
    with seeded(random):
        for _ in range(3):
            x = torch.rand(16, 1, 12, 12, generator=random)
            y = torch.randint(3, (16,), generator=random)
            slopes = torch.autograd.grad(F.cross_entropy(hand(x), y), list(hand.parameters()))
            with torch.no_grad():
                for (name, parameter), slope in zip(hand.named_parameters(), slopes, strict=True):
                    speed[name] = 0.9 * speed[name] + slope
                    parameter += 0.05 * speed[name]
    for name, value in hand.state_dict().items():
        assert torch.allclose(found.state_dict()[name].float(), value.float(), atol=1e-4), name


def test_the_share_follows_from_the_accuracy_and_only_convolutions_change(trained, images):
    steps = []
    repaired = otbr(
        trained, images, drop=0.1, **QUICK, on_step=lambda step, of: steps.append((step, of)), generator=generator(1)
    )
    assert steps[-1] == (5, 5)
    rates = [candidate.holdout.value for candidate in repaired.path]
    crossed = [rates[0] - rate > 0.1 + 1e-9 for rate in rates]
    assert crossed[-1]
    assert not any(crossed[:-1])
    assert repaired.mask is None
    assert repaired.log["filters_zeroed"] == repaired.path[-2].removed > 0
    before, after = trained.state_dict(), repaired.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {f"net.conv{i}.weight" for i in (1, 2, 3, 4)}


def test_matchings_follow_the_data():
    with seeded(generator(0)):
        net = build("resnet20", width=4, classes=3, in_channels=1)
    before = fusible(net, (1, 12, 12))
    chain = [name for name in before if before[name] is not None]
    order = list(before)
    assert order[0] not in chain
    assert all(before[name] == order[order.index(name) - 1] for name in chain)
    assert len(chain) == len(order) - 1


@pytest.mark.parametrize(
    ("setting", "value"), [("iterations", 0), ("lr", 0.0), ("fusion", 1.1), ("drop", -0.1), ("batch_size", 0)]
)
def test_settings_out_of_range(setting, value, tiny, images):
    with pytest.raises(MethodError, match=rf"^{setting} must lie in"):
        otbr(tiny(), images, **{setting: value}, generator=generator(0))


def test_refusals():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MethodError, match=r"^this network has no convolution whose filters could be reset"):
        otbr(net, make_images(6, 0), generator=generator(0))
