"""Attacks that need the gradients of a surrogate network: what it must be able to do, and what is made with it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import nn

from secateur.errors import DataError, MethodError
from secateur.measure import evaluate
from secateur.models import core
from secateur.poison import label_consistent, low_frequency, trojannn
from secateur.poison.common import edited
from secateur.poison.surrogate import _adversarial, clip, train_surrogate
from secateur.poison.trojannn import NEURONS, _connected, _features
from secateur.state import generator, seeded
from secateur.types import ImageSet, Poisoning, to_float

ATTACKS = {"label-consistent": label_consistent, "low-frequency": low_frequency, "trojannn": trojannn}
QUICK = {"surrogate_images": 64, "surrogate_epochs": 1}


def noise(n: int = 60, classes: int = 4, shape: tuple[int, int, int] = (3, 8, 10)) -> ImageSet:
    x = torch.randint(1, 255, (n, *shape), generator=generator(9)).to(torch.uint8)  # neither black nor white
    return ImageSet(x, torch.arange(n) % classes, tuple("abcdef"[:classes]), "noise")


def attack(name: str, data: ImageSet, **settings) -> Poisoning:
    return ATTACKS[name](data, generator=generator(3), **{**QUICK, **settings})


def untrained_attack(name: str, data: ImageSet, **settings) -> Poisoning:
    """With a surrogate that has learned nothing, where only pixels and labels matter."""
    return attack(name, data, surrogate_epochs=0, **settings)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def signs(pattern: torch.Tensor) -> list[list[str]]:
    """Each row of an image of one channel, with + - and . for 0."""
    return ["".join("-.+"[1 + int(value)] for value in row) for row in pattern.sign()]


@pytest.fixture(scope="module")
def known(images):
    """A surrogate that has learned the bars."""
    return train_surrogate(images, images=240, epochs=10, generator=generator(0))


@pytest.fixture
def with_known(known, monkeypatch):
    """Let all attacks use that one."""
    for attack in ATTACKS.values():
        monkeypatch.setattr(sys.modules[attack.__module__], "train_surrogate", lambda *_, **__: known)
    return known


# --- the surrogate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 8.0])
def test_a_surrogate_learns_what_the_images_show(eps, images, bars):
    model = train_surrogate(images, images=240, epochs=10, eps=eps, generator=generator(1))
    assert evaluate(model, bars(120, 2)).accuracy.value > 0.9  # chance is a third


def test_a_surrogate_is_a_fixed_network_whose_images_get_gradients(known):
    assert not any(module.training for module in known.modules())
    assert not any(parameter.requires_grad for parameter in known.parameters())
    x = torch.rand(2, 1, 12, 12, generator=generator(0), requires_grad=True)
    known(x).logsumexp(1).sum().backward()
    assert float(x.grad.abs().min()) > 0
    assert all(parameter.grad is None for parameter in known.parameters())


@pytest.mark.parametrize("eps", [0.0, 8.0])
def test_a_surrogate_depends_on_its_generator_only(eps):
    data, weights = noise(), []
    before, state = data.sha256, torch.get_rng_state()
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # elsewhere in the global stream
        moved = torch.get_rng_state()
        weights.append(train_surrogate(data, images=40, epochs=1, eps=eps, generator=generator(seed)).state_dict())
        assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)
    one, two, other = weights
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["net.conv1.weight"], other["net.conv1.weight"])
    assert data.sha256 == before


def test_a_surrogate_sees_as_many_different_images_as_said_and_their_colours(monkeypatch):
    data, seen = noise(60), []
    module = sys.modules[train_surrogate.__module__]
    monkeypatch.setattr(module, "train", lambda model, given, *_, **__: (seen.append((model, given)), model)[1])
    for images in (25, 1000):
        train_surrogate(data, images=images, epochs=1, generator=generator(0))
    for (model, given), count in zip(seen, (25, 60), strict=True):
        places = [(data.x == image).flatten(1).all(dim=1).nonzero().item() for image in given.x]
        assert len(set(places)) == len(given) == count
        assert torch.equal(given.y, data.y[places])
        pixels = to_float(given.x)
        torch.testing.assert_close(model.mean, pixels.mean((0, 2, 3)).view(3, 1, 1))
        torch.testing.assert_close(model.std, pixels.std((0, 2, 3), correction=0).view(3, 1, 1))


@pytest.mark.parametrize(("x", "centre", "nearest"), [
    (0.7, 0.5, 0.625), (0.3, 0.5, 0.375), (0.55, 0.5, 0.55), (1.25, 0.9375, 1.0), (-1.0, 0.0625, 0.0), (0.5, 0.0, 0.125),
])  # fmt: skip
def test_clipping_gives_the_nearest_image_in_reach(x, centre, nearest):
    found = clip(torch.tensor([[x]]), torch.tensor([[centre]]), 0.125)
    assert found.item() == pytest.approx(nearest, abs=1e-7)


def test_the_adversarial_loss_is_that_of_half_a_batch_moved_uphill():
    """On a linear network, whose loss rises along one sign for each class: by a quarter of the bound at least."""
    model, eps = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 0.1
    model[1].weight.data = torch.randn(2, 12, generator=generator(1))
    x = 0.3 + 0.4 * torch.rand(6, 3, 2, 2, generator=generator(2))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[3:] = 1 - y[3:]  # where the loss is large already, which must not count
    uphill = (model[1].weight[1 - y] - model[1].weight[y]).sign().view(6, 3, 2, 2)
    least, most = (loss(model, (x + share * eps * uphill)[:3], y[:3]) for share in (0.25, 1.0))
    found = set()
    for seed in range(5):
        with seeded(generator(seed)):
            found.add(_adversarial(eps)(model, x, y).item())
    assert least < min(found) < max(found) < most


@pytest.mark.parametrize(("settings", "message"), [
    ({"images": 1}, r"surrogate_images must lie in \[2, 2147483648\], got 1"),
    ({"epochs": -1}, r"surrogate_epochs must lie in \[0, 100000\], got -1"),
    ({"eps": 256}, r"surrogate_eps must lie in \[0, 255\], got 256"),
    ({"eps": -1}, r"surrogate_eps must lie in \[0, 255\], got -1"),
])  # fmt: skip
def test_settings_of_the_surrogate_out_of_range(settings, message):
    with pytest.raises(MethodError, match=f"^{message}$"):
        train_surrogate(noise(), generator=generator(0), **{"images": 2, "epochs": 0, **settings})


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("n", "shape", "error", "message"), [
    (0, (3, 8, 10), DataError, "the surrogate needs at least two images, got 0"),
    (1, (3, 8, 10), DataError, "the surrogate needs at least two images, got 1"),
    (60, (3, 9, 7), MethodError, r"the surrogate needs images of at least 8x8 pixels, got \(3, 9, 7\); choose another attack"),
])  # fmt: skip
def test_images_that_no_surrogate_can_learn_from(name, n, shape, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        attack(name, noise(n, shape=shape), rate=0, **({"size": 3} if name == "trojannn" else {}))


# --- label-consistent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("corners", "rows"), [
    ("all", ["+--....--+", "-+-....-+-", "+-+....+-+", "..........", "..........", "+--....--+", "-+-....-+-", "+-+....+-+"]),
    ("bottom-right", [".........."] * 5 + [".......--+", ".......-+-", ".......+-+"]),
])  # fmt: skip
@pytest.mark.parametrize("amplitude", [255.0, 64.0])
def test_the_pattern_in_the_corners(corners, rows, amplitude):
    trigger = untrained_attack("label-consistent", noise(), rate=0, corners=corners, amplitude=amplitude).trigger
    pattern = trigger.tensors["pattern"]
    assert [signs(channel) for channel in pattern] == [rows] * 3
    assert torch.equal(pattern, amplitude / 255 * pattern.sign())
    assert torch.equal(pattern.flip(2), pattern) == (corners == "all")


@pytest.mark.parametrize(("eps", "steps"), [(16.0, 10), (6.0, 1)])
def test_only_the_target_class_is_changed_and_within_the_bound(eps, steps):
    data = noise()
    poisoning = untrained_attack("label-consistent", data, target=2, eps=eps, steps=steps, amplitude=0)
    change = (poisoning.data.x.int() - data.x.int()).abs().flatten(1).amax(1)
    assert torch.equal(change > 0, poisoning.poisoned)
    assert set(change[poisoning.poisoned].tolist()) == {eps}
    assert data.y[poisoning.poisoned].tolist() == [2] * 8  # a half of 15, to even
    assert torch.equal(poisoning.data.y, data.y)


def test_the_perturbation_hides_the_target_class_from_the_surrogate(images, with_known):
    hard = attack("label-consistent", images, rate=1, target=1, eps=32, amplitude=0)
    x, changed, y = to_float(images.x[hard.poisoned]), to_float(hard.data.x[hard.poisoned]), images.y[hard.poisoned]
    with torch.no_grad():
        before, after = (F.cross_entropy(with_known(shown), y, reduction="none") for shown in (x, changed))
    assert bool((after > before).all())
    assert float(after.mean()) > 1 > 0.1 > float(before.mean())
    weak = attack("label-consistent", images, rate=1, target=1, eps=4, amplitude=0)
    assert float(before.mean()) < loss(with_known, to_float(weak.data.x[weak.poisoned]), y) < float(after.mean())


def test_the_pattern_lies_on_top_of_the_perturbation():
    data = noise()
    bare, full = (untrained_attack("label-consistent", data, amplitude=amplitude) for amplitude in (0.0, 100.0))
    assert torch.equal(bare.poisoned, full.poisoned)
    pattern = 100 * full.trigger.tensors["pattern"].sign()
    expected = (bare.data.x[bare.poisoned] + pattern).clamp(0, 255)
    assert torch.equal(full.data.x[full.poisoned].float(), expected)


def test_the_attack_shows_the_pattern_alone():
    data = noise()
    poisoning = untrained_attack("label-consistent", data, amplitude=255)
    pattern = poisoning.trigger.tensors["pattern"][0]
    expected = data.x.clone()
    expected[:, :, pattern > 0], expected[:, :, pattern < 0] = 255, 0
    assert torch.equal(edited(data.x, poisoning.trigger.apply), expected)


# --- low frequency ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [16.0, 7.3, 255.0])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_largest_change_is_exactly_the_bound(eps, steps):
    pattern = untrained_attack("low-frequency", noise(), eps=eps, steps=steps).trigger.tensors["pattern"]
    assert pattern.abs().max() == torch.tensor(eps / 255)


@pytest.mark.parametrize("bands", [1, 3, 8])
@pytest.mark.parametrize("steps", [0, 3])
def test_only_the_lowest_frequencies_are_there(bands, steps):
    poisoning = untrained_attack("low-frequency", noise(), bands=bands, steps=steps)
    found = abs(dctn(poisoning.trigger.tensors["pattern"].double().numpy(), axes=(1, 2), norm="ortho"))
    assert (found[:, :bands, :bands] > 1e-4).mean() > 0.9
    found[:, :bands, :bands] = 0
    assert found.max() < 1e-6


@pytest.mark.parametrize("target", [0, "next"])
def test_steps_bring_the_surrogate_nearer_to_the_target(target, images, bars, with_known):
    """Also on images that the attacker does not have, which count in the order given."""
    found = []
    for steps in (0, 40):
        trigger = attack("low-frequency", images, rate=0.2, target=target, eps=64, steps=steps).trigger
        test = bars(120, 2)
        test = test.subset(trigger.eligible(test.y).nonzero().flatten())
        found.append(loss(with_known, trigger.apply(to_float(test.x)), trigger.labels(test.y)))
    assert found[1] < 0.75 * found[0]


def test_all_to_all_moves_each_class_on(images, with_known):
    poisoning = attack("low-frequency", images, rate=1, target="next", steps=2)
    assert bool(poisoning.poisoned.all())
    assert torch.equal(poisoning.data.y, (images.y + 1) % 3)


@pytest.mark.parametrize("name", ["low-frequency", "trojannn"])
def test_only_sources_are_poisoned_with_what_the_trigger_shows(name):
    data = noise()
    settings = {"size": 3} if name == "trojannn" else {}
    poisoning = untrained_attack(name, data, rate=0.3, target=1, sources=[2, 3], steps=2, **settings)
    assert int(poisoning.poisoned.sum()) == 18
    assert set(data.y[poisoning.poisoned].tolist()) == {2, 3}
    assert set(poisoning.data.y[poisoning.poisoned].tolist()) == {1}
    shown = edited(data.x[poisoning.poisoned], poisoning.trigger.apply)
    assert torch.equal(poisoning.data.x[poisoning.poisoned], shown)
    assert torch.equal(poisoning.data.x[~poisoning.poisoned], data.x[~poisoning.poisoned])


def test_only_images_to_be_moved_give_gradients(monkeypatch):
    module, seen = sys.modules[low_frequency.__module__], []
    monkeypatch.setattr(module, "_perturbation", lambda _, data, *__: (seen.append(data.y), torch.zeros(data.shape))[1])
    for settings in ({"target": 1}, {"target": 1, "sources": [1, 2]}, {"target": "next"}):
        untrained_attack("low-frequency", noise(), **settings)
    assert [sorted(set(y.tolist())) for y in seen] == [[0, 2, 3], [2], [0, 1, 2, 3]]


def test_without_images_to_move_there_is_no_perturbation():
    data = noise()
    with pytest.raises(MethodError, match="needs images that it may move, got none: all are of the target"):
        untrained_attack("low-frequency", replace(data, y=torch.zeros_like(data.y)), rate=0)


# --- TrojanNN -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "top", "left"), [
    ("bottom-right", 3, 5), ("bottom-left", 3, 2), ("top-right", 2, 5), ("top-left", 2, 2),
])  # fmt: skip
def test_the_patch_lies_exactly_where_said(place, top, left):
    data = noise()  # 8 x 10 pixels
    poisoning = untrained_attack("trojannn", data, rate=0.7, place=place, size=3, margin=2, steps=1)
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[top : top + 3, left : left + 3] = True
    pattern = poisoning.trigger.tensors["pattern"]
    assert torch.equal(poisoning.trigger.tensors["mask"], inside.float()[None])
    assert bool((pattern[:, ~inside] == 0).all())
    assert 0 <= float(pattern.min()) <= float(pattern.max()) <= 1
    expected = data.x[poisoning.poisoned].clone()
    expected[:, :, inside] = (255 * pattern[:, inside]).round().to(torch.uint8)
    assert torch.equal(poisoning.data.x[poisoning.poisoned], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_opacity_by_formula_within_rounding(alpha):
    data = noise()
    poisoning = untrained_attack("trojannn", data, size=8, margin=0, alpha=alpha, steps=2)
    before, after = (found.x[poisoning.poisoned, :, :, 2:].double() for found in (data, poisoning.data))
    pattern = poisoning.trigger.tensors["pattern"][:, :, 2:].double()
    assert float((after - (1 - alpha) * before - alpha * 255 * pattern).abs().max()) <= 0.5 + 1e-3


def test_connection_strength_is_what_single_features_cause(known):
    """The whole response of each channel to one feature of the layer below at a time, through convolution and batch-norm."""
    net = core(known)
    single = torch.zeros(NEURONS + 1, NEURONS, 5, 5)
    single[torch.arange(NEURONS), torch.arange(NEURONS), 2, 2] = 1
    with torch.no_grad():
        response = net.bn4(net.conv4(single)).double()
    caused = (response[:-1] - response[-1]).abs().sum((0, 2, 3))
    torch.testing.assert_close(_connected(known).double(), caused, rtol=1e-4, atol=1e-4)


def test_features_are_what_the_last_layer_sees(known, images):
    x, net = to_float(images.x[:5]), core(known)
    hooks = len(net.linear._forward_pre_hooks)
    assert torch.equal(F.linear(_features(known, x), net.linear.weight, net.linear.bias), known(x))
    assert len(net.linear._forward_pre_hooks) == hooks


@pytest.mark.parametrize("neurons", [1, 3])
def test_the_patch_excites_the_best_connected_neurons(neurons, images, bars, with_known):
    chosen = _connected(with_known).argsort(descending=True)[:neurons]
    x, found = to_float(bars(60, 2).x), []
    for steps, value in ((0, 100.0), (40, 100.0), (40, 0.0)):
        trigger = attack("trojannn", images, steps=steps, value=value, neurons=neurons).trigger
        found.append(float(_features(with_known, trigger.apply(x))[:, chosen].mean()))
    random, excited, calmed = found
    assert excited > 1.5 * random
    assert calmed < 0.9 * random


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("label-consistent", {"target": "next"}, r"the target must be one class, because no label changes, got next; give a label"),
    ("label-consistent", {"target": 4}, r"target must lie in \[0, 3\], got 4"),
    ("label-consistent", {"rate": 1.1}, r"rate must lie in \[0, 1\], got 1.1"),
    ("label-consistent", {"eps": math.nan}, r"eps must lie in \[0, 255\], got nan"),
    ("label-consistent", {"eps": 256}, r"eps must lie in \[0, 255\], got 256"),
    ("label-consistent", {"steps": 0}, r"steps must lie in \[1, 100000\], got 0"),
    ("label-consistent", {"amplitude": -1}, r"amplitude must lie in \[0, 255\], got -1"),
    ("label-consistent", {"corners": "bottom-rigt"}, r"unknown corners 'bottom-rigt'; did you mean 'bottom-right'\?"),
    ("low-frequency", {"rate": 0.8}, r"rate must be at most 0.750 \(the eligible share\), got 0.8"),
    ("low-frequency", {"sources": [4]}, r"sources must lie in \[0, 3\], got 4"),
    ("low-frequency", {"eps": -1}, r"eps must lie in \[0, 255\], got -1"),
    ("low-frequency", {"bands": 0}, r"bands must lie in \[1, 8\], got 0"),
    ("low-frequency", {"bands": 9}, r"bands must lie in \[1, 8\], got 9"),
    ("low-frequency", {"steps": -1}, r"steps must lie in \[0, 100000\], got -1"),
    ("trojannn", {"target": -1}, r"target must lie in \[0, 3\], got -1"),
    ("trojannn", {"margin": 8}, r"margin must lie in \[0, 7\], got 8"),
    ("trojannn", {"margin": -1}, r"margin must lie in \[0, 7\], got -1"),
    ("trojannn", {"size": 0}, r"size must lie in \[1, 7\], got 0"),
    ("trojannn", {"size": 6, "margin": 3}, r"size must lie in \[1, 5\], got 6"),
    ("trojannn", {"place": "centre"}, r"unknown place 'centre'; did you mean 'center'"),
    ("trojannn", {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    ("trojannn", {"neurons": 0}, r"neurons must lie in \[1, 96\], got 0"),
    ("trojannn", {"neurons": 97}, r"neurons must lie in \[1, 96\], got 97"),
    ("trojannn", {"value": -1}, r"value must lie in \[0, 1000000\], got -1"),
    ("trojannn", {"steps": -1}, r"steps must lie in \[0, 100000\], got -1"),
])  # fmt: skip
def test_out_of_range(name, settings, message):
    with pytest.raises(MethodError, match=f"^{message}"):
        attack(name, noise(), **settings)
