"""NAD's attention against plain loops, and the places where it is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import MethodError
from secateur.measure import evaluate
from secateur.models import build
from secateur.recipe import Recipe
from secateur.repair.nad import Watched, attention, distance, distil, nad
from secateur.state import generator, seeded
from secateur.types import to_float


def by_loops(values: np.ndarray, power: float) -> np.ndarray:
    b, c, h, w = values.shape
    result = np.zeros((b, h, w))
    for i in range(b):
        for k in range(c):
            result[i] += np.abs(values[i, k]) ** power
        result[i] /= np.sqrt((result[i] ** 2).sum())
    return result


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_attention_and_its_distance(power):
    draw = generator(0)
    shapes = [(3, 4, 5, 6), (3, 2, 3, 3), (3, 7, 2, 1)]
    mine, other = ([torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes] for _ in range(2))
    expected = 0.0
    for weight, a, b in zip((15, 30, 30), mine, other, strict=True):
        assert np.allclose(attention(a, power).numpy(), by_loops(a.numpy(), power), atol=1e-5)
        expected += weight * np.mean((by_loops(a.numpy(), power) - by_loops(b.numpy(), power)) ** 2)
    assert float(distance(tuple(mine), tuple(other), beta=30, power=power)) == pytest.approx(expected, rel=1e-4)


def test_the_maps_of_a_residual_network_are_the_ends_of_its_stages():
    with seeded(generator(0)):
        net = build("resnet20", width=4, classes=3).eval()
    seen = {}
    for name in ("layer1", "layer2", "layer3"):
        net.get_submodule(name).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
    watched = Watched(net, (3, 16, 16))
    x = torch.rand(2, 3, 16, 16, generator=generator(1))
    with torch.no_grad():
        logits = watched(x)
        assert torch.equal(logits, net(x))
    assert watched.count == 3
    for kept, stage in zip(watched.maps, seen.values(), strict=True):
        assert torch.equal(kept, stage)


def test_maps_that_nothing_learned_and_single_places_do_not_count():
    """The images themselves, halved or not, show no attention; neither does a map of one place."""
    net = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    watched = Watched(net.eval(), (1, 12, 12))
    watched(torch.rand(1, 1, 12, 12))
    assert [tuple(values.shape[2:]) for values in watched.maps] == [(2, 2)]


def plain(seed: int) -> nn.Module:
    with seeded(generator(seed)):
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)]
        return nn.Sequential(*layers).eval()


def test_training_draws_the_attention_to_the_teachers(images):
    x, teacher = to_float(images.x[:60]), plain(1)
    wanted = Watched(teacher, images.shape)
    apart = []
    for beta in (0.0, 30.0):
        student = distil(plain(0), teacher, images, Recipe(epochs=3, lr=0.02), beta=beta, power=2.0, generator=generator(0))
        watched = Watched(student, images.shape)
        with torch.no_grad():
            wanted(x)
            watched(x)
        apart.append(float(distance(watched.maps, wanted.maps, beta=1.0, power=2.0)))
    assert apart[1] < apart[0] / 2


def test_attention_removes_a_backdoor_that_fine_tuning_leaves(victim):
    rates = []
    for beta in (0.0, 1000.0):
        repaired = nad(victim.model, victim.clean, lr=0.05, beta=beta, generator=generator(0))
        measured = evaluate(repaired.model, victim.test, trigger=victim.trigger)
        assert measured.attack_success is not None
        assert measured.accuracy.value > 0.95
        rates.append(measured.attack_success.value)
    assert rates[1] < rates[0] - 0.3


def test_progress_counts_both_trainings(trained, images):
    seen = []
    nad(trained, images, teacher_epochs=1, epochs=2, on_step=lambda *at: seen.append(at), generator=generator(0))
    assert seen == [(i + 1, 12) for i in range(12)]


def test_dropout_works_while_training_and_its_noise_comes_from_the_generator(images):
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(F.relu(self.conv(x)), 0.5, training=self.training)
            return self.linear(x.mean((2, 3)))

    with seeded(generator(0)):
        net = Dropping().eval()
    before = torch.get_rng_state()
    a, b, c = (
        nad(net, images, teacher_epochs=0, epochs=1, beta=0, generator=generator(s)).model.state_dict() for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv.weight"], c["conv.weight"])
    x = to_float(images.x[:9])
    watched = Watched(net.train(), images.shape)
    with seeded(generator(0)):
        assert not torch.equal(watched(x), watched(x))


def test_a_network_without_feature_maps_is_refused(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.raises(MethodError, match=r"^nad needs a network with feature maps"):
        nad(net, images, generator=generator(0))


@pytest.mark.parametrize(("name", "value"), [("teacher_epochs", -1), ("epochs", -1), ("lr", 0.0), ("beta", -1), ("power", 0.5)])
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in \["):
        nad(trained, images, generator=generator(0), **{name: value})
