"""Edits of weights, by hand: what becomes small, what is clamped, what is drawn, and what an adaptive attack then calls."""

from __future__ import annotations

import math
from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import nn

from secateur.attack import eot, pgd, through_rounding, through_wrappers
from secateur.compress import quantise
from secateur.errors import MethodError
from secateur.measure import predict
from secateur.models import wrap
from secateur.models.quantised import Backward
from secateur.prune import Resampled, adaptive, adaptives, apply_and_heal, clamp, edits, noise, small_entries, sparsify
from secateur.prune.edits import is_normal
from secateur.state import generator, seeded


def one_layer(*weights: float, bias: float = 0.0) -> nn.Module:
    net = nn.Sequential(nn.Linear(len(weights), 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([weights]))
        net[0].bias.fill_(bias)
    return net


def test_small_entries_go_and_the_border_stays():
    model = one_layer(0.5, -0.1, 0.25, -0.75, bias=0.2)
    edited = sparsify(model, below=0.25)
    assert edited.model[0].weight.tolist() == [[0.5, 0.0, 0.25, -0.75]]
    assert edited.model[0].bias.tolist() == [0.0]
    assert edited.changed == 2 / 5
    assert edited.forward is None
    assert model[0].bias.item() == pytest.approx(0.2)


def test_zeros_that_were_there_do_not_count():
    assert sparsify(one_layer(0.0, 1.0, 0.0), below=0.5).changed == 0


def test_norms_are_edited_too(tiny):
    model = tiny()
    edited = sparsify(model, below=0.7)
    gone = model.net.bn1.weight.detach().abs() < 0.7
    assert 0 < int(gone.sum()) < len(gone)
    assert torch.equal(edited.model.net.bn1.weight == 0, gone)
    assert torch.equal(edited.model.net.bn1.running_mean, model.net.bn1.running_mean)


def test_parameters_and_layers_can_be_named(tiny):
    model = tiny()
    edited = sparsify(model, below=1e3, names=["bn1", "conv2.weight"])
    zero = {name for name, p in edited.model.net.named_parameters() if not p.any()}
    assert zero == {"bn1.weight", "bn1.bias", "conv2.weight"}
    assert edited.changed == (8 + 8 * 4 * 9) / sum(p.numel() for p in model.parameters())
    with pytest.raises(MethodError, match=r"unknown parameter or layer 'linnear'; did you mean 'linear'\?"):
        sparsify(model, below=1, names=["linnear"])


def test_the_mask_of_small_entries_is_held_while_healing(tiny, images):
    model = tiny()
    mask = small_entries(model, below=0.1)
    repaired = apply_and_heal(model, images, mask, heal=None, generator=generator(0)).model
    assert torch.equal(repaired.net.conv2.weight, sparsify(model, below=0.1).model.net.conv2.weight)


def test_an_outlier_is_clamped_to_mean_plus_deviations():
    """Nine times 0 and once 10: mean 1, standard deviation of the population 3."""
    edited = clamp(one_layer(*[0.0] * 9, 10.0), deviations=2)
    assert edited.model[0].weight.tolist() == [[0.0] * 9 + [7.0]]
    assert edited.changed == 1 / 11


def gaussian(n: int) -> torch.Tensor:
    return torch.randn(n, generator=generator(0))


def bimodal(n: int) -> torch.Tensor:
    return gaussian(n) * 0.1 + torch.tensor([-1.0, 1.0]).repeat(n // 2)


def test_normality_by_hand():
    assert is_normal(gaussian(1000))
    assert not is_normal(bimodal(1000))
    assert is_normal(torch.full((1000,), 0.1))
    assert is_normal(torch.tensor([0.0] * 18 + [1e6]))


@pytest.mark.parametrize(
    ("which", "normal", "other"), [("all", True, True), ("normal", True, False), ("not-normal", False, True)]
)
def test_only_tensors_that_pass_or_fail_the_test_are_clamped(which, normal, other):
    model = nn.Sequential(nn.Linear(1000, 1, bias=False), nn.Linear(1, 1000, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(gaussian(1000)[None])
        model[1].weight.copy_(bimodal(1000)[:, None])
    edited = clamp(model, deviations=0.5, which=which)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), edited.model.parameters(), strict=True)]
    assert changed == [normal, other]


def test_a_constant_tensor_is_left_alone():
    assert clamp(one_layer(*[0.1] * 77), deviations=0).changed == 0


def test_noise_added_once_and_its_share(tiny):
    model = tiny()
    edited = noise(model, radius=0.01, generator=generator(0))
    assert edited.changed == pytest.approx(1, abs=0.001)
    assert edited.forward is None
    assert noise(model, radius=0, generator=generator(0)).changed == 0


def test_resampled_noise_is_another_one_each_time_and_the_same_from_the_same_seed(tiny):
    model, x = tiny(), torch.rand(3, 1, 12, 12)
    edited = noise(model, radius=0.05, resampled=True, generator=generator(0))
    before = {name: value.clone() for name, value in edited.model.state_dict().items()}
    answers = []
    for seed in (0, 0, 1):
        with seeded(generator(seed)):
            answers.append(torch.stack([edited.model(x), edited.model(x)]))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0][0], answers[0][1])
    assert edited.changed == 1
    assert all(torch.equal(value, before[name]) for name, value in edited.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(edited.model.parameters(), model.parameters(), strict=True))


def test_resampled_noise_stays_within_its_radius():
    """A weight of 0 times an input of 1: the answers are the noise itself."""
    edited = noise(one_layer(0.0), radius=0.5, resampled=True, names=["0.weight"], generator=generator(0))
    with seeded(generator(0)):
        drawn = torch.tensor([edited.model(torch.ones(1, 1)).item() for _ in range(2000)])
    assert float(drawn.abs().max()) <= 0.5
    assert float(drawn.abs().max()) > 0.49
    assert abs(float(drawn.mean())) < 4 * 0.5 / math.sqrt(3 * 2000)
    assert edited.changed == 1 / 2


def test_resampled_keeps_the_flags_of_submodules(tiny):
    model = tiny().train()
    model.net.bn1.eval()
    network = noise(model, radius=0.1, resampled=True, generator=generator(0)).model
    assert network.training
    assert not network.network.net.bn1.training


def test_eot_is_the_adaptive_attack_on_resampled_noise(hardened):
    """The mean over draws is attacked, and images are judged by the mean over many others."""
    edited = noise(hardened.model, radius=0.12, resampled=True, generator=generator(0))
    x, y = hardened.x[:100], hardened.y[:100]

    def robust(forward):
        adv = pgd(edited.model, x, y, eps=0.1, steps=6, forward=forward, random_start=False, generator=generator(0))
        with torch.no_grad(), seeded(generator(9)):
            mean = torch.stack([edited.model(adv).softmax(dim=1) for _ in range(30)]).mean(dim=0)
        return float((mean.argmax(dim=1) == y).float().mean())

    assert edited.forward is not None
    assert robust(edited.forward) < robust(None)
    assert not any(module._forward_hooks for module in edited.model.modules())


def test_what_is_adaptive_follows_from_what_the_network_has(tiny, monkeypatch):
    model = tiny()
    rounded = wrap(model, [{"after": "bn1", "kind": "round", "decimals": 1}])
    assert adaptive(model) is None
    assert adaptive(rounded) is through_wrappers
    made = []
    monkeypatch.setattr(edits, "eot", lambda draws, forward=None: made.append((draws, forward)) or eot(draws, forward=forward))
    noise(model, radius=0.1, resampled=True, generator=generator(0))
    noise(rounded, radius=0.1, resampled=True, generator=generator(0))
    assert made == [(edits.DRAWS, None), (edits.DRAWS, through_wrappers)]
    assert sparsify(rounded, below=0.1).forward is through_wrappers


def slope_of(model, forward, x):
    points = x.clone().requires_grad_()
    return torch.autograd.grad(forward(model, points).sum(), [points])[0]


def test_a_clamp_has_two_gradients(tiny, images):
    clamped = wrap(tiny(), [{"after": "bn1", "kind": "clamp", "low": -1.0, "high": 1.0}])
    assert adaptives(clamped) == {"passed": through_wrappers, "clamped": None}
    assert adaptive(clamped) is through_wrappers
    both = wrap(clamped, [{"after": "bn2", "kind": "round", "decimals": 1}])
    assert adaptives(both) == {"passed": through_wrappers, "clamped": through_rounding}
    x = torch.rand(2, *images.shape)
    true, passed = slope_of(both, through_rounding, x), slope_of(both, through_wrappers, x)
    assert [bool(slope.any()) for slope in (slope_of(both, lambda net, x: net(x), x), true, passed)] == [False, True, True]
    assert not torch.equal(true, passed)
    rounded = adaptives(quantise(clamped, images))
    assert set(rounded) == {f"{name}, {inner}" for name in get_args(Backward) for inner in ("passed", "clamped")}
    slopes = [slope_of(quantise(clamped, images), forward, x) for forward in rounded.values()]
    assert not any(torch.equal(one, other) for one, other in combinations(slopes, 2))


def test_edits_leave_the_network_alone(tiny, images):
    model = tiny().train()
    model.net.bn2.eval()
    model.net.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    for edited in (
        sparsify(model, below=0.1),
        clamp(model, deviations=1, which="not-normal"),
        noise(model, radius=0.1, generator=generator(0)),
        noise(model, radius=0.1, resampled=True, generator=generator(0)),
    ):
        assert isinstance(edited.model, Resampled) or [m.training for m in edited.model.modules()] == [f for f, _ in flags]
        predict(edited.model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()] == flags


def test_numbers_out_of_range(tiny):
    with pytest.raises(MethodError, match=r"below must lie in \[0, "):
        sparsify(tiny(), below=-1)
    with pytest.raises(MethodError, match="unknown which 'gaussian'"):
        clamp(tiny(), deviations=1, which="gaussian")
    with pytest.raises(MethodError, match=r"significance must lie in \[0, 1\]"):
        clamp(tiny(), deviations=1, significance=2)
