"""Adversarial training: closed forms on linear networks, the modes of batch-norm, and what must not change without it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur.train as train_module
from secateur.adversarial_training import Adversary, Watch, divergence
from secateur.attack import pgd
from secateur.cli.train import _split
from secateur.data import augment
from secateur.errors import MethodError
from secateur.recipe import Recipe, read_recipe
from secateur.state import generator
from secateur.train import train
from secateur.types import ImageSet, to_float

KINDS = ("pgd", "trades", "fast", "free")
EPS = 0.1
OLD = {
    *("epochs", "batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule", "milestones"),
    *("label_smoothing", "augment", "precision"),
}
Seen = list[tuple[bool, Tensor]]


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


class Linear(nn.Module):
    """Logits linear in the pixels; it notes what it is shown and in which mode, also when it is a copy."""

    def __init__(self, seen: Seen | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator(5)))
        self.note: Callable[[bool, Tensor], None] | None = None
        if seen is not None:
            self.note = lambda training, x: seen.append((training, x.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        if self.note is not None:
            self.note(self.training, x)
        return x.flatten(1) @ self.weight.T


def grey(n: int = 6) -> ImageSet:
    """Images whose pixels are farther than EPS from black and white."""
    x = torch.randint(60, 190, (n, 1, 2, 2), generator=generator(2)).to(torch.uint8)
    return ImageSet(x, torch.arange(n) % 2, ("a", "b", "c"))


def sgd(kind: str, **settings) -> Recipe:
    """Plain SGD, one step an epoch."""
    plain = {"lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "schedule": "constant", "epochs": 1}
    given = {**plain, **({"eps": EPS} if kind != "none" else {}), **settings}
    return Recipe(adversarial=kind, **given)


# --- one step by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_pgd_step_on_a_linear_network_is_that_at_the_worst_case(norm):
    """Two classes: the loss grows along the difference of their weights alone, so the worst case is known."""
    model, data = Linear(), grey()
    x, y = to_float(data.x), data.y
    model.weight.data = model.weight.data[:2]
    slope = (model.weight[1 - y] - model.weight[y]).detach().reshape(x.shape)
    step = slope.sign() if norm == "linf" else slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    worst = x + EPS * step
    [gradient] = torch.autograd.grad(F.cross_entropy(model(worst), y), [model.weight])
    trained = train(model, data, sgd("pgd", norm=norm), generator=generator(0))
    assert torch.allclose(trained.weight, model.weight - 0.5 * gradient, atol=1e-5 if norm == "linf" else 2e-3)
    [clean] = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])
    assert not torch.allclose(trained.weight, model.weight - 0.5 * clean, atol=1e-2)


def test_the_loss_of_trades_by_hand():
    seen: Seen = []
    model, data = Linear(seen).train(), grey()
    x, y = to_float(data.x), data.y
    found = Adversary(sgd("trades", beta=3.0), data.shape).loss(model, model, x, y, generator(0)).detach()
    assert [training for training, _ in seen] == [False] * 11 + [True, True]
    start, clean, last = seen[1][1], seen[-2][1], seen[-1][1]
    assert torch.equal(clean, x)
    with torch.no_grad():
        p, near, far = (model(points).double().softmax(dim=1) for points in (x, start, last))
    before, after = ((p * (p / q).log()).sum(dim=1).mean() for q in (near, far))
    assert float(found) == pytest.approx(float(3 * after - p.gather(1, y[:, None]).log().mean()), rel=1e-5)
    assert float(divergence(p.log(), far.log())) == pytest.approx(float(after), rel=1e-6)
    assert float(after) > 50 * float(before) > 0
    assert float((last - x).abs().max()) == pytest.approx(EPS, rel=1e-5)


def test_fast_takes_one_step_of_five_quarters_in_train_mode():
    seen: Seen = []
    model, data = Linear(seen).train(), grey()
    x, y = to_float(data.x), data.y
    Adversary(sgd("fast"), data.shape).loss(model, model, x, y, generator(0))
    (_, start), (_, points) = seen
    assert all(training for training, _ in seen)
    leaf = start.clone().requires_grad_()
    [slope] = torch.autograd.grad(F.cross_entropy(model(leaf), y), [leaf])
    wanted = (start + 1.25 * EPS * slope.sign()).clamp(x - EPS, x + EPS)
    assert torch.allclose(points, wanted, atol=1e-6)
    assert float((start - x).abs().max()) > EPS / 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_with_one_replay_trains_on_the_perturbation_that_earlier_batches_left(norm):
    seen: Seen = []
    data, model = grey(), Linear(seen)
    train(model, data, sgd("free", replays=1, epochs=3, norm=norm), generator=generator(0))
    assert len(seen) == 3
    twin, noise, random = Linear(), torch.zeros(6, 1, 2, 2), generator(0)
    for training, shown in seen:
        torch.randint(2**62, (), generator=random)  # the seed of the epoch
        order = torch.randperm(len(data), generator=random)
        x, y = to_float(data.x[order]), data.y[order]
        points = (x + noise).requires_grad_()
        assert training
        assert torch.allclose(shown, points, atol=1e-6)
        gradient, slope = torch.autograd.grad(F.cross_entropy(twin(points), y), [twin.weight, points])
        size = slope.flatten(1).norm(dim=1)[:, None, None, None]
        noise = noise + EPS * (slope.sign() if norm == "linf" else slope / size)
        if norm == "linf":
            noise = noise.clamp(-EPS, EPS)
        else:
            noise = noise * (EPS / noise.flatten(1).norm(dim=1)[:, None, None, None]).clamp_max(1)
        twin.weight.data = twin.weight - 0.5 * gradient


def test_free_replays_each_batch_and_steps_each_time():
    seen: Seen = []
    steps: list[int] = []
    data = grey()
    recipe = sgd("free", replays=4)
    train(Linear(seen), data, recipe, generator=generator(0), on_step=lambda step, total: steps.append(total))
    assert len(seen) == 4
    assert steps == [1]
    assert all(float((points - seen[0][1]).abs().max()) <= EPS + 1e-6 for _, points in seen)
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_points_stay_in_the_budget_and_in_the_range_of_images(kind):
    seen: Seen = []
    model = Linear(seen).train()
    x = torch.rand(8, 1, 2, 2, generator=generator(1)).round(decimals=1)
    adversary = Adversary(sgd(kind, eps=0.3), (1, 2, 2))
    for _ in range(3):
        adversary.loss(model, model, x, torch.zeros(8, dtype=torch.int64), generator(0)).backward()
        adversary.learn()
    for _, points in seen:
        assert float(points.min()) >= 0
        assert float(points.max()) <= 1
        assert float((points - x).abs().max()) <= 0.3 + 1e-6
    assert float((seen[-1][1] - x).abs().max()) > 0.25


def test_the_step_size_is_that_given():
    data, sizes = grey(), []
    for size in (None, 0.01):
        seen: Seen = []
        model = Linear(seen).train()
        recipe = sgd("pgd", adversarial_steps=1, adversarial_step_size=size)
        Adversary(recipe, data.shape).loss(model, model, to_float(data.x), data.y, generator(0))
        sizes.append(float((seen[1][1] - seen[0][1]).abs().max()))
    assert sizes[0] > EPS
    assert sizes[1] == pytest.approx(0.01, abs=1e-6)


# --- modes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_see_what_is_said(tiny, images, kind):
    """Passes in train mode: one for pgd, two (clean and perturbed) for trades, start and step for fast, replays for free."""
    recipe = sgd(kind, batch_size=240, lr=1e-6, **({"replays": 3} if kind == "free" else {}))
    trained = train(tiny(), images, recipe, generator=generator(0))
    assert int(trained.net.bn1.num_batches_tracked) == {"pgd": 1, "trades": 2, "fast": 2, "free": 3}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_flags_are_put_back_within_a_step(tiny, images, kind):
    model = tiny().train()
    model.net.bn2.eval()
    Adversary(sgd(kind), images.shape).loss(model, model, to_float(images.x[:8]), images.y[:8], generator(0))
    assert [name for name, module in model.named_modules() if not module.training] == ["net.bn2"]


# --- without it, nothing changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_0_is_plain_training_bit_for_bit(tiny, images, kind):
    more = {"epochs": 2, "momentum": 0.9, "batch_size": 60, "augment": ("crop", "flip"), "lr": 0.05}
    replays = {"replays": 1} if kind == "free" else {}
    none = train(tiny(), images, sgd("none", **more), generator=generator(0))
    zero = train(tiny(), images, sgd(kind, eps=0.0, **more, **replays), generator=generator(0))
    some = train(tiny(), images, sgd(kind, **more, **replays), generator=generator(0))
    assert same(none, zero)
    assert not same(none, some)


def test_a_recipe_without_adversarial_training_is_what_it_was():
    assert set(Recipe().settings()) == OLD
    assert read_recipe(Recipe().settings()) == Recipe()


@pytest.mark.parametrize(("kind", "settings"), [
    ("pgd", {"adversarial_steps"}), ("trades", {"adversarial_steps", "beta"}), ("fast", set()), ("free", {"replays"}),
])  # fmt: skip
def test_a_recipe_names_the_settings_in_force(kind, settings):
    recipe = Recipe(adversarial=kind)
    assert set(recipe.settings()) == OLD | {"adversarial", "eps", "norm", "adversarial_step_size"} | settings
    assert read_recipe(recipe.settings()) == recipe


# --- together with all else that training does --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_uninterrupted(tiny, images, kind, tmp_path):
    recipe = sgd(kind, epochs=3, batch_size=100, lr=0.05, momentum=0.9, **({"replays": 2} if kind == "free" else {}))

    class Killed(Exception):
        pass

    def die(epoch: int, loss: float, model: nn.Module) -> None:
        if epoch == 2:
            raise Killed

    plain, resumed = generator(4), generator(4)
    whole = train(tiny(), images, recipe, generator=plain)
    with pytest.raises(Killed):
        train(tiny(), images, recipe, generator=generator(4), checkpoint=tmp_path / "c", on_epoch=die)
    again = train(tiny(), images, recipe, generator=resumed, checkpoint=tmp_path / "c")
    assert same(whole, again)
    assert torch.equal(plain.get_state(), resumed.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_it_leaves_the_network_alone_and_holds_masks_in_low_precision(tiny, images, kind):
    model = tiny().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    keep = torch.rand(8, 4, 3, 3, generator=generator(0)) > 0.5
    recipe = sgd(kind, batch_size=120, precision="bfloat16", lr=0.05)
    trained = train(model, images, recipe, hold={"conv2.weight": keep}, generator=generator(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in [*model.parameters(), *trained.parameters()])
    assert bool((trained.net.conv2.weight[~keep] == 0).all())
    assert bool((trained.net.conv2.weight[keep] != 0).all())
    high = train(model, images, sgd(kind, batch_size=120, lr=0.05), hold={"conv2.weight": keep}, generator=generator(0))
    assert not same(trained, high)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_is_added_and_sees_the_images_as_they_are(kind):
    data, shown = grey(), []

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        shown.append(x.clone())
        return 3 * model.get_parameter("weight").sum()

    replays = {"replays": 2} if kind == "free" else {}
    plain = train(Linear(), data, sgd(kind, **replays), generator=generator(0))
    pushed = train(Linear(), data, sgd(kind, **replays), penalty=penalty, generator=generator(0))
    assert {tuple(sorted(x.flatten().tolist())) for x in shown} == {tuple(sorted(to_float(data.x).flatten().tolist()))}
    if kind != "free":  # there the second replay starts from other weights
        assert torch.allclose(pushed.weight, plain.weight - 0.5 * 3, atol=1e-5)
    assert not same(pushed, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_may_learn_and_return_more_images(kind):
    factor = nn.Parameter(torch.tensor(0.9))
    gradients = []

    def hook(x: Tensor, y: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        if factor.grad is not None:
            gradients.append(float(factor.grad))
            factor.grad = None
        more = 1 + step % 2
        return (x * factor).repeat(more, 1, 1, 1), y.repeat(more)

    train(Linear(), grey(), sgd(kind, epochs=4), batch_hook=hook, generator=generator(0))
    assert len(gradients) == 3
    assert all(math.isfinite(gradient) and gradient != 0 for gradient in gradients)


def test_perturbations_come_after_the_augmentation(tiny, images):
    seen: Seen = []
    data = ImageSet(images.x[:6, :, :2, :2].contiguous(), images.y[:6], images.classes)
    train(Linear(seen), data, sgd("pgd", augment=("flip",)), generator=generator(0))
    random = generator(0)
    torch.randint(2**62, (), generator=random)
    order = torch.randperm(6, generator=random)
    x = to_float(augment(data.x[order], ("flip",), generator=random))
    assert float((seen[-1][1] - x).abs().max()) <= EPS + 1e-6


# --- catastrophic overfitting -------------------------------------------------------------------------------------------------


def test_a_fall_is_noticed_and_the_network_left_alone(trained, images):
    watch = Watch(images, sgd("fast", eps=0.3))
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    assert watch.fallen(trained, generator(0)) == ""
    assert watch.best < 0.3
    watch.best = 0.9
    told = watch.fallen(trained, generator(0))
    assert told.startswith("accuracy under PGD on 128 training images fell from 90% to ")
    assert watch.best == 0.9
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())


def test_the_watch_measures_pgd_and_remembers_the_best(trained, images):
    watch = Watch(images, sgd("fast", eps=0.1))
    assert watch.fallen(trained, generator(3)) == ""
    index = torch.linspace(0, len(images) - 1, 128).round().long()
    found = pgd(trained, images.x[index], images.y[index], eps=0.1, steps=5, generator=generator(3))
    with torch.no_grad():
        rate = float((trained(found).argmax(dim=1) == images.y[index]).float().mean())
    assert 0.05 < rate < 0.95
    assert watch.best == rate


def test_training_ends_before_the_fall_and_says_so(tiny, images, monkeypatch, tmp_path):
    calls = []

    def fallen(self, network, random):
        calls.append(1)
        return "it fell" if len(calls) == 2 else ""

    monkeypatch.setattr(Watch, "fallen", fallen)
    recipe, notes, epochs = sgd("fast", epochs=5, lr=0.05, schedule="constant"), [], []
    given = {"generator": generator(0), "on_note": notes.append, "checkpoint": tmp_path / "c"}
    ended = train(tiny(), images, recipe, on_epoch=lambda epoch, loss, model: epochs.append(epoch), **given)
    assert notes == ["it fell in epoch 2: training ended with the weights of the epoch before"]
    assert epochs == [1, 2]
    calls.clear()
    one = train(tiny(), images, sgd("fast", epochs=1, lr=0.05, schedule="constant"), generator=generator(0))
    assert same(ended, one)
    again = train(tiny(), images, recipe, **{**given, "generator": generator(0)})
    assert same(again, ended)
    assert len(notes) == 2, "the record of a resumed run says it too"


def test_what_is_watched_was_moved_to_the_device(tiny, images, monkeypatch):
    """On a GPU the images of the caller stay on the CPU, where the network cannot answer them."""
    moved, watched = [], []

    def move(*fields):
        moved.append(ImageSet(*fields))
        return moved[-1]

    monkeypatch.setattr(train_module, "ImageSet", move)
    monkeypatch.setattr(train_module, "Watch", lambda data, recipe: watched.append(data) or Watch(data, recipe))
    train(tiny(), images, sgd("fast", epochs=1), generator=generator(0))
    assert len(moved) == len(watched) == 1
    assert watched[0] is moved[0]


def test_only_fast_is_watched(tiny, images, monkeypatch):
    monkeypatch.setattr(Watch, "fallen", lambda *_: pytest.fail("watched"))
    train(tiny(), images, sgd("pgd", adversarial_steps=1), generator=generator(0))
    train(tiny(), images, sgd("fast", eps=0.0), generator=generator(0))


# --- it works -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_networks_robust(tiny, images, trained, kind):
    eps, more = 0.15, {"replays": 3} if kind == "free" else {}
    recipe = Recipe(
        epochs=8, lr=0.1, batch_size=40, schedule="triangle", milestones=(0.3,), adversarial=kind, eps=eps, **more
    )  # fmt: skip
    robust = train(tiny(randomise=False), images, recipe, generator=generator(0))
    rates = []
    for model in (trained, robust):
        found = pgd(model, images.x, images.y, eps=eps, steps=10, generator=generator(1))
        with torch.no_grad():
            rates.append(float((model(found).argmax(dim=1) == images.y).float().mean()))
    assert rates[1] > rates[0] + 0.15


# --- words --------------------------------------------------------------------------------------------------------------------


def test_the_command_line_takes_fractions():
    recipe, _ = _split({"adversarial": "pgd", "eps": "8/255", "adversarial_step_size": "2/255", "adversarial_steps": 7})
    assert recipe == Recipe(adversarial="pgd", eps=8 / 255, adversarial_step_size=2 / 255, adversarial_steps=7)


def test_whole_numbers_and_fractions_are_one_recipe():
    one, other = (read_recipe({"adversarial": "trades", "norm": "l2", "eps": e, "beta": b}) for e, b in ((1, 6), ("1/1", 6.0)))
    assert one == other
    assert repr(one) == repr(other)


@pytest.mark.parametrize(("given", "message"), [
    ({"adversarial": "pdg"}, "unknown adversarial 'pdg'; did you mean 'pgd'"),
    ({"adversarial": "pgd", "eps": 1.5}, r"eps must lie in \[0, 1\], got 1.5"),
    ({"adversarial": "pgd", "eps": -0.1}, r"eps must lie in \[0, 1\], got -0.1"),
    ({"adversarial": "pgd", "eps": "8/0"}, "eps must be a number, like 8/255 or 0.03, got '8/0'"),
    ({"adversarial": "pgd", "eps": "much"}, "eps must be a number, like 8/255 or 0.03, got 'much'"),
    ({"adversarial": "pgd", "norm": "l1"}, "unknown norm 'l1'"),
    ({"adversarial": "pgd", "adversarial_steps": 0}, r"adversarial_steps must lie in \[1, .*\], got 0"),
    ({"adversarial": "pgd", "adversarial_steps": 2.5}, "adversarial_steps must be of type int, got 2.5"),
    ({"adversarial": "pgd", "adversarial_step_size": -1}, r"adversarial_step_size must lie in .*, got -1"),
    ({"adversarial": "trades", "beta": -1}, r"beta must lie in .*, got -1"),
    ({"adversarial": "free", "replays": 0}, r"replays must lie in .*, got 0"),
    ({"eps": 0.1}, "eps has no effect with adversarial=none; set adversarial=pgd or trades or fast or free"),
    ({"adversarial": "pgd", "beta": 2}, "beta has no effect with adversarial=pgd; set adversarial=trades"),
    ({"adversarial": "fast", "adversarial_steps": 3}, "adversarial_steps has no effect with .*; set adversarial=pgd or trades"),
    ({"adversarial": "trades", "replays": 3}, "replays has no effect with adversarial=trades; set adversarial=free"),
])  # fmt: skip
def test_recipes_that_are_refused(given, message):
    with pytest.raises(MethodError, match=message):
        read_recipe(given)


def test_a_budget_larger_than_any_distance_is_refused_before_training(images):
    recipe = sgd("pgd", norm="l2", eps=13.0)
    with pytest.raises(MethodError, match=r"eps must lie in \[0, 12\], got 13"):
        train(Linear(), images, recipe, generator=generator(0))
