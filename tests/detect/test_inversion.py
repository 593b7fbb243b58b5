"""Inverted triggers: the projections, the stamps and the outlier rule against plain recomputation; a backdoor is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.data import holdout, load_trigger, sample, save_trigger
from secateur.detect import Inverted, invert, strengthen, suspected
from secateur.detect.inversion import to_budget
from secateur.errors import DataError, MethodError
from secateur.measure import evaluate, wilson
from secateur.state import generator
from secateur.types import Trigger, to_float

KINDS = ["patch", "sparse", "dense", "smooth"]


def found(sizes, kind="sparse", success=1.0):
    trigger = Trigger("add", {}, {"pattern": torch.zeros(1, 2, 2)}, 0)
    rate = wilson(round(100 * success), 100)
    return [Inverted(target, kind, trigger, size, rate, success) for target, size in enumerate(sizes)]


@pytest.mark.parametrize("top", [1.0, math.inf])
def test_the_projection_is_the_nearest_point_within_the_budget(top, gen):
    values = 2 * torch.rand(20, 9, generator=gen) - 0.4
    budget = torch.linspace(0.1, 6, 20)
    nearest = to_budget(values, budget, top)
    assert float(nearest.min()) >= 0
    assert float(nearest.max()) <= top
    assert bool((nearest.sum(1) <= budget + 1e-4).all())
    for row, point, most in zip(values.numpy(), nearest.numpy(), budget.tolist(), strict=True):
        inside = np.clip(row, 0, top)
        if inside.sum() <= most:
            assert point == pytest.approx(inside)
            continue
        grid = np.linspace(0, row.max(), 20_001)
        sums = np.clip(row[None] - grid[:, None], 0, top).sum(1)
        assert point == pytest.approx(np.clip(row - grid[np.abs(sums - most).argmin()], 0, top), abs=2e-4)


def low_pass(image):
    """Keep the lowest 5 of 12 frequencies each way, by the cosine transform written out."""
    side = np.arange(12)
    waves = np.array([np.sqrt((1 if k == 0 else 2) / 12) * np.cos(np.pi * k * (2 * side + 1) / 24) for k in side])
    coefficients = waves @ image @ waves.T
    coefficients[5:] = 0
    coefficients[:, 5:] = 0
    return waves.T @ coefficients @ waves


@pytest.mark.parametrize("kind", ["dense", "smooth"])
def test_the_first_step_follows_the_loss_of_the_other_classes(kind, victim):
    """Adam's first step is the gradient in units of its own size; images of the target have no say."""
    several = invert(victim.model, victim.clean, kind=kind, steps=1, generator=generator(4))
    random = generator(4)
    fitted, _ = holdout(victim.clean, 0.2, generator=random)
    [(x, y)] = sample(fitted, 32, 1, generator=random)
    for each in several:
        change = torch.zeros(1, *victim.clean.shape, requires_grad=True)
        others = x[y != each.target]
        logits = victim.model((others + change).clamp(0, 1))
        loss = torch.nn.functional.cross_entropy(logits, torch.full((len(others),), each.target))
        [slope] = torch.autograd.grad(loss, change)
        if kind == "smooth":
            slope = torch.from_numpy(low_pass(slope[0, 0].double().numpy())).float()[None, None]
        expected = -0.2 * 0.07 * slope[0] / slope.square().mean().sqrt()
        assert torch.allclose(each.trigger.tensors["pattern"], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_success_are_those_of_the_trigger(kind, victim):
    """The trigger's norm is its size, and it does on other images what was measured on those held out."""
    several = invert(victim.model, make_images(240, 7), kind=kind, steps=40, generator=generator(0))
    assert [each.target for each in several] == [0, 1, 2]
    for each in several:
        tensors = {name: value.double() for name, value in each.trigger.tensors.items()}
        if kind == "patch":
            size = float(tensors["mask"].sum())
        elif kind == "sparse":
            size = float(tensors["pattern"].square().sum(0).sqrt().sum())
        else:
            size = float(tensors["pattern"].square().mean().sqrt())
        assert size <= each.size * (1 + 1e-4)
        assert each.success.n == 32  # a fifth of 240 images, less those of the target
        measured = evaluate(victim.model, make_images(240, 8), trigger=each.trigger).attack_success
        assert measured.value == pytest.approx(each.success.value, abs=0.2)
        assert each.weakest <= each.success.value


class Planted(nn.Module):
    """A network with one more term: a bright corner means class 2, which no clean image shows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 20 * x[:, :, 0, 0] ** 3 * torch.tensor([0.0, 0, 1])


def test_a_planted_backdoor_is_found(trained):
    several = invert(Planted(trained), make_images(240, 7), steps=100, batch_size=16, generator=generator(0))
    verdict = suspected(several, anomaly=0)
    assert verdict.flagged == (2,)
    assert several[2].success.value > 0.6
    change = several[2].trigger.tensors["pattern"][0].abs()
    assert int(change.argmax()) == 0
    assert float(change[0, 0]) > 0.6 * float(change.sum())
    [honest] = invert(trained, make_images(240, 7), [2], steps=100, batch_size=16, generator=generator(0))
    assert several[2].size < 0.4 * honest.size


def test_strengthening_keeps_to_the_size_and_lowers_the_loss(victim):
    clean = make_images(240, 7)
    for kind in KINDS:
        [one] = invert(victim.model, clean, [1], kind=kind, steps=20, generator=generator(0))
        more = strengthen(victim.model, clean, one, 2.0, steps=20, generator=generator(0))
        assert more.size == pytest.approx(2 * one.size)
        assert more.success.value >= one.success.value
        assert (more.target, more.kind) == (1, kind)

        def loss(trigger):
            with torch.inference_mode():
                logits = victim.model(trigger.apply(to_float(clean.x[clean.y != 1])))
            return float(torch.nn.functional.cross_entropy(logits, torch.ones(len(logits), dtype=torch.int64)))

        assert loss(more.trigger) < loss(one.trigger)


def test_a_trigger_can_be_saved(victim, tmp_path):
    for kind in KINDS:
        [one] = invert(victim.model, victim.clean, [1], kind=kind, steps=5, generator=generator(0))
        save_trigger(one.trigger, tmp_path / kind)
        assert load_trigger(tmp_path / kind).target == 1


def test_classes_do_not_touch_one_another(victim):
    """Each class's trigger is the one it would get alone: the batch is the same, and so is every step."""
    together = invert(victim.model, victim.clean, kind="sparse", steps=6, generator=generator(0))
    for each in together:
        [alone] = invert(victim.model, victim.clean, [each.target], kind="sparse", steps=6, generator=generator(0))
        assert torch.allclose(alone.trigger.tensors["pattern"], each.trigger.tensors["pattern"], atol=1e-5)
        assert alone.size == pytest.approx(each.size)


def test_model_and_random_state_are_left_alone(victim):
    model = victim.model
    model.train()
    model.net.linear.weight.requires_grad_(False)
    rng = torch.get_rng_state()
    first, second = (invert(model, victim.clean, [0], steps=3, generator=generator(1)) for _ in range(2))
    assert torch.equal(first[0].trigger.tensors["pattern"], second[0].trigger.tensors["pattern"])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not model.net.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    model.net.linear.weight.requires_grad_(True)
    model.eval()


def test_the_outlier_rule():
    sizes = [10.0, 11, 4, 9, 12, 10, 13, 9.5, 11, 12]
    logs = np.log(sizes)
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    verdict = suspected(found(sizes), shortcut=1.4, anomaly=2)
    assert verdict.flagged == (2,)
    assert verdict.shortcut[2] == pytest.approx(9 / 4)
    assert verdict.anomaly[2] == pytest.approx((np.median(logs) - logs[2]) / spread)
    assert suspected(found(sizes), shortcut=2.26).flagged == ()
    assert suspected(found(sizes), anomaly=verdict.anomaly[2] + 0.01).flagged == ()
    assert suspected(found(sizes, success=0.4)).flagged == ()


def test_two_targets_and_no_target():
    assert suspected(found([10.0, 3, 4, 9, 12, 10, 13, 9.5, 11, 12])).flagged == (1, 2)
    smooth = suspected(found([8.0, 7, 9, 10, 12, 10, 13, 9.5, 11, 12]))
    assert smooth.flagged == ()
    assert smooth.ranking[0] == 1
    assert suspected(found([5.0, 5, 4]), shortcut=1, anomaly=0).flagged == (2,)
    assert suspected(found([5.0, 5, 5]), shortcut=1, anomaly=0).flagged == ()


def test_the_strongest_kind_speaks_for_a_class():
    verdict = suspected(found([10.0, 11, 4, 9, 12, 10]) + found([0.2, 0.2, 0.2, 0.21, 0.2, 0.2], "dense"))
    assert verdict.flagged == (2,)
    assert verdict.kind[2] == "sparse"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "warp"}, r"^unknown kind 'warp'"),
        ({"precision": "int8"}, r"^unknown precision 'int8'"),
        ({"steps": 0}, r"^steps must lie in \[1, "),
        ({"batch_size": 0}, r"^batch_size must lie in \[1, "),
        ({"goal": 1.1}, r"^goal must lie in \[0, 1\]"),
        ({"targets": [3]}, r"^target must lie in \[0, 2\]"),
    ],
)
def test_out_of_range(settings, message, victim):
    targets = settings.pop("targets", None)
    with pytest.raises(MethodError, match=message):
        invert(victim.model, victim.clean, targets, **settings, generator=generator(0))


def test_refusals(victim):
    one = victim.clean.subset(victim.clean.y == 1)
    with pytest.raises(DataError, match=r"^inversion needs clean images of at least 2 classes, got 1$"):
        invert(victim.model, one, generator=generator(0))
    with pytest.raises(MethodError, match=r"^an outlier needs triggers of at least 3 classes, got 2 of kind 'sparse'$"):
        suspected(found([1.0, 2.0]))
    with pytest.raises(MethodError, match=r"^shortcut must lie in "):
        suspected(found([1.0, 2.0, 3.0]), shortcut=0.9)
    [some] = found([1.0])
    with pytest.raises(MethodError, match=r"^factor must lie in "):
        strengthen(victim.model, victim.clean, some, 0, generator=generator(0))
