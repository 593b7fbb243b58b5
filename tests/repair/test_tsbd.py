"""TSBD resets the weights that a plain loop over the filters finds, and fine-tunes by gradients taken one by one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_images
from secateur.data import sample
from secateur.errors import DataError, MethodError
from secateur.measure import correct, evaluate
from secateur.models import build
from secateur.prune import apply_mask
from secateur.repair.tsbd import flattened, reset_mask, resettable, tsbd
from secateur.state import generator, seeded

QUICK = {"unlearn_lr": 0.02, "unlearn_epochs": 3, "epochs": 1, "batch_size": 40}


def reset_by_hand(changes, filters: float, weights: float) -> dict[str, torch.Tensor]:
    ranked = sorted(
        ((float(row.double().sum()), name, k) for name, change in changes.items() for k, row in enumerate(change)), reverse=True
    )
    chosen = [(name, k) for _, name, k in ranked[: int(filters * len(ranked))]]
    pool = sorted((float(value) for name, k in chosen for value in changes[name][k].flatten()), reverse=True)
    gone = {name: torch.zeros_like(change, dtype=torch.bool) for name, change in changes.items()}
    for name, k in chosen:
        for place, value in enumerate(changes[name][k].flatten().tolist()):
            gone[name][k].view(-1)[place] = value in pool[: int(weights * len(pool))]
    return gone


@pytest.mark.parametrize(("filters", "weights"), [(0.5, 0.7), (0.25, 0.5), (1.0, 0.1), (0.0, 0.7), (0.5, 0.0), (1.0, 1.0)])
def test_what_is_reset_by_hand(filters, weights):
    draw = generator(0)
    shapes = {"a.weight": (6, 3, 3, 3), "b.weight": (10, 6, 1, 1), "c.weight": (4, 2, 3, 3)}
    changes = {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    mask = reset_mask(changes, filters=filters, weights=weights)
    for name, gone in reset_by_hand(changes, filters, weights).items():
        assert torch.equal(~mask.keep[name], gone)


def test_the_number_of_filters_follows_from_the_accuracy(trained, images):
    """Every candidate is judged by a full forward of its own; the last before the first that loses more is taken."""
    repaired = tsbd(trained, images, weights=0.1, drop=0.2, **QUICK, generator=generator(1))
    judged = len(images) // 4
    assert [round(candidate.amount, 2) for candidate in repaired.path][:3] == [0.0, 0.01, 0.05]
    rates = [candidate.holdout.value for candidate in repaired.path]
    assert {candidate.holdout.n for candidate in repaired.path} == {judged}
    crossed = [rates[0] - rate > 0.2 + 1e-9 for rate in rates]
    assert crossed[-1]
    assert not any(crossed[:-1])
    assert repaired.log["filters_chosen"] == repaired.path[-2].amount
    assert repaired.log["weights_reset"] == repaired.path[-2].removed > 0
    assert set(repaired.path[0].mask.keep) == {f"conv{i}.weight" for i in (1, 2, 3, 4)}


def test_without_epochs_the_reset_network_comes_back(trained, images):
    repaired = tsbd(trained, images, drop=1.0, **{**QUICK, "epochs": 0}, generator=generator(1))
    assert repaired.mask is None
    expected = apply_mask(trained, repaired.path[-1].mask).eval().state_dict()
    assert repaired.path[-1].amount == 0.9
    assert all(torch.equal(value, expected[name]) for name, value in repaired.model.state_dict().items())


@pytest.mark.parametrize(("radius", "blend"), [(0.05, 0.7), (0.0, 0.7), (0.5, 0.0), (0.5, 1.0)])
def test_the_steps_by_hand(radius, blend, tiny, images):
    model, random = tiny(), generator(3)
    hand = deepcopy(model).train()
    speed = {name: torch.zeros_like(p) for name, p in hand.named_parameters()}
    found = flattened(
        model, images, epochs=1, lr=0.05, radius=radius, blend=blend, batch_size=80, on_step=None, generator=generator(3)
    )
    with seeded(random):
        batches = list(sample(images, 80, 3, augment=("crop", "flip"), generator=random))
    for x, y in batches:
        names, parameters = zip(*hand.named_parameters(), strict=True)
        here = torch.autograd.grad(F.cross_entropy(hand(x), y), parameters)
        other = deepcopy(hand)
        with torch.no_grad():
            for parameter, slope in zip(other.parameters(), here, strict=True):
                parameter += radius * slope / slope.norm()
        there = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
        with torch.no_grad():
            for name, parameter, g, further in zip(names, parameters, here, there, strict=True):
                speed[name] = 0.9 * speed[name] + (1 - blend) * g + blend * further
                parameter -= 0.05 * speed[name]
    for name, value in hand.state_dict().items():
        assert torch.allclose(found.state_dict()[name].float(), value.float(), atol=1e-4), name


def test_convolutions_on_a_shortcut_are_left_alone():
    for name, kwargs, shortcuts in (
        ("preact_resnet18", {"width": 4}, {f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)}),
        ("convnet", {"width": 4}, set()),
    ):
        with seeded(generator(0)):
            net = build(name, classes=3, in_channels=1, **kwargs)
        every = {f"{n}.weight" for n, module in net.named_modules() if isinstance(module, nn.Conv2d)}
        assert every - set(resettable(net, (1, 12, 12))) == shortcuts


def test_healing_brings_accuracy_back(trained, images):
    repaired = tsbd(trained, images, drop=0.3, **{**QUICK, "epochs": 6}, lr=0.05, generator=generator(1))
    assert repaired.path[-1].holdout.value < 0.7
    assert float(correct(repaired.model, images).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("setting", "value"),
    [("weights", 1.1), ("drop", -0.1), ("blend", 1.1), ("radius", -1.0), ("epochs", -1), ("lr", 0.0), ("until", 1.1),
     ("unlearn_epochs", 0), ("unlearn_lr", -1.0)],
)  # fmt: skip
def test_settings_out_of_range(setting, value, tiny, images):
    with pytest.raises(MethodError, match=rf"^{setting} must lie in"):
        tsbd(tiny(), images, **{setting: value}, generator=generator(0))


def test_refusals(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        MethodError, match=r"^this network has no convolution whose filters could be reset; use another method$"
    ):
        tsbd(net, images, generator=generator(0))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(DataError, match=r"^fit and hold-out need an image each"):
        tsbd(net, images.subset(images.y[:1]), generator=generator(0))


def test_it_takes_a_backdoor_out(victim):
    clean = make_images(150, 9)
    repaired = tsbd(victim.model, clean, unlearn_lr=1e-3, unlearn_epochs=2, epochs=5, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.accuracy.value > 0.9
    assert after.attack_success is not None
    assert after.attack_success.value < 0.3
