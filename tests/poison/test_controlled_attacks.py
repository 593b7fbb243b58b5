"""Attackers who control training: which images of a batch change and how, what is learned, and that a kill leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.data import load_trigger, save_trigger
from secateur.effects import Stamp, Texture
from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.poison import input_aware, lira, wanet
from secateur.poison.control import Batches, Learner, count_steps, materialise, untrained
from secateur.poison.input_aware import _Stamps, fit_mask, spread
from secateur.poison.lira import _Changes
from secateur.poison.wanet import _Warps
from secateur.state import generator, smaller_batches
from secateur.train import Recipe
from secateur.types import ImageSet, Trigger, to_float

CPU = torch.device("cpu")
ATTACKS = {
    "wanet": (wanet, {"strength": 4.0, "k": 3, "cross_ratio": 1.0}),
    "input-aware": (input_aware, {"width": 2, "mask_steps": 3, "density": 0.1}),
    "lira": (lira, {"width": 2, "eps": 0.2}),
}
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=60, augment=("flip",), schedule="triangle", milestones=(0.3,))


def noise(n: int = 100, classes: int = 4, shape: tuple[int, int, int] = (3, 8, 10)) -> ImageSet:
    x = torch.randint(1, 255, (n, *shape), generator=generator(9)).to(torch.uint8)
    return ImageSet(x, torch.arange(n) % classes, tuple("abcdef"[:classes]), "noise")


def warping(data: ImageSet, rate: float, cross_ratio: float = 0.0, **settings) -> _Warps:
    trigger = wanet(data, rate=0, strength=6, generator=generator(0), **settings).trigger
    assert trigger is not None
    return _Warps(trigger, data, rate, cross_ratio)


def net_trigger(net: str, data: ImageSet, target=0, sources=None) -> Trigger:
    channels = data.shape[0]
    if net == "stamp":
        weights = untrained(lambda: Stamp(channels, 3), generator(1))
        params = {"net": net, "channels": channels, "width": 3, "classes": len(data.classes)}
    else:
        weights = untrained(lambda: Texture(channels, 3, 0.1), generator(1))
        params = {"net": net, "channels": channels, "width": 3, "eps": 0.1, "classes": len(data.classes)}
    return Trigger("generator", params, weights, target, sources)


def changing(data: ImageSet, rate: float, *, until: int = 100, lr: float = 0.01) -> _Changes:
    return _Changes(net_trigger("texture", data), data, rate, 0, device=CPU, lr=lr, until=until)


def stamping(data: ImageSet, rate: float, cross_ratio: float, **settings) -> _Stamps:
    trigger = net_trigger("stamp", data, **settings)
    return _Stamps(trigger, data, rate, cross_ratio, device=CPU, parts=("pattern_net.",), lr=0.01, until=100)


def whole(data: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return to_float(data.x), data.y


# --- which images of a batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "cross_ratio"), [(0.001, 3.0), (0.0137, 0.5), (0.1, 2.0), (0.4, 1.4), (0.7, 0.0), (0.0, 2.0)])
def test_the_expected_shares_are_exact(rate, cross_ratio):
    data, random, draws = noise(101), generator(4), 1500
    hook = warping(data, rate, cross_ratio)
    counts = torch.tensor([[len(part) for part in hook.pick(data.y, random)] for _ in range(draws)], dtype=torch.float64)
    wanted = torch.tensor([rate * 101, cross_ratio * rate * 101], dtype=torch.float64)
    assert bool((counts >= wanted.floor()).all())
    assert bool((counts <= wanted.ceil()).all())
    share = wanted - wanted.floor()
    assert bool(((counts.mean(0) - wanted).abs() <= 4 * (share * (1 - share) / draws).sqrt() + 1e-9).all())


def test_the_share_of_a_set_holds_however_its_classes_fall_into_batches():
    """A batch with more images that may be poisoned has more of them poisoned; none has a ceiling that lowers the total."""
    data = noise(400)
    hook = warping(data, 0.24, sources=[2])  # nearly all of the one class that may be poisoned
    assert len(hook.pick(torch.tensor([2] * 50), generator(0))[0]) in (48, 49)  # each with a chance of 0.24 / 0.25
    total = 0
    for seed in range(40):
        random = generator(seed)
        order = torch.randperm(400, generator=random)
        total += sum(len(hook.pick(data.y[part], random)[0]) for part in order.split(10))
    assert total == pytest.approx(40 * 96, abs=4 * math.sqrt(40 * 40 * 0.25))


def test_every_image_has_the_same_chance_in_either_part():
    data, random = noise(20), generator(4)
    hook = warping(data, 0.3, 0.5)
    hits = torch.zeros(2, 20)
    for _ in range(2000):
        for row, part in zip(hits, hook.pick(data.y, random), strict=True):
            row[part] += 1
    able = data.y != 0
    assert bool((hits[0][~able] == 0).all())
    assert bool(((hits[0][able] / 2000 - 0.4).abs() < 0.06).all())  # 6 of 15
    # A tenth and a half on average of the 20, from those that are left: more often the target class, never poisoned.
    assert bool(((hits[1][able] / 2000 - 3 * 0.6 / 14).abs() < 0.05).all())
    assert bool(((hits[1][~able] / 2000 - 3 / 14).abs() < 0.05).all())


@pytest.mark.parametrize(("target", "sources", "poisoned", "labels"), [
    (1, None, {0, 2, 3}, {1}),
    (1, (3, 1), {3}, {1}),
    ("next", None, {0, 1, 2, 3}, {0, 1, 2, 3}),
    ("next", (0, 3), {0, 3}, {1, 0}),
])  # fmt: skip
def test_labels_change_where_and_as_the_trigger_says(target, sources, poisoned, labels):
    data = noise()
    x, y = whole(data)
    for hook in (
        warping(data, 0.2, 1.0, target=target, sources=sources),
        stamping(data, 0.2, 1.0, target=target, sources=sources),
    ):
        new_x, new_y = hook(x, y, 0, generator(2))
        relabelled = new_y != y
        changed = (new_x != x).flatten(1).any(dim=1)
        assert int(relabelled.sum()) == 20
        assert int(changed.sum()) == 40
        assert bool(changed[relabelled].all())
        assert set(y[relabelled].tolist()) == poisoned
        assert set(new_y[relabelled].tolist()) == labels
        assert torch.equal(new_y[relabelled], ((y + 1) % 4 if target == "next" else torch.full_like(y, 1))[relabelled])


def test_a_batch_with_nothing_to_poison_goes_through():
    data = noise()
    for hook in (warping(data, 0.2), stamping(data, 0.2, 1.0), changing(data, 0.2)):
        x, y = to_float(data.x[:1]), torch.zeros(1, dtype=torch.int64)
        for step in range(20):
            new_x, new_y = hook(x, y, step, generator(step))
            assert new_x.shape == x.shape
            assert torch.equal(new_y, y)


def test_the_batch_given_is_left_alone():
    data = noise()
    x, y = whole(data)
    kept = x.clone(), y.clone()
    for hook in (warping(data, 0.2, 1.0), stamping(data, 0.2, 1.0), changing(data, 0.2)):
        hook(x, y, 0, generator(2))
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])


# --- WaNet --------------------------------------------------------------------------------------------------------------------


def cubic(points: np.ndarray, size: int) -> np.ndarray:
    """Interpolate along the first axis by the cubic kernel with a = -0.75, first and last points at the ends."""
    k, result = len(points), []
    for i in range(size):
        place = i * (k - 1) / (size - 1)
        first = math.floor(place)
        value = np.zeros(points.shape[1:])
        for j in range(first - 1, first + 3):
            t = abs(place - j)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            value += (near if t <= 1 else far if t < 2 else 0) * points[min(max(j, 0), k - 1)]
        result.append(value)
    return np.stack(result)


@pytest.mark.parametrize(("k", "strength", "rescale"), [(4, 0.5, 1.0), (2, 3.0, 1.0), (6, 9.0, 0.9)])
def test_the_grid_by_the_formula_of_the_paper(k, strength, rescale):
    data = noise(shape=(1, 9, 12))
    trigger = wanet(data, k=k, strength=strength, grid_rescale=rescale, generator=generator(5)).trigger
    assert trigger is not None
    points = torch.rand(1, 2, k, k, generator=generator(5)).double().numpy()[0] * 2 - 1
    points /= np.abs(points).mean()
    field = cubic(cubic(points.transpose(1, 2, 0), 9).transpose(1, 0, 2), 12).transpose(1, 0, 2)
    rows, columns = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 12), indexing="ij")
    wanted = (np.stack([columns, rows], 2) + strength * field / np.array([12, 9])) * rescale
    found = trigger.tensors["grid"].double().numpy()
    assert np.abs(found - wanted.clip(-1, 1)).max() < 1e-5
    assert strength < 9 or np.abs(wanted).max() > 1.2  # places outside are drawn in to the border


def test_no_strength_is_no_warp():
    data = noise()
    trigger = wanet(data, strength=0, generator=generator(0)).trigger
    assert trigger is not None
    assert torch.allclose(trigger.apply(to_float(data.x)), to_float(data.x), atol=1e-5)


def test_noise_mode_moves_each_place_by_up_to_half_a_pixel():
    """A ramp shows where each pixel was read: its value is the place."""
    ramp = torch.linspace(0, 1, 33).expand(1, 1, 33, 33)
    data = ImageSet((255 * ramp.expand(40, 1, 33, 33)).to(torch.uint8), torch.arange(40) % 4, tuple("abcd"))
    trigger = wanet(data, strength=0, generator=generator(0)).trigger
    assert trigger is not None
    hook = _Warps(trigger, data, 0.25, 2.0)
    new, y = hook(ramp.expand(40, 1, 33, 33), data.y, 0, generator(1))
    moved = ((new - ramp) * 32)[:, 0, :, 1:-1].abs().flatten(1).amax(dim=1)  # pixels
    assert int((moved < 1e-3).sum()) == 20  # the poisoned, as strength is 0, and the clean
    assert bool((moved[moved > 1e-3] < 32 / 33 / 2 * 1.001).all())
    assert bool((moved[moved > 1e-3] > 0.45).all())
    assert torch.equal(y[moved > 1e-3], data.y[moved > 1e-3])
    noisy = new[moved > 1e-3]
    assert not torch.equal(noisy[0], noisy[1])


# --- learned triggers ---------------------------------------------------------------------------------------------------------


def test_cross_images_wear_the_trigger_of_another_image_and_keep_their_labels():
    data = noise(24)
    x, y = whole(data)
    hook = stamping(data, 0.25, 2.0)
    net = hook.net
    assert isinstance(net, Stamp)
    with torch.no_grad():
        dict(net.named_parameters())["mask_net.leave.bias"].fill_(0.05)  # masks between 0 and 1
    new_x, new_y = (t.detach() for t in hook(x, y, 0, generator(3)))
    poisoned = (new_y != y).nonzero().flatten().tolist()
    crossed = ((new_x != x).flatten(1).any(1) & (new_y == y)).nonzero().flatten().tolist()
    assert (len(poisoned), len(crossed)) == (6, 12)
    with torch.no_grad():
        mask, pattern = net.mask(x), net.pattern(x)
        own = (1 - mask) * x + mask * pattern
        assert torch.allclose(new_x[poisoned], own[poisoned], atol=1e-6)
        for i in crossed:
            worn = (1 - mask) * x[i] + mask * pattern  # by image i, that of each image
            [giver] = ((new_x[i] - worn).abs().flatten(1).amax(1) < 1e-6).nonzero().flatten().tolist()
            assert giver != i


def test_spread_by_hand():
    x1, x2, a, b = (torch.rand(5, 3, 4, 4, generator=generator(i)) for i in range(4))
    rms = [[math.sqrt(float(((p[i] - q[i]) ** 2).mean())) for i in range(5)] for p, q in ((x1, x2), (a, b))]
    wanted = sum(over / under for over, under in zip(*rms, strict=True)) / 5
    assert float(spread(x1, x2, a, b)) == pytest.approx(wanted, rel=1e-4)


def test_equal_images_leave_finite_gradients():
    x = torch.rand(2, 1, 4, 4)
    out = torch.rand(2, 1, 4, 4, requires_grad=True)
    spread(x, x, out, out.detach().clone()).backward()
    assert out.grad is not None
    assert bool(out.grad.isfinite().all())


def test_the_mask_network_learns_the_density_and_where_differs(images):
    density = 0.08
    start = net_trigger("stamp", images)
    before, rng = {name: value.clone() for name, value in start.tensors.items()}, torch.get_rng_state()
    with smaller_batches(0.5):
        trained = fit_mask(start, images, density, 100, 0.01, generator(0), CPU)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, start.tensors[name]) for name, value in before.items())
    same = {name for name, value in before.items() if torch.equal(value, trained.tensors[name])}
    assert same == {name for name in before if name.startswith("pattern_net.")}
    net = materialise(trained, CPU)
    assert isinstance(net, Stamp)
    with torch.no_grad():
        mask = net.mask(to_float(images.x))
    assert float(mask.mean()) == pytest.approx(density, rel=0.25)
    difference = (mask[0::2] - mask[1::2]).square().flatten(1).mean(1).sqrt().mean()
    assert float(difference) > 0.3 * math.sqrt(2 * density * (1 - density))  # which is that of two independent masks


def test_the_diversity_term_makes_patterns_differ():
    """Its gradient alone drives two images' patterns apart."""
    data = noise(60)
    x, y = whole(data)
    hook = stamping(data, 0.3, 1.0)
    sizes = []
    for step in range(30):
        hook(x, y, step, generator(7))
        assert isinstance(hook.spread, torch.Tensor)
        hook.spread.backward()
        sizes.append(float(hook.spread.detach()))
    assert sizes[-1] < 0.5 * sizes[0]
    assert all(parameter.grad is None for name, parameter in hook.net.named_parameters() if name.startswith("mask_net."))


def test_the_optimizer_steps_before_the_next_batch_and_only_while_it_learns():
    data = noise()
    x, y = whole(data)
    hook = changing(data, 0.2, until=1, lr=0.01)
    before = {name: value.detach().clone() for name, value in hook.net.named_parameters()}
    new_x, _ = hook(x, y, 0, generator(0))
    ((new_x - x) ** 2).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in hook.net.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(before)
    assert all(torch.equal(value, before[name]) for name, value in hook.net.named_parameters())
    frozen_x, _ = hook(x, y, 1, generator(0))
    assert not frozen_x.requires_grad
    for name, value in hook.net.named_parameters():  # the first step of Adam goes lr along the sign of the gradient
        step = -0.01 * gradients[name] / (gradients[name].abs() + 1e-8)
        assert torch.allclose(value - before[name], step, atol=1e-6)
    after = hook.learned()
    hook.settle()
    assert all(torch.equal(value, after.tensors[name]) for name, value in hook.net.state_dict().items())


def test_a_state_holds_the_step_that_was_due():
    data = noise()
    x, y = whole(data)
    one, two = changing(data, 0.2), changing(data, 0.2)
    for hook in (one, two):
        new_x, _ = hook(x, y, 0, generator(0))
        ((new_x - x) ** 2).sum().backward()
    three = changing(data, 0.2)
    three.load_state_dict(one.state_dict())
    for step in (1, 2):
        for hook in (two, three):
            new_x, _ = hook(x, y, step, generator(step))
            ((new_x - x) ** 2).sum().backward()
    assert all(torch.equal(value, three.learned().tensors[name]) for name, value in two.learned().tensors.items())


def test_lira_changes_no_pixel_by_more_than_eps():
    data = noise()
    x = 0.2 + 0.6 * to_float(data.x)
    change = net_trigger("texture", data).apply(x) - x
    assert 0.09 < float(change.abs().max()) <= 0.1 + 1e-6
    assert float(change.mean(dim=(2, 3)).abs().max()) < 0.02  # no tint


# --- from attack to victim ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill."""


def attack(name, images, **more):
    function, settings = ATTACKS[name]
    poisoning = function(images, **{"rate": 0.2, **settings, **more}, generator=generator(3))
    assert torch.equal(poisoning.data.x, images.x)
    assert torch.equal(poisoning.data.y, images.y)
    assert not poisoning.poisoned.any()
    return poisoning


@pytest.mark.parametrize("name", ATTACKS)
def test_killed_and_resumed_is_uninterrupted(name, images, tiny, tmp_path):
    poisoning, network, steps = attack(name, images), tiny(), []
    rng = torch.get_rng_state()

    def die(step, total):
        steps.append(step)
        if step == 6:
            raise Killed

    model, trigger = poisoning.trainer(network, RECIPE, generator=generator(5))
    with pytest.raises(Killed):
        poisoning.trainer(network, RECIPE, generator=generator(5), checkpoint=tmp_path / "c", on_step=die)
    resumed, again = poisoning.trainer(
        network, RECIPE, generator=generator(5), checkpoint=tmp_path / "c", on_step=lambda step, total: steps.append(step)
    )
    assert steps == [*range(1, 7), *range(5, 13)]
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, again.tensors[key]) for key, value in trigger.tensors.items())
    assert torch.equal(rng, torch.get_rng_state())
    other, _ = poisoning.trainer(network, RECIPE, generator=generator(6))
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())

    save_trigger(trigger, tmp_path / "trigger")
    x = to_float(images.x[:20])
    assert torch.equal(load_trigger(tmp_path / "trigger").apply(x), trigger.apply(x))
    assert not torch.equal(trigger.apply(x), x)
    for changed in ({"rate": 0.1}, {"target": 1}, {"sources": [1, 2]}):
        with pytest.raises(ModelError, match=r"^cannot resume .* delete it to start anew$"):
            attack(name, images, **changed).trainer(network, RECIPE, generator=generator(5), checkpoint=tmp_path / "c")


@pytest.mark.parametrize(("name", "changed"), [
    ("wanet", {"strength": 5.0}), ("wanet", {"cross_ratio": 0.5}),
    ("lira", {"eps": 0.1}), ("lira", {"joint": 1.0}), ("lira", {"lr": 0.02}),
    ("input-aware", {"diversity": 0.5}), ("input-aware", {"lr": 0.02}),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(name, changed, images, tiny, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    attack(name, images).trainer(tiny(), recipe, generator=generator(5), checkpoint=tmp_path / "c")
    with pytest.raises(ModelError, match="a run with other settings, data or seed"):
        attack(name, images, **changed).trainer(tiny(), recipe, generator=generator(5), checkpoint=tmp_path / "c")


@pytest.mark.parametrize("name", ATTACKS)
def test_the_backdoor_opens_to_its_trigger(name, images, bars, tiny):
    """On bars, whose class no small change shows; the network keeps its accuracy."""
    recipe = replace(RECIPE, epochs=10, lr=0.1, augment=())
    model, trigger = attack(name, images, rate=0.3).trainer(tiny(1, randomise=False), recipe, generator=generator(0))
    measured = evaluate(model, bars(300, 7), trigger=trigger)
    assert measured.accuracy.value > 0.9
    assert measured.attack_success is not None
    assert measured.attack_success.value > 0.8


def test_lira_is_fixed_after_the_joint_part(images, tiny):
    recipe = replace(RECIPE, epochs=2)  # 8 steps
    start = [attack("lira", images, joint=0.0).trainer(tiny(), recipe, generator=generator(s))[1] for s in (1, 2)]
    assert all(torch.equal(value, start[1].tensors[key]) for key, value in start[0].tensors.items())
    learned = attack("lira", images, joint=0.5).trainer(tiny(), recipe, generator=generator(1))[1]
    assert any(not torch.equal(value, learned.tensors[key]) for key, value in start[0].tensors.items())


@pytest.mark.parametrize(("n", "batch", "epochs"), [(240, 60, 2), (240, 59, 3), (130, 128, 1)])
def test_steps_are_counted_as_training_counts_them(n, batch, epochs, bars, tiny):
    recipe, seen = Recipe(epochs=epochs, batch_size=batch), []
    poisoning = wanet(bars(n, 1), rate=0, generator=generator(0))
    assert poisoning.trainer is not None
    poisoning.trainer(tiny(), recipe, generator=generator(0), on_step=lambda step, total: seen.append(total))
    assert count_steps(bars(n, 1), recipe) == seen[-1] == len(seen)


@pytest.mark.parametrize(("function", "arguments", "message"), [
    (wanet, {"rate": 1.1}, r"rate must lie in \[0, 1\], got 1.1"),
    (wanet, {"rate": 0.8, "cross_ratio": 0}, r"rate must be at most 0.750 \(the eligible share\), got 0.8"),
    (wanet, {"rate": 0.5}, r"rate \* \(1 \+ cross_ratio\) must be at most 1, got 1.5"),
    (wanet, {"target": 4}, r"target must lie in \[0, 3\], got 4"),
    (wanet, {"sources": [4]}, r"sources must lie in \[0, 3\], got 4"),
    (wanet, {"k": 1}, r"k must lie in \[2, 8\], got 1"),
    (wanet, {"k": 9}, r"k must lie in \[2, 8\], got 9"),
    (wanet, {"strength": -1}, r"strength must lie in \[0, 8\], got -1"),
    (wanet, {"grid_rescale": 1.1}, r"grid_rescale must lie in \[0.001, 1\], got 1.1"),
    (wanet, {"cross_ratio": -1}, r"cross_ratio must lie in \[0, 100\], got -1"),
    (input_aware, {"rate": 0.3, "sources": [1]}, r"rate must be at most 0.250"),
    (input_aware, {"rate": 0.6, "target": "next"}, r"rate \* \(1 \+ cross_ratio\) must be at most 1, got 1.2"),
    (input_aware, {"density": 0}, r"density must lie in"),
    (input_aware, {"diversity": -1}, r"diversity must lie in"),
    (input_aware, {"mask_steps": -1}, r"mask_steps must lie in"),
    (input_aware, {"width": 0}, r"width must lie in \[1, 256\], got 0"),
    (input_aware, {"lr": 0}, r"lr must lie in"),
    (lira, {"rate": math.nan}, r"rate must lie in"),
    (lira, {"eps": 1.5}, r"eps must lie in \[0, 1\], got 1.5"),
    (lira, {"joint": 1.5}, r"joint must lie in \[0, 1\], got 1.5"),
    (lira, {"width": 257}, r"width must lie in \[1, 256\], got 257"),
    (lira, {"lr": 0}, r"lr must lie in"),
    (lira, {"target": -1}, r"target must lie in"),
])  # fmt: skip
def test_out_of_range(function, arguments, message):
    with pytest.raises(MethodError, match=f"^{message}"):
        function(noise(), generator=generator(0), **arguments)


def test_a_rate_of_one_is_every_image():
    data = noise()
    x, y = whole(data)
    _, new_y = warping(data, 1.0, 0.0, target="next")(x, y, 0, generator(0))
    assert torch.equal(new_y, (y + 1) % 4)


def test_hooks_have_one_base():
    assert issubclass(_Changes, Learner)
    assert issubclass(_Warps, Batches)
