"""The training loop: resumed = uninterrupted, the input untouched, and every argument in force."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur.train as train_module
from secateur.compress import quantise
from secateur.errors import DataError, MethodError, ModelError
from secateur.models import Classifier, build, wrap
from secateur.state import generator, seeded
from secateur.train import Recipe, train
from secateur.types import ImageSet

RECIPES = {
    "sgd": Recipe(epochs=4, lr=0.05, batch_size=16, augment=("crop", "flip"), label_smoothing=0.1),
    "adamw": Recipe(4, 16, "adamw", lr=0.01, schedule="triangle", milestones=(0.25,), augment=("flip",)),
}
DIE = """
import os, sys, pathlib, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train import run_once
run_once(sys.argv[2], pathlib.Path(sys.argv[3]), lambda epoch, loss, model: os._exit(9) if epoch == 2 else None)
"""


def noise(n: int = 40, seed: int = 3) -> ImageSet:
    x = torch.randint(0, 256, (n, 1, 12, 12), generator=generator(seed)).to(torch.uint8)
    return ImageSet(x, torch.arange(n) % 3, ("a", "b", "c"), "noise")


def dropping() -> Classifier:
    """A network with dropout, whose masks come from the global generator."""
    with seeded(generator(1)):
        net = build("small_vgg", width=2, classes=3, in_channels=1, input_size=12)
    return Classifier(net, classes=("a", "b", "c"), input_shape=(1, 12, 12), mean=[0.5], std=[0.25])


def run_once(recipe: str, checkpoint: Path | None = None, on_epoch=None) -> Classifier:
    return train(dropping(), noise(), RECIPES[recipe], generator=generator(7), checkpoint=checkpoint, on_epoch=on_epoch)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


# --- killed and resumed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_is_uninterrupted(recipe, tmp_path):
    file = tmp_path / "run" / "state"
    arguments = [sys.executable, "-c", DIE, str(Path(__file__).parent), recipe, str(file)]
    killed = subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=120)
    assert killed.returncode == 9
    assert [path.name for path in file.parent.iterdir()] == ["state"]
    seen: list[int] = []
    resumed = run_once(recipe, file, lambda epoch, loss, model: seen.append(epoch))
    assert seen == [3, 4]
    assert same(resumed, run_once(recipe))


def test_the_recipes_above_use_dropout_and_augmentation():
    plain = Recipe(epochs=4, lr=0.05, batch_size=16, label_smoothing=0.1)
    assert not same(run_once("sgd"), train(dropping(), noise(), plain, generator=generator(7)))
    still = dropping()
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not same(run_once("sgd"), train(still, noise(), RECIPES["sgd"], generator=generator(7)))


def test_resuming_twice_from_a_finished_run_changes_nothing(tmp_path):
    first = run_once("sgd", tmp_path / "state")
    assert same(first, run_once("sgd", tmp_path / "state", lambda *_: pytest.fail("trained again")))


def test_a_checkpoint_is_known_by_what_it_was_known_by_before_adversarial_training():
    digest = train_module._fingerprint(dropping(), noise(), RECIPES["sgd"], {}, generator(7), "")
    assert digest.startswith("258dd6b5aceceac9")


def test_resuming_goes_on_with_the_loss_and_the_generator(tmp_path):
    plain, resumed = generator(7), generator(7)
    train(dropping(), noise(), RECIPES["sgd"], generator=plain)
    train(dropping(), noise(), RECIPES["sgd"], generator=generator(7), checkpoint=tmp_path / "state")
    train(dropping(), noise(), RECIPES["sgd"], generator=resumed, checkpoint=tmp_path / "state")
    assert torch.equal(plain.get_state(), resumed.get_state())


@pytest.mark.parametrize("change", ["recipe", "data", "seed", "weights", "hold", "identity"])
def test_a_checkpoint_of_another_run_is_refused(change, tmp_path):
    recipe, data, seed, model, hold, identity = Recipe(epochs=1, lr=0.05), noise(), 7, dropping(), None, ""
    train(model, data, recipe, generator=generator(seed), checkpoint=tmp_path / "state")
    if change == "recipe":
        recipe = Recipe(epochs=1, lr=0.06)
    elif change == "data":
        data = noise(seed=4)
    elif change == "seed":
        seed = 8
    elif change == "weights":
        with torch.no_grad():
            model.net.classifier.bias[0] += 1
    elif change == "hold":
        hold = {"classifier.bias": torch.tensor([True, True, False])}
    else:
        identity = "wanet rate=0.1"
    given = {"hold": hold, "identity": identity, "checkpoint": tmp_path / "state"}
    with pytest.raises(ModelError, match="belongs to a run with other settings, data or seed; delete it to start anew"):
        train(model, data, recipe, generator=generator(seed), **given)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ModelError, match="it is not a training checkpoint; delete it to start anew"):
        run_once("sgd", tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == content


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, torch.zeros(3)])
def test_a_torch_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "state")
    with pytest.raises(ModelError, match="it is not a training checkpoint"):
        run_once("sgd", tmp_path / "state")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    file = tmp_path / "state"
    run_once("sgd", file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="it is not a training checkpoint"):
        run_once("sgd", file)


def test_a_checkpoint_that_cannot_be_read_is_not_to_be_deleted(tmp_path):
    with pytest.raises(ModelError, match=r"Is a directory; make it readable, or name another$"):
        run_once("sgd", tmp_path)


# --- what goes in stays, what comes out is trained ----------------------------------------------------------------------------


def test_the_model_that_comes_in_is_not_changed(tiny, images):
    model = tiny().train()
    model.net.bn2.eval()
    model.net.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trained = train(model, images, Recipe(epochs=1, lr=0.05), generator=generator(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in [*model.parameters(), *trained.parameters()])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["net.conv1.weight"]
    assert [n for n, p in trained.named_parameters() if not p.requires_grad] == ["net.conv1.weight"]
    assert not any(module.training for module in trained.modules())
    assert not same(model, trained)


def test_the_images_are_not_changed(tiny, images):
    digest = images.sha256
    train(tiny(), images, Recipe(epochs=1, lr=0.05, augment=("crop", "flip")), generator=generator(0))
    assert images.sha256 == digest


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_generator_same_weights_and_another_other(recipe):
    first = run_once(recipe)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert same(first, run_once(recipe))
    assert not same(first, train(dropping(), noise(), RECIPES[recipe], generator=generator(8)))


def test_no_epochs_change_nothing(tiny, images):
    model = tiny()
    assert same(model, train(model, images, Recipe(epochs=0), generator=generator(0)))


def test_training_learns(trained, images):
    x, y = next(images.batches(240))
    assert float((trained(x).argmax(1) == y).float().mean()) > 0.9


def test_no_images(tiny, images):
    with pytest.raises(DataError, match="at least one image, got 0"):
        train(tiny(), images.subset(torch.zeros(0, dtype=torch.int64)), Recipe(), generator=generator(0))


# --- one step by hand ---------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5], [-0.25]], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def one_white(label: int = 0) -> ImageSet:
    return ImageSet(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([label]), ("a", "b"))


@pytest.mark.parametrize(("smoothing", "momentum", "nesterov", "length"), [
    (0.0, 0.0, True, 0.1), (0.2, 0.0, True, 0.1), (0.0, 0.9, False, 0.1), (0.0, 0.9, True, 0.19),
])  # fmt: skip
def test_one_step_of_sgd_by_hand(smoothing, momentum, nesterov, length):
    recipe = Recipe(
        epochs=1, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01, schedule="constant",
        label_smoothing=smoothing,
    )  # fmt: skip
    after = train(Line(), one_white(), recipe, generator=generator(0)).weight.flatten().tolist()
    p = 1 / (1 + math.exp(-0.75))
    target = 1 - smoothing / 2
    gradient = p - target
    assert after[0] == pytest.approx(0.5 - length * (gradient + 0.01 * 0.5), abs=1e-6)
    assert after[1] == pytest.approx(-0.25 - length * (-gradient + 0.01 * -0.25), abs=1e-6)


def test_batch_hook_sees_and_changes_each_batch():
    calls = []

    def flip(x: Tensor, y: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        calls.append((step, tuple(x.shape), float(x.max()), source.initial_seed()))
        return x, 1 - y

    recipe = Recipe(epochs=3, lr=0.1)
    hooked = train(Line(), one_white(0), recipe, batch_hook=flip, generator=generator(5))
    assert calls == [(step, (1, 1, 1, 1), 1.0, 5) for step in range(3)]
    assert same(hooked, train(Line(), one_white(1), recipe, generator=generator(5)))


def test_a_penalty_adds_to_the_gradient():
    recipe = Recipe(epochs=1, lr=0.1, momentum=0, nesterov=False, weight_decay=0, schedule="constant")
    seen = []

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append((model.training, tuple(x.shape), y.tolist()))
        return 3 * model.get_parameter("weight").sum()

    plain = train(Line(), one_white(), recipe, generator=generator(0)).get_parameter("weight")
    pushed = train(Line(), one_white(), recipe, penalty=penalty, generator=generator(0)).get_parameter("weight")
    assert torch.allclose(pushed, plain - 0.1 * 3)
    assert seen == [(True, (1, 1, 1, 1), [0])]


class Shade:
    """A hook that learns: it darkens images by a factor, and takes its gradient from the network's own backward pass."""

    def __init__(self) -> None:
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.gradients: list[float] = []

    def __call__(self, x: Tensor, y: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.factor.grad is not None:
            self.gradients.append(float(self.factor.grad))
            with torch.no_grad():
                self.factor -= 0.1 * self.factor.grad
            self.factor.grad = None
        return x * self.factor, y

    def state_dict(self) -> dict[str, Tensor]:
        return {"factor": self.factor.detach().clone(), "grad": self.factor.grad.clone()}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor.data.copy_(state["factor"])
        self.factor.grad = state["grad"].clone()


def test_a_hook_may_learn_from_the_networks_backward_pass():
    hook = Shade()
    recipe = Recipe(epochs=2, lr=0.1, momentum=0, nesterov=False, weight_decay=0, schedule="constant")
    train(Line(), one_white(), recipe, batch_hook=hook, generator=generator(0))
    p = 1 / (1 + math.exp(-0.5 * 0.75))
    assert hook.gradients == [pytest.approx((p - 1) * 0.5 + (1 - p) * -0.25)]


def test_a_hook_with_a_state_is_resumed_with_it(tmp_path):
    recipe = Recipe(epochs=4, lr=0.1)

    class Killed(Exception):
        pass

    def die(epoch: int, loss: float, model: nn.Module) -> None:
        if epoch == 2:
            raise Killed

    whole, half, rest = Shade(), Shade(), Shade()
    wanted = train(Line(), one_white(), recipe, batch_hook=whole, generator=generator(1))
    with pytest.raises(Killed):
        train(
            Line(), one_white(), recipe, batch_hook=half, on_epoch=die, checkpoint=tmp_path / "c", generator=generator(1)
        )  # fmt: skip
    found = train(Line(), one_white(), recipe, batch_hook=rest, checkpoint=tmp_path / "c", generator=generator(1))
    assert same(found, wanted)
    assert torch.equal(rest.factor, whole.factor)
    assert half.gradients + rest.gradients == whole.gradients


def test_progress_is_reported_step_by_step_and_epoch_by_epoch():
    steps, epochs = [], []
    train(
        dropping(), noise(40), Recipe(epochs=2, lr=0.01, batch_size=16), generator=generator(0),
        on_step=lambda step, total: steps.append((step, total)),
        on_epoch=lambda epoch, loss, model: epochs.append((epoch, math.isfinite(loss), model.training)),
    )  # fmt: skip
    assert steps == [(i, 6) for i in range(1, 7)]
    assert epochs == [(1, True, True), (2, True, True)]


def test_batches_are_equal_in_size():
    sizes = []

    def note(x: Tensor, y: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        return x, y

    train(dropping(), noise(41), Recipe(epochs=1, lr=0.01, batch_size=20), batch_hook=note, generator=generator(0))
    assert sizes == [14, 14, 13]


def test_hold_keeps_weights_at_zero_and_only_those(tiny, images):
    keep = torch.rand(8, 4, 3, 3, generator=generator(0)) > 0.5
    held = train(tiny(), images, Recipe(epochs=1, lr=0.05), hold={"conv2.weight": keep}, generator=generator(0))
    assert bool((held.net.conv2.weight[~keep] == 0).all())
    assert bool((held.net.conv2.weight[keep] != 0).all())


def test_hold_of_everything_kept_is_no_hold(tiny, images):
    recipe = Recipe(epochs=1, lr=0.05)
    hold = {"conv2.weight": torch.ones(8, 4, 3, 3, dtype=torch.bool)}
    held = train(tiny(), images, recipe, hold=hold, generator=generator(0))
    assert same(held, train(tiny(), images, recipe, generator=generator(0)))


@pytest.mark.parametrize(("hold", "message"), [
    ({"conv9.weight": torch.ones(2)}, "the mask to hold names 'conv9.weight', which is not a parameter"),
    ({"net.conv1.weight": torch.ones(2)}, "the mask to hold names 'net.conv1.weight'"),
    ({"bn1.weight": torch.ones(3).bool()}, r"the mask of 'bn1.weight' must have shape \(4,\), got \(3,\)"),
])  # fmt: skip
def test_hold_that_does_not_fit(tiny, images, hold, message):
    with pytest.raises(MethodError, match=message):
        train(tiny(), images, Recipe(epochs=1), hold=hold, generator=generator(0))


def test_rounded_networks_are_refused(trained, images):
    """Gradients of rounded feature maps are 0, and a step would take quantised weights off their grid; a clamp trains."""
    once = Recipe(epochs=1, batch_size=40)
    clamped = wrap(trained, [{"after": "bn1", "kind": "clamp", "low": -1.0, "high": 1.0}])
    assert not torch.equal(train(clamped, images, once, generator=generator(0)).net.conv1.weight, trained.net.conv1.weight)
    rounded = wrap(clamped, [{"after": "bn2", "kind": "round", "decimals": 1}])
    with pytest.raises(MethodError, match=r"rounds its feature maps after 'bn2'.*models\.unwrap"):
        train(rounded, images, once, generator=generator(0))
    with pytest.raises(MethodError, match=r"quantised already.*models\.dequantised"):
        train(quantise(trained, images), images, once, generator=generator(0))


def test_divergence_is_an_error_with_a_remedy(tiny, images):
    recipe = Recipe(epochs=3, lr=1e6, batch_size=40)
    with pytest.raises(ModelError, match=r"training diverged: the loss is .* in epoch \d; use a smaller lr than 1e\+06"):
        train(tiny(), images, recipe, generator=generator(0))


def test_bfloat16_trains_float32_weights(tiny, images):
    recipe = Recipe(epochs=1, lr=0.05, batch_size=80, precision="bfloat16")
    low = train(tiny(), images, recipe, generator=generator(0))
    high = train(tiny(), images, Recipe(epochs=1, lr=0.05, batch_size=80), generator=generator(0))
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert not same(low, high)
    assert torch.allclose(low.net.linear.weight, high.net.linear.weight, atol=0.05)


def test_memory_format_is_that_of_a_fresh_network(tiny, images):
    trained = train(tiny(), images, Recipe(epochs=1, lr=0.05), generator=generator(0))
    assert all(p.is_contiguous() for p in trained.parameters())


# --- recipes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_schedules_by_closed_form(t):
    assert Recipe(schedule="constant").factor(t) == 1
    assert Recipe(schedule="cosine").factor(t) == pytest.approx(math.cos(math.pi * t / 2) ** 2)
    steps = Recipe(schedule="multistep", milestones=(0.25, 0.9))
    assert steps.factor(t) == pytest.approx(1 if t < 0.25 else 0.1 if t < 0.9 else 0.01)
    triangle = Recipe(schedule="triangle", milestones=(0.25,))
    assert triangle.factor(t) == pytest.approx(t / 0.25 if t < 0.25 else (1 - t) / 0.75)


def test_the_schedule_is_read_at_the_middle_of_each_step():
    rates = []

    class Watched(Line):
        pass

    recipe = Recipe(epochs=4, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="triangle", milestones=(0.5,))
    weights = [0.5]
    train(
        Watched(), one_white(), recipe, generator=generator(0),
        on_epoch=lambda epoch, loss, model: weights.append(model.weight[0, 0].item()),
    )  # fmt: skip
    for before, after in pairwise(weights):
        p = 1 / (1 + math.exp(-(2 * before - 0.25)))  # the second weight moves the other way: their sum stays 0.25
        rates.append((after - before) / (1 - p))
    assert rates == pytest.approx([0.025, 0.075, 0.075, 0.025], rel=1e-3)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"epochs": -1}, r"epochs must lie in \[0, 100000\], got -1"),
    ({"batch_size": 0}, r"batch_size must lie in \[1, 2147483648\], got 0"),
    ({"lr": 0.0}, r"lr must lie in \[1e-12, 1000000\], got 0"),
    ({"lr": math.nan}, r"lr must lie in .* got nan"),
    ({"momentum": 1.0}, r"momentum must lie in \[0, 0.999999999\], got 1$"),
    ({"weight_decay": -1e-4}, r"weight_decay must lie in \[0, 1000\], got -0.0001"),
    ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 0.999999999\], got 1"),
    ({"optimizer": "adma"}, "unknown optimizer 'adma'; did you mean 'adam'"),
    ({"schedule": "cos"}, "unknown schedule 'cos'; did you mean"),
    ({"precision": "float16"}, "unknown precision 'float16'; did you mean"),
    ({"schedule": "triangle", "milestones": ()}, "milestones"),
    ({"schedule": "triangle", "milestones": (1.5,)}, r"milestones must lie in \[0, 1\], got 1.5"),
    ({"schedule": "multistep", "milestones": (0.5, -0.1)}, r"milestones must lie in \[0, 1\], got -0.1"),
])  # fmt: skip
def test_recipes_out_of_range(arguments, message):
    with pytest.raises(MethodError, match=message):
        Recipe(**arguments)


def test_unknown_augmentation(tiny, images):
    with pytest.raises(MethodError, match="unknown augmentation 'flop'; did you mean 'flip'"):
        train(tiny(), images, Recipe(epochs=1, augment=("flop",)), generator=generator(0))
