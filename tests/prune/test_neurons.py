"""Factors on neurons: what they do to a network, how they are learned, and which neurons are cut by them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.errors import MethodError
from secateur.measure import correct
from secateur.prune import apply_mask
from secateur.prune.neurons import Neurons, cut_lowest, growing, learn
from secateur.state import generator
from secateur.types import Scores, SoftMask, WeightMask, to_float


def factors_of(neurons: Neurons, seed: int) -> dict[str, torch.Tensor]:
    draw = generator(seed)
    return {site: torch.rand(size, generator=draw) for site, size in neurons.sizes.items()}


def test_factors_scale_weights_and_biases(tiny, images):
    model, x = tiny(), to_float(images.x[:20])
    neurons = Neurons(model, images.shape)
    assert neurons.sizes == {f"bn{i}": model.net.get_submodule(f"bn{i}").num_features for i in (1, 2, 3, 4)}
    factors = factors_of(neurons, 0)
    neurons.network.eval()
    with torch.no_grad():
        both = neurons(x, factors, factors)
        assert torch.allclose(both, apply_mask(model, SoftMask(factors))(x), atol=1e-6)
        alone = neurons(x, factors)
        for site, factor in factors.items():
            model.net.get_submodule(site).weight.mul_(factor)
        assert torch.allclose(alone, model(x), atol=1e-6)
        assert not torch.allclose(alone, both, atol=1e-3)


def test_a_layer_without_a_norm_is_a_site_itself(images):
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(500, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    neurons = Neurons(net.eval(), images.shape)
    assert neurons.sizes == {"0": 5, "3": 4}
    assert neurons.biased == ("0",)
    x, factors = to_float(images.x[:9]), factors_of(neurons, 1)
    with torch.no_grad():
        expected = apply_mask(net, SoftMask(factors))(x)
        assert torch.allclose(neurons(x, factors, {"0": factors["0"]}), expected, atol=1e-6)
        net[0].weight.mul_(factors["0"].reshape(-1, 1, 1, 1))
        assert torch.allclose(neurons(x, {"0": factors["0"]}), net(x), atol=1e-6)


def test_a_network_with_answers_alone_has_none(images):
    with pytest.raises(MethodError, match=r"^this network has no neurons besides its answers"):
        Neurons(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), images.shape)


def test_learning_is_sgd_with_momentum_within_bounds():
    factors = {"a": torch.tensor([1.0, 1.0, 1.0])}
    goal, x, y = torch.tensor([-2.0, 0.5, 3.0]), torch.zeros(1), torch.zeros(1)
    steps = []
    scores = learn(
        factors, lambda x, y: (factors["a"] - goal).square().sum() / 2, [(x, y)] * 6, lr=0.1, on_step=steps.append,
        generator=generator(0),
    )  # fmt: skip
    value, speed, seen = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for _ in range(6):
        for i in range(3):
            speed[i] = 0.9 * speed[i] + value[i] - float(goal[i])
            value[i] = min(1.0, max(0.0, value[i] - 0.1 * speed[i]))
            seen[i] += value[i] / 6
    assert factors["a"].tolist() == pytest.approx(value)
    assert scores.values["a"].tolist() == pytest.approx(seen)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not factors["a"].requires_grad


@pytest.mark.parametrize("edit", ["weight", "weight+bias"])
def test_the_lowest_are_cut_until_it_costs_too_much(edit, trained, images):
    draw = generator(2)
    sizes = Neurons(trained, images.shape).sizes
    values = {site: torch.rand(size, generator=draw) for site, size in sizes.items()}
    values["bn1"][0] = 1.0
    order = sorted((float(v), site, i) for site, vs in values.items() for i, v in enumerate(vs) if v < 1)
    repaired = cut_lowest(trained, images, Scores(values, "channel"), drop=0.1, edit=edit)
    before, expected = int(correct(trained, images).sum()), 0
    for count in range(1, len(order) + 1):  # every count is tried as long as a tenth rounds to no neuron or one
        model = apply_mask(trained, WeightMask({}))
        for _, site, i in order[:count]:
            model.net.get_submodule(site).weight.data[i] = 0
            if edit == "weight+bias":
                model.net.get_submodule(site).bias.data[i] = 0
        if before - int(correct(model, images).sum()) > 0.1 * len(images):
            break
        expected = count
    assert 0 < expected < 15
    assert repaired.log["removed"] == expected
    assert repaired.log["largest_cut"] == pytest.approx(order[expected - 1][0])
    for site, vs in values.items():
        gone = torch.tensor([(float(v), site, i) in order[:expected] for i, v in enumerate(vs)])
        norm, old = repaired.model.net.get_submodule(site), trained.net.get_submodule(site)
        assert torch.equal(norm.weight, old.weight.masked_fill(gone, 0))
        assert torch.equal(norm.bias, old.bias.masked_fill(gone, 0) if edit == "weight+bias" else old.bias)


def test_nothing_speaks_against_a_score_of_one(trained, images):
    ones = Neurons(trained, images.shape).filled(1.0)
    repaired = cut_lowest(trained, images, Scores(ones, "channel"), drop=1.0)
    assert repaired.log["removed"] == 0
    assert len(repaired.path) == 1


def test_a_small_set_gives_a_note(trained):
    few = make_images(9, 3)
    scores = {site: torch.linspace(0, 0.9, size) for site, size in Neurons(trained, few.shape).sizes.items()}
    repaired = cut_lowest(trained, few, Scores(scores, "channel"), drop=0.0)
    assert any("cannot be resolved on 9 clean images" in note for note in repaired.notes)


def test_group_norms_get_gradients(images):
    """In channels-last memory this very pass crashes the process."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 3)).eval()
    neurons = Neurons(net, images.shape)
    factors = {site: factor.requires_grad_() for site, factor in neurons.filled(1.0).items()}
    x = to_float(images.x[:16]).contiguous(memory_format=torch.channels_last)
    slopes = torch.autograd.grad(neurons(x, factors).square().sum(), list(factors.values()))
    assert all(bool(slope.isfinite().all()) and bool(slope.any()) for slope in slopes)


def test_numbers_to_try_grow_by_one_or_a_tenth():
    assert growing(0) == [0]
    assert growing(5) == [0, 1, 2, 3, 4, 5]
    tried = growing(1000)
    assert (tried[0], tried[-1]) == (0, 1000)
    steps = [(before, after - before) for before, after in itertools.pairwise(tried[:-1])]
    assert all(step == max(1, round(1.1 * before) - before) for before, step in steps)
