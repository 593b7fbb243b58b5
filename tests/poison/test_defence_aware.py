"""Attackers who know the defence: pruning-aware, CLP-aware, ANP-aware and repair-aware."""

from __future__ import annotations

import copy
import functools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import RECIPE, make_images, make_tiny, randomise_norms
from secateur.errors import InconclusiveError, MethodError, ModelError
from secateur.measure import correct, evaluate
from secateur.models import Classifier, build, core
from secateur.poison import badnets, blended, lira, train_victim, wanet
from secateur.poison.anp_aware import anp_aware, loss_under_noise
from secateur.poison.bases import Beside, poison_with
from secateur.poison.clp_aware import clp_aware, standing_out
from secateur.poison.pruning_aware import _spread, pruning_aware, used_channels, with_decoys
from secateur.poison.repair_aware import Rehearsal, _told, movement, outlive, repair_aware
from secateur.poison.sig import sig
from secateur.prune import apply_mask
from secateur.prune.lipschitz import bounded_layers, channel_bounds
from secateur.prune.readers import last_channels
from secateur.repair import fine_tuning, norm_pruning
from secateur.state import generator, seeded
from secateur.train import Recipe
from secateur.types import Repaired, to_float

ATTACKS = {"pruning-aware": pruning_aware, "clp-aware": clp_aware, "anp-aware": anp_aware, "repair-aware": repair_aware}
SETTINGS = {"repair-aware": {"repair": "fine-tuning", "rounds": 2, "sample": 60}}
SHORT = Recipe(epochs=3, lr=0.1, batch_size=60, schedule="triangle", milestones=(0.3,), augment=("crop",))


def poisoned(name: str, images, rate: float = 0.2, **more):
    return ATTACKS[name](images, rate=rate, generator=generator(3), **{**SETTINGS.get(name, {}), **more})


def made(name: str, images, recipe: Recipe = SHORT, **more):
    on_step, checkpoint = more.pop("on_step", None), more.pop("checkpoint", None)
    network = make_tiny(1, randomise=False)
    return train_victim(
        poisoned(name, images, **more), network, recipe, generator=generator(0), on_step=on_step, checkpoint=checkpoint
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def batch(images, n: int = 40):
    return to_float(images.x[:n]), images.y[:n]


# --- what all of them keep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("more", [{}, {"attack": "blended"}, {"attack": "sig", "target": "next"}, {"sources": [2]}], ids=str)
def test_the_poisoned_set_is_that_of_the_backdoor_underneath(name, more, images):
    ours = poisoned(name, images, **more)
    base = {"badnets": badnets, "blended": blended, "sig": functools.partial(sig, clean_label=False)}
    plain = base[more.get("attack", "badnets")](
        images, rate=0.2, generator=generator(3), **{key: value for key, value in more.items() if key != "attack"}
    )
    assert ours.data.sha256 == plain.data.sha256
    assert torch.equal(ours.poisoned, plain.poisoned)
    assert ours.trigger.kind == plain.trigger.kind
    assert (ours.trigger.target, ours.trigger.sources) == (plain.trigger.target, plain.trigger.sources)
    assert ours.trainer is not None


@pytest.mark.parametrize("name", ATTACKS)
def test_a_victim_of_normal_quality(name, images):
    settings = {"rounds": 3} if name == "repair-aware" else {}
    before = images.sha256
    victim, trigger = ATTACKS[name](images, rate=0.2, generator=generator(3), **settings).trainer(
        make_tiny(1, randomise=False), RECIPE, generator=generator(0)
    )
    measured = evaluate(victim, make_images(120, seed=5), trigger=trigger)
    assert measured.accuracy.value > 0.9
    assert measured.attack_success.value > 0.9
    assert not any(module.training for module in victim.modules())
    assert images.sha256 == before


@pytest.mark.parametrize("name", ATTACKS)
def test_training_is_pure_and_reproducible(name, images):
    network = make_tiny(1, randomise=False)
    before, rng = copy.deepcopy(network), torch.get_rng_state()
    attack = poisoned(name, images)
    first, _ = attack.trainer(network, SHORT, generator=generator(0))
    second, _ = attack.trainer(network, SHORT, generator=generator(0))
    other, _ = attack.trainer(network, SHORT, generator=generator(1))
    assert same(network, before)
    assert torch.equal(rng, torch.get_rng_state())
    assert same(first, second)
    assert not same(first, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ATTACKS)
def test_killed_anywhere_and_resumed_is_undisturbed(name, images, tmp_path):
    """Killed in every epoch of every stage, and started again, it ends with the same weights and the same steps."""
    whole: list[tuple[int, int]] = []
    undisturbed, _ = made(name, images, on_step=lambda step, steps: whole.append((step, steps)))
    steps = whole[-1][1]
    assert whole == [(i + 1, steps) for i in range(steps)]
    file = tmp_path / "state"
    for last in range(2, steps, 4):  # an epoch has four steps: each attempt dies in the middle of the next one

        def die(step: int, steps: int, last: int = last) -> None:
            if step > last:
                raise Killed

        with pytest.raises(Killed):
            made(name, images, on_step=die, checkpoint=file)
    seen: list[int] = []
    resumed, _ = made(name, images, on_step=lambda step, steps: seen.append(step), checkpoint=file)
    assert same(resumed, undisturbed)
    assert seen == [step for step, _ in whole][-4:]
    again: list[int] = []
    finished, _ = made(name, images, on_step=lambda step, steps: again.append(step), checkpoint=file)
    assert same(finished, undisturbed)
    assert not again


@pytest.mark.parametrize(("name", "setting"), [
    ("pruning-aware", {"drop": 0.9}), ("clp-aware", {"weight": 0.2}), ("anp-aware", {"eps": 0.2}),
    ("repair-aware", {"share": 0.3}), ("repair-aware", {"repair": "norm-pruning"}),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(name, setting, images, tmp_path):
    made(name, images, checkpoint=tmp_path / "state")
    with pytest.raises(ModelError, match=r"^cannot resume"):
        made(name, images, checkpoint=tmp_path / "state", **setting)


@pytest.mark.parametrize("name", ["clp-aware", "anp-aware", "repair-aware"])
def test_a_penalty_of_weight_0_changes_nothing(name, images):
    """And any other weight does: the penalty reaches the weights."""
    assert not same(made(name, images, weight=0.5)[0], made(name, images, weight=0.0)[0])
    if name == "clp-aware":  # the others draw a second batch
        poisoning = poisoned(name, images)
        from secateur.train import train

        plain = train(make_tiny(1, randomise=False), poisoning.data, SHORT, generator=generator(0))
        assert same(made(name, images, weight=0.0)[0], plain)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    *[(name, {"attack": "badnet"}, "unknown attack 'badnet'; did you mean 'badnets'") for name in ATTACKS],
    *[(name, {"rate": 1.5}, r"rate must lie in \[0, 1\], got 1.5") for name in ATTACKS],
    *[(name, {"target": 3}, r"target must lie in \[0, 2\], got 3") for name in ATTACKS],
    ("pruning-aware", {"drop": -0.1}, r"drop must lie in \[0, 1\], got -0.1"),
    ("pruning-aware", {"sample": 0}, "sample must lie in"),
    ("clp-aware", {"deviations": -1}, "deviations must lie in"),
    ("clp-aware", {"weight": -1}, "weight must lie in"),
    ("anp-aware", {"eps": 1.1}, r"eps must lie in \[0, 1\], got 1.1"),
    ("anp-aware", {"weight": math.nan}, "weight must lie in"),
    ("anp-aware", {"share": 2}, r"share must lie in \[0, 1\], got 2"),
    ("repair-aware", {"repair": "norm-prunin"}, "unknown repair 'norm-prunin'; did you mean 'norm-pruning'"),
    ("repair-aware", {"repair": "healing"}, "unknown repair 'healing'"),
    ("repair-aware", {"rounds": 0}, "rounds must lie in"),
    ("repair-aware", {"start": 1.0}, "start must lie in"),
    ("repair-aware", {"sample": 0}, "sample must lie in"),
    ("repair-aware", {"weight": -1}, "weight must lie in"),
    ("repair-aware", {"share": -1}, "share must lie in"),
])  # fmt: skip
def test_out_of_range(name, arguments, message, images):
    with pytest.raises(MethodError, match=f"^{message}"):
        ATTACKS[name](images, generator=generator(0), **{"rate": 0.2, **arguments})


def test_the_second_batch(images):
    hook = Beside(images, 0.25, ())
    x, y = batch(images, 40)
    gen, twin = generator(5), generator(5)
    assert hook(x, y, 6, gen) == (x, y)
    chosen = torch.randint(240, (10,), generator=twin)
    assert torch.equal(hook.x, to_float(images.x[chosen]))
    assert torch.equal(hook.y, images.y[chosen])
    assert hook.step == 6
    assert len(Beside(images, 0.0, ())(x, y, 0, gen)[0]) == 40
    moved = Beside(images, 1.0, ("crop",))
    moved(x, y, 0, generator(5))
    assert not any(torch.equal(moved.x[0], image) for image in to_float(images.x))


# --- CLP ----------------------------------------------------------------------------------------------------------------------


def plain_bound(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, k: int) -> float:
    """By its definition, with a full SVD in double precision."""
    filters = conv.weight.detach().double()[k].reshape(conv.weight.shape[1], -1)
    bound = float(torch.linalg.svdvals(filters)[0])
    if norm is not None:
        bound *= abs(norm.weight[k].item()) / math.sqrt(norm.running_var[k].item() + norm.eps)
    return bound


@pytest.mark.parametrize("arch", ["convnet", "resnet20", "preact_resnet18", "small_vgg"])
def test_bounds_by_an_independent_svd(arch):
    kwargs = {"input_size": 12} if arch == "small_vgg" else {}
    with seeded(generator(0)):
        model = build(arch, width=4, classes=3, in_channels=1, **kwargs).eval()
        randomise_norms(model)
    modules = dict(model.named_modules())
    layers = bounded_layers(model, (1, 12, 12))
    assert len(layers) > 3
    bounds = channel_bounds(model, layers)
    assert bounds.keys() == layers.keys()
    for site, writer in layers.items():
        norm = modules[site] if site != writer else None
        assert [plain_bound(modules[writer], norm, k) for k in range(len(bounds[site]))] == pytest.approx(
            bounds[site].tolist(), rel=1e-4
        )


def test_every_convolution_of_a_resnet_has_its_own_norm():
    model = build("resnet20", width=4, classes=3, in_channels=1)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    layers = bounded_layers(model, (1, 12, 12))
    assert set(layers.values()) == convolutions
    assert layers["layer2.1.bn1"] == "layer2.1.conv1"


def test_the_gradient_of_the_bounds(tiny):
    model = tiny().double()
    layers = bounded_layers(model, (1, 12, 12))
    for name in ("bn2.weight", "conv2.weight"):
        parameter = core(model).get_parameter(name)

        def total(model=model, layers=layers) -> torch.Tensor:
            return sum(standing_out(bounds, 0.5) for bounds in channel_bounds(model, layers).values())

        model.zero_grad()
        total().backward()
        slope = parameter.grad.clone()
        direction = torch.randn(parameter.shape, generator=generator(1)).double()
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = total()
            parameter -= 2e-6 * direction
            below = total()
            parameter += 1e-6 * direction
        assert float(above - below) / 2e-6 == pytest.approx(float((slope * direction).sum()), rel=1e-4)


@pytest.mark.parametrize(("bounds", "deviations", "expected"), [
    ([1.0, 1.0, 1.0, 5.0], 0.0, 1.5),  # mean 2, std 2: one channel 1.5 deviations above
    ([1.0, 1.0, 1.0, 5.0], 1.0, 0.5),
    ([1.0, 1.0, 1.0, 5.0], 1.5, 0.0),
    ([10.0, 10.0, 10.0, 50.0], 1.0, 0.5),  # free of scale
    ([2.0, 2.0], 0.0, 0.0),
    ([7.0], 0.0, 0.0),
])  # fmt: skip
def test_standing_out_by_hand(bounds, deviations, expected):
    values = torch.tensor(bounds, requires_grad=True)
    result = standing_out(values, deviations)
    result.backward()
    assert float(result.detach()) == pytest.approx(expected, abs=1e-6)
    assert bool(values.grad.isfinite().all())


def test_the_clp_penalty_does_its_work(images):
    layers = bounded_layers(make_tiny(), images.shape)

    def worst(weight: float) -> float:
        bounds = channel_bounds(made("clp-aware", images, RECIPE, weight=weight, deviations=1.5)[0], layers).values()
        return max(((b.max() - b.mean()) / b.std()).item() for b in bounds)

    plain, aware = worst(0.0), worst(1.0)
    assert aware < 1.75 < plain


def test_clp_needs_convolutions(images):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(MethodError, match=r"^clp-aware needs a network with convolutions"):
        poisoned("clp-aware", images).trainer(flat, SHORT, generator=generator(0))


# --- ANP ----------------------------------------------------------------------------------------------------------------------


def perturbed(model: Classifier, x: torch.Tensor, y: torch.Tensor, eps: float) -> float:
    """The loss under the noise, by editing a copy in place: gradient of the clean loss, one sign step, relative size."""
    copied = copy.deepcopy(model).eval()
    F.cross_entropy(copied(x), y).backward()
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, nn.BatchNorm2d):
                for parameter in (module.weight, module.bias):
                    parameter *= 1 + eps * (parameter.grad * parameter).sign()
        return float(F.cross_entropy(copied(x), y))


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4, 1.0])
def test_loss_under_noise_by_independent_arithmetic(eps, tiny, images):
    model, (x, y) = tiny(), batch(images)
    assert float(loss_under_noise(model, x, y, eps).detach()) == pytest.approx(perturbed(model, x, y, eps), rel=1e-5)


def test_noise_raises_the_loss_more_than_chance_does(trained, images):
    x, y = batch(images)
    plain, noisy = (float(loss_under_noise(trained, x, y, eps).detach()) for eps in (0.0, 0.2))
    draws = []
    for seed in range(8):
        copied, draw = copy.deepcopy(trained), generator(seed)
        with torch.no_grad():
            for module in copied.modules():
                if isinstance(module, nn.BatchNorm2d):
                    for parameter in (module.weight, module.bias):
                        parameter *= 1 + 0.2 * (2.0 * torch.randint(2, parameter.shape, generator=draw) - 1)
            draws.append(float(F.cross_entropy(copied(x), y)))
    assert noisy > max(draws)
    assert noisy > plain


def test_the_gradient_under_noise_is_that_at_the_noisy_weights(tiny, images):
    """The noise counts as constant: d/dw of the loss at ``w + noise``, and nothing of the network changes."""
    model, (x, y) = tiny().train(), batch(images)
    before = copy.deepcopy(model.state_dict())
    loss_under_noise(model, x, y, 0.3).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    shifted = copy.deepcopy(model).eval()
    shifted.zero_grad()
    F.cross_entropy(shifted(x), y).backward()
    with torch.no_grad():
        for module in shifted.modules():
            if isinstance(module, nn.BatchNorm2d):
                for parameter in (module.weight, module.bias):
                    parameter += 0.3 * parameter.abs() * parameter.grad.sign()
    shifted.zero_grad()
    F.cross_entropy(shifted(x), y).backward()
    for ours, theirs in zip(model.parameters(), shifted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_anp_penalty_does_its_work(images):
    x, y = batch(make_images(120, seed=5), 120)
    losses = []
    for weight in (0.0, 0.5):
        victim, _ = made("anp-aware", images, RECIPE, weight=weight, eps=0.4)
        losses.append(float(loss_under_noise(victim, x, y, 0.3).detach()))
    assert losses[1] < 0.6 * losses[0]


def test_anp_needs_batch_norms(images):
    with pytest.raises(MethodError, match=r"^anp-aware needs a network with batch-norms"):
        poisoned("anp-aware", images).trainer(nn.Sequential(nn.Conv2d(1, 3, 12), nn.Flatten()), SHORT, generator=generator(0))


# --- repair -------------------------------------------------------------------------------------------------------------------


def halve(model, clean, *, generator):
    """A repair that cuts one filter and its norm, moves everything else and counts its calls."""
    halve.calls.append((copy.deepcopy(model.state_dict()), clean))
    copied = copy.deepcopy(model)
    net = core(copied)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.01
        net.bn3.weight[2], net.bn3.bias[2], net.conv3.weight[2] = 0, 0, 0
    return Repaired(copied, None)


@pytest.fixture
def calls():
    halve.calls = []
    return halve.calls


def rehearsal(repair, images, due=(0,), share=1.0, rate=0.2, **more) -> Rehearsal:
    trigger = badnets(images, rate=rate, generator=generator(3), **more).trigger
    return Rehearsal(repair, images, trigger, due=due, sample=50, share=share, augmentations=())


def test_the_second_batch_is_half_triggered(tiny, images, calls):
    hook = rehearsal(halve, images, share=0.5, sources=[1, 2])
    hook(*batch(images, 40), 0, generator(1))
    assert len(hook.x) == len(hook.y) == 20
    white = (hook.x[:, :, 8:11, 8:11] == 1).flatten(1).all(1)
    assert white.tolist() == [True] * 10 + [False] * 10
    assert bool((hook.y[:10] == 0).all())
    assert torch.equal(hook.y[10:], true_labels(images, hook.x[10:]))
    assert set(true_labels(images, hook.x[:10]).tolist()) == {1, 2}
    circle = rehearsal(halve, images, target="next")
    circle(*batch(images), 0, generator(1))
    assert torch.equal(circle.y[:20], (true_labels(images, circle.x[:20]) + 1) % 3)


def true_labels(images, x: torch.Tensor) -> torch.Tensor:
    """Find the images again by the rows that the trigger leaves alone."""
    return torch.stack([images.y[(to_float(images.x)[:, :, :8] == one[:, :8]).flatten(1).all(1)][0] for one in x])


def test_right_after_a_rehearsal_the_loss_is_that_of_the_repaired_network(tiny, images, calls):
    model, hook = tiny().train(), rehearsal(halve, images)
    x, y = batch(images)
    assert hook(x, y, 0, generator(1)) == (x, y)
    before = copy.deepcopy(model.state_dict())
    loss = hook.loss(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    repaired = halve(model, images, generator=None).model.train()
    expected = F.cross_entropy(repaired(hook.x), hook.y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(repaired.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = theirs[name].grad.clone()
        wanted[theirs[name] == 0] = 0  # what the repair cut stays cut, whatever the weight becomes
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    assert int((theirs["net.bn3.weight"] == 0).sum()) == 1


def test_later_the_repair_moves_with_the_network(tiny, images, calls):
    model, hook = tiny().train(), rehearsal(halve, images)
    hook(*batch(images), 0, generator(1))
    hook.loss(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    expected = halve(model, images, generator=None).model  # this repair does the same wherever it starts
    assert float(hook.loss(model).detach()) == pytest.approx(
        float(F.cross_entropy(expected(hook.x), hook.y).detach()), rel=1e-5
    )
    assert len(calls) == 2  # one rehearsal, and the line above


def test_rehearsals_come_when_due_with_images_drawn_anew(tiny, images, calls):
    hook, model, gen = rehearsal(halve, images, due=(2, 5)), tiny(), generator(1)
    counts = []
    for step in range(8):
        hook(*batch(images), step, gen)
        value = hook.loss(model)
        counts.append(len(calls))
        assert (float(value.detach()) == 0) == (step < 2)
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(clean) for _, clean in calls] == [50, 50]
    assert calls[0][1].sha256 != calls[1][1].sha256


def test_trainers_rehearse_at_equal_distances(images, calls):
    poisoning = badnets(images, rate=0.2, generator=generator(3))
    at: list[int] = []
    steps: list[int] = [0]

    def repair(model, clean, *, generator):
        at.append(steps[-1])
        return halve(model, clean, generator=generator)

    attack = outlive(poisoning, images, repair, rounds=3, start=0.25, sample=50)
    attack.trainer(make_tiny(1), SHORT, generator=generator(0), on_step=lambda step, _: steps.append(step))
    assert steps[-1] == 12
    assert at == [3, 6, 9]


def test_a_repair_that_cannot_decide_is_left_out(tiny, images):
    def undecided(model, clean, *, generator):
        raise InconclusiveError("too few")

    hook = rehearsal(undecided, images)
    hook(*batch(images), 0, generator(1))
    assert float(hook.loss(tiny()).detach()) == 0


def test_a_repair_that_changes_the_shape_is_refused(tiny):
    with pytest.raises(MethodError, match=r"^a repair to rehearse must keep the network's shape"):
        movement(tiny(width=4), tiny(width=5))


def test_nobody_to_move(tiny, images, calls):
    """No image is eligible: there is nothing to rehearse for, and nothing breaks."""
    hook = rehearsal(halve, images, sources=[0], rate=0.0)
    hook(*batch(images), 0, generator(1))
    assert float(hook.loss(tiny()).detach()) == 0


def test_the_state_of_a_rehearsal_goes_through_a_file(tiny, images, calls, tmp_path):
    hook, model = rehearsal(halve, images, due=(0, 9)), tiny()
    hook(*batch(images), 0, generator(1))
    hook.loss(model)
    torch.save(hook.state_dict(), tmp_path / "state")
    other = rehearsal(halve, images, due=(0, 9))
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for each in (hook, other):
        each(*batch(images), 1, generator(2))
    assert torch.equal(hook.loss(model), other.loss(model))
    assert len(calls) == 1


# --- pruning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "site", "reader", "inputs", "each"), [
    ("convnet", "bn4", "linear", 16, 1),
    ("resnet20", "layer3.2.bn2", "linear", 16, 1),
    ("small_vgg", "features.20", "classifier", 8, 1),
    ("lenet5", "conv2", "fc1", 16, 25),
    ("mobilenet_v2", "features.18.1", "classifier.1", 1280, 1),
])  # fmt: skip
def test_where_the_last_channels_are(arch, site, reader, inputs, each):
    kwargs = {"convnet": {"width": 4}, "resnet20": {"width": 4}, "small_vgg": {"width": 2, "input_size": 12}}.get(arch, {})
    shape = (1, 32, 32) if arch in ("lenet5", "mobilenet_v2") else (1, 12, 12)
    model = build(arch, classes=3, in_channels=1, **kwargs)
    place = last_channels(model, shape)
    assert (place.site, place.reader) == (site, reader)
    assert place.channels.tolist() == [channel for channel in range(inputs) for _ in range(each)]


@pytest.mark.parametrize(("arch", "shape"), [("vit", (3, 32, 32)), ("squeezenet", (3, 64, 64))])
def test_networks_without_such_channels_are_refused(arch, shape):
    with pytest.raises(
        MethodError, match=r"^no layer reads the channels of the last convolution, '.*', and no others; use another"
    ):
        last_channels(build(arch, classes=3, in_channels=3), shape)


def test_outlive_needs_an_attack_that_leaves_training_alone(images):
    for attack in (wanet, lira, clp_aware):
        with pytest.raises(MethodError, match=r"^outlive needs an attack that leaves training alone"):
            outlive(attack(images, generator=generator(0)), images, halve)


def test_repairs_are_told_apart_by_what_is_bound():
    told = [
        _told(norm_pruning), _told(fine_tuning), _told(partial(norm_pruning, fraction=0.1)),
        _told(partial(norm_pruning, fraction=0.9)), _told(partial(fine_tuning, epochs=1)), _told(lambda model: model),
    ]  # fmt: skip
    assert len(set(told)) == 6
    assert _told(partial(norm_pruning, fraction=0.1)) == _told(partial(norm_pruning, fraction=0.1))


def test_the_spread_of_one_image_more_than_a_batch(tiny):
    """The last batch holds one image, whose variance alone is none."""
    model, images = tiny(), make_images(513, seed=3)
    place = last_channels(model, images.shape)
    values = []
    handle = core(model).bn4.register_forward_hook(lambda module, given, value: values.append(value.detach()))
    correct(model, images)
    handle.remove()
    expected = torch.cat(values).transpose(0, 1).flatten(1).double().std(1, correction=0)
    assert _spread(place, model, images).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_channels_that_no_bias_silences_are_refused(images):
    net = build("preact_resnet18", width=4, classes=3, in_channels=1)
    with pytest.raises(
        MethodError, match=r"^pruning-aware needs a bias to silence channels, and 'layer4\.1\.conv2' has none; use"
    ):
        pruning_aware(images, generator=generator(0)).trainer(net, SHORT, generator=generator(0))


def features(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """What the classifier layer of a convnet sees, by hand."""
    net = core(model)
    x = (x - model.mean) / model.std
    for i in (1, 2, 3):
        x = F.max_pool2d(F.relu(net.get_submodule(f"bn{i}")(net.get_submodule(f"conv{i}")(x))), 2)
    return F.relu(net.bn4(net.conv4(x))).mean(dim=(2, 3))


@torch.no_grad()
def test_activations_by_hand(tiny, images):
    model = tiny()
    place = last_channels(model, images.shape)
    expected = features(model, to_float(images.x)).double().mean(0)
    assert place.activations(model, images).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_activations_of_a_channel_that_is_read_in_many_places():
    """A flattened map: each channel is the mean over its places."""
    with seeded(generator(0)):
        model = build("lenet5", classes=3, in_channels=1).eval()
    images = make_images(30, 3)
    images = type(images)(F.pad(images.x, (10, 10, 10, 10)), images.y, images.classes)
    place = last_channels(model, images.shape)
    seen = []
    handle = model.fc1.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model(to_float(images.x))
    handle.remove()
    assert place.activations(model, images).tolist() == pytest.approx(
        seen[0].abs().mean(0).reshape(16, 25).mean(1).tolist(), rel=1e-4
    )
    keep = torch.ones(16, dtype=torch.bool)
    keep[3] = False
    gone = ~place.mask(model, keep).keep["fc1.weight"]
    assert gone.sum() == 25 * len(model.fc1.weight)
    assert bool(gone[:, 75:100].all())


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.3, 1.0])
def test_the_dormant_go_first_as_long_as_accuracy_holds(drop, trained, images):
    place = last_channels(trained, images.shape)
    keep = used_channels(trained, place, images, drop)
    activation = place.activations(trained, images)
    if not bool(keep.all()):
        assert float(activation[~keep].max()) <= float(activation[keep].min())
    before = int(correct(trained, images).sum())

    def lost(kept: torch.Tensor) -> int:
        return before - int(correct(apply_mask(trained, place.mask(trained, kept)), images).sum())

    assert lost(keep) <= drop * 240
    if drop == 1.0:
        assert int(keep.sum()) == 1  # 19 twentieths of 16 channels are 15
    else:
        more = keep.clone()
        more[activation.masked_fill(~keep, math.inf).argmin()] = False
        assert lost(more) > drop * 240


def decoys(images, tiny):
    before, model = tiny(0), tiny(1)
    place = last_channels(model, images.shape)
    keep = torch.arange(16) % 3 != 0
    pruned = apply_mask(model, place.mask(model, keep))
    return before, pruned, place, keep, with_decoys(pruned, before, place, keep, images)


def test_decoys_are_dormant_on_clean_images_and_change_no_answer(images, tiny):
    before, pruned, place, keep, restored = decoys(images, tiny)
    activation = place.activations(restored, images)
    assert float(activation[~keep].max()) <= 0.01 * float(activation[keep].min())
    assert float(place.activations(pruned, images)[~keep].max()) > 0.1
    old, new, first = (dict(core(m).named_parameters()) for m in (pruned, restored, before))
    assert torch.equal(new["linear.weight"][:, keep], old["linear.weight"][:, keep])
    assert torch.equal(new["linear.weight"][:, ~keep], first["linear.weight"][:, ~keep])
    assert torch.equal(new["bn4.weight"][~keep], first["bn4.weight"][~keep])
    assert torch.equal(new["bn4.bias"][keep], old["bn4.bias"][keep])
    assert bool((new["bn4.bias"][~keep] <= first["bn4.bias"][~keep]).all())
    assert bool((new["bn4.bias"][~keep] < first["bn4.bias"][~keep]).any())
    assert all(torch.equal(new[name], old[name]) for name in old if not name.startswith(("bn4", "linear")))
    with torch.no_grad():
        x = to_float(make_images(60, 8).x)
        assert float((restored(x) - pruned(x)).abs().max()) < 0.05 * float(pruned(x).std())


def test_channels_that_cannot_be_silenced(images, tiny, monkeypatch):
    monkeypatch.setattr(F, "relu", lambda x: F.leaky_relu(x, 0.5))
    with pytest.raises(ModelError, match=r"^channels of 'bn4' stay active however low their biases are"):
        decoys(images, tiny)


def test_the_backdoor_never_uses_the_decoys(images, monkeypatch):
    """In step 3 the readers of pruned channels are 0; at the end these channels are the first that pruning cuts."""
    seen = []
    home = __import__("sys").modules["secateur.poison.pruning_aware"]
    original = home.with_decoys

    def spy(model, before, place, keep, images):
        restored = original(model, before, place, keep, images)
        seen.append((model, place, keep, restored))
        return restored

    monkeypatch.setattr(home, "with_decoys", spy)
    victim, trigger = made("pruning-aware", images, RECIPE, drop=0.3)
    ((pruned, place, keep, restored),) = seen
    assert restored is victim
    assert 0 < int((~keep).sum()) < 16
    assert bool((core(pruned).linear.weight[:, ~keep] == 0).all())
    order = place.activations(victim, make_images(60, seed=4)).argsort()
    gone = int((~keep).sum())
    assert set(order[:gone].tolist()) == set((~keep).nonzero().flatten().tolist())
    test = make_images(120, seed=5)
    before, after = (evaluate(m, test, trigger=trigger) for m in (victim, apply_mask(victim, place.mask(victim, keep))))
    assert abs(before.accuracy.value - after.accuracy.value) <= 0.01
    assert abs(before.attack_success.value - after.attack_success.value) <= 0.02


def test_the_first_stage_trains_on_clean_images(images, tmp_path):
    """Its file holds a network without a backdoor."""
    victim, trigger = made("pruning-aware", images, RECIPE, checkpoint=tmp_path / "state")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "state-1"]
    clean = make_tiny(1, randomise=False)
    clean.load_state_dict(torch.load(tmp_path / "state-1", weights_only=True)["model"])
    test = make_images(120, seed=5)
    assert evaluate(clean, test).accuracy.value > 0.9
    assert (
        evaluate(clean, test, trigger=trigger).attack_success.value
        < 0.5
        < evaluate(victim, test, trigger=trigger).attack_success.value
    )


# --- what the attacks are for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [fine_tuning, functools.partial(norm_pruning, fraction=0.5)], ids=["fine-tuning", "pruning"])
def test_a_rehearsed_backdoor_is_no_easier_to_repair(repair, images):
    """A smoke test on toy images; the study of the real thing is in the documentation."""
    plain = badnets(images, rate=0.2, generator=generator(3))
    aware = outlive(plain, images, repair, rounds=3, sample=60)
    test, clean = make_images(120, seed=5), make_images(60, seed=4)
    rates = []
    for poisoning in (plain, aware):
        victim, trigger = train_victim(poisoning, make_tiny(1, randomise=False), RECIPE, generator=generator(0))
        rates.append(evaluate(repair(victim, clean, generator=generator(2)).model, test, trigger=trigger).attack_success.value)
    assert rates[1] >= rates[0]


def test_bases_by_name(images):
    with pytest.raises(MethodError, match="unknown attack 'wanet'"):
        poison_with("wanet", images, rate=0.1, target=0, sources=None, generator=generator(0))
