"""Square and noise: they ask for answers alone, the margin never rises, a broken image asks no more."""

import pytest
import torch
from attacked_models import Counting, Round, accuracy, distance, linear
from torch import nn

from secateur.attack import random_noise, square
from secateur.attack.ball import Ball
from secateur.attack.losses import Aim, margin
from secateur.attack.square import _bump, search
from secateur.errors import MethodError
from secateur.state import generator

BUDGETS = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.5)])


@BUDGETS
@pytest.mark.parametrize("targeted", [False, True], ids=["away", "towards"])
def test_the_margin_only_grows_and_stays_in_the_budget(norm, eps, targeted, hardened):
    """More queries with the same draws: each image at least as near to its aim as before."""
    x, y = hardened.x[:60], hardened.y[:60]
    wanted = (y + 3) % 10 if targeted else y
    ball, seen, best = Ball(x, eps, norm), [], []

    def answers(points):
        seen.append(len(points))
        with torch.no_grad():
            return hardened.model(points)

    aim = Aim("margin", targeted)
    for queries in (1, 20, 80):
        seen.clear()
        found = search(answers, ball, wanted, aim, queries=queries, share=0.8, generator=generator(0))
        assert float(distance(found, x, norm).max()) <= eps
        assert len(seen) <= queries
        assert seen == sorted(seen, reverse=True)
        with torch.no_grad():
            best.append((aim.value(hardened.model(found), wanted), aim.reached(hardened.model(found), wanted)))
    assert float(best[2][0].mean()) > float(best[0][0].mean()) + 0.1
    assert int(best[2][1].sum()) > int(best[0][1].sum())


@BUDGETS
def test_one_schedule_one_rising_margin(norm, eps, hardened):
    """Within a run no query that is kept lowers an image's margin, and none that raises it is thrown away."""
    x, y = hardened.x[:40], hardened.y[:40]
    right = hardened.model(x).argmax(dim=1) == y
    x, y = x[right][:1], y[right][:1]  # one image: every call is about it
    tried = []

    def answers(points):
        with torch.no_grad():
            logits = hardened.model(points) - torch.nn.functional.one_hot(y, 10) * -50.0  # nothing breaks it
        tried.append(float(margin(logits, y)))
        return logits

    found = search(answers, Ball(x, eps, norm), y, Aim("margin"), queries=60, share=0.8, generator=generator(2))
    assert len(tried) == 60
    reached = max(tried)
    answers(found)
    assert tried[-1] == pytest.approx(reached, abs=1e-4)
    assert reached > tried[0]


def test_it_needs_no_gradient_and_finds_what_gradients_cannot(hardened):
    class Opaque(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.rounded = net, Round()

        def forward(self, x):
            return self.net(self.rounded(x)).detach() * 1000

    x, y = hardened.x[:100], hardened.y[:100]
    adv = square(Opaque(hardened.model), x, y, eps=0.15, queries=150, generator=generator(0))
    noise = random_noise(Opaque(hardened.model), x, y, eps=0.15, generator=generator(0))
    assert accuracy(Opaque(hardened.model), adv, y) < accuracy(Opaque(hardened.model), noise, y) - 0.1


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 12, 12), (2, 7, 11), (1, 2, 3)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_size_of_image(shape, norm):
    model = linear(3, shape[0] * shape[1] * shape[2])
    x = torch.rand(8, *shape, generator=generator(0))
    y = model(x).argmax(dim=1)
    adv = square(model, x, y, eps=0.9, norm=norm, queries=200, generator=generator(1))
    assert float(distance(adv, x, norm).max()) <= 0.9
    assert accuracy(model, adv, y) < 1


def test_a_bump_has_both_signs_and_length_one():
    for side in (2, 3, 6, 7):
        bump = _bump(side, torch.zeros(1), generator(0))
        assert bump.shape == (side, side)
        assert float(bump.norm()) == pytest.approx(1)
        assert float(bump.min()) < 0 < float(bump.max())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_stops_at_the_first_draw_that_breaks(norm, hardened):
    model = Counting(hardened.model)
    model.register_forward_hook(lambda *_: None)
    x, y, eps = hardened.x[:100], hardened.y[:100], {"linf": 0.4, "l2": 8.0}[norm]
    adv = random_noise(model, x, y, eps=eps, norm=norm, tries=6, generator=generator(0))
    assert model.calls == 6
    assert model.images < 600
    assert float(distance(adv, x, norm).max()) <= eps
    one = random_noise(model, x, y, eps=eps, norm=norm, tries=1, generator=generator(0))
    assert accuracy(hardened.model, adv, y) < accuracy(hardened.model, one, y) < 1


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (square, {"queries": 0}, r"queries must lie in \[1, "),
        (square, {"share": 0.0}, r"share must lie in \[1e-06, 1\], got 0"),
        (random_noise, {"tries": 0}, r"tries must lie in \[1, "),
    ],
)
def test_bad_settings(attack, settings, message, hardened):
    with pytest.raises(MethodError, match=message):
        attack(hardened.model, hardened.x[:2], hardened.y[:2], **settings, generator=generator(0))
