"""DIVA: sets a network and what was made of it apart, within the budget, where PGD on the one fools both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.attack import diva, pgd
from secateur.attack.diva import _Apart
from secateur.compress import quantise
from secateur.errors import DataError, MethodError, ModelError
from secateur.runs.evading import divergence_attack
from secateur.state import generator
from secateur.types import to_float

EPS = 0.2


@pytest.fixture(scope="module")
def rounded(trained, images):
    return quantise(trained, images, bits=3)


@pytest.fixture(scope="module")
def known(trained, rounded, images):
    """Images that both answer rightly."""
    x = to_float(images.x)
    with torch.no_grad():
        right = (trained(x).argmax(1) == images.y) & (rounded(x).argmax(1) == images.y)
    return x[right], images.y[right]


def apart(trained, rounded, x, y):
    with torch.no_grad():
        return ((trained(x).argmax(1) == y) & (rounded(x).argmax(1) != y)).float().mean()


def test_it_sets_two_networks_apart_more_often_than_pgd(trained, rounded, known):
    x, y = known
    made = diva(rounded, x, y, original=trained, eps=EPS, step_size=EPS / 8, generator=generator(0))
    other = pgd(rounded, x, y, eps=EPS, steps=20, generator=generator(0))
    assert float((made - x).abs().max()) <= EPS
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert apart(trained, rounded, made, y) > apart(trained, rounded, other, y)
    assert apart(trained, rounded, made, y) > 0


def test_the_loss_is_that_of_the_paper(trained, rounded, known):
    """One tiny step from the image moves along the sign of the gradient of p_original(y) - c * p_model(y)."""
    x, y = (part[:8] for part in known)
    size = 1e-3
    made = diva(rounded, x, y, original=trained, c=2.0, eps=EPS, steps=1, step_size=size, generator=generator(0))
    points = x.clone().requires_grad_()
    loss = (trained(points).softmax(1) - 2 * rounded(points).softmax(1)).gather(1, y[:, None]).sum()
    [slope] = torch.autograd.grad(loss, [points])
    assert torch.allclose(made, (x + size * slope.sign()).clamp(0, 1), atol=1e-6)


def test_apart_is_one_right_and_the_other_wrong():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    logits = torch.tensor([right + right, right + wrong, wrong + right, wrong + wrong])
    assert _Apart("margin").reached(logits, torch.zeros(4, dtype=torch.int64)).tolist() == [False, True, False, False]


def test_the_heavier_the_mistake_weighs_the_more_often_it_is_made(trained, rounded, known):
    x, y = known
    wrong = []
    for c in (0.1, 10.0):
        made = diva(rounded, x, y, original=trained, c=c, eps=EPS, step_size=EPS / 8, generator=generator(0))
        with torch.no_grad():
            wrong.append(float((rounded(made).argmax(1) != y).float().mean()))
    assert wrong[0] < wrong[1]


def test_with_every_gradient_it_is_no_weaker(trained, rounded, known):
    x, y = known
    given = {"eps": EPS, "step_size": EPS / 8}
    alone = diva(rounded, x, y, original=trained, **given, generator=generator(0))
    best = divergence_attack(trained, given)(rounded, x, y, generator(0))
    assert apart(trained, rounded, best, y) >= apart(trained, rounded, alone, y) - 0.02  # as files keep them


def test_networks_stay_as_they_were(trained, rounded, known):
    x, y = (part[:8] for part in known)
    before = [tensor.clone() for network in (trained, rounded) for tensor in network.state_dict().values()]
    diva(rounded, x, y, original=trained, eps=EPS, steps=2, generator=generator(0))
    after = [tensor for network in (trained, rounded) for tensor in network.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for network in (trained, rounded) for p in network.parameters())


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"c": 0.0}, MethodError, r"c must lie in"),
        ({"steps": 0}, MethodError, r"steps must lie in"),
        ({"eps": 2.0}, MethodError, r"eps must lie in"),
        ({"y": 7}, DataError, r"labels must lie in \[0, 2\]"),
    ],
)
def test_mistakes_are_told(trained, rounded, known, given, error, said):
    x, y = (part[:4] for part in known)
    y = y if "y" not in given else torch.full_like(y, given.pop("y"))
    with pytest.raises(error, match=said):
        diva(rounded, x, y, original=trained, **given, generator=generator(0))


def test_networks_with_other_classes_are_refused(trained, known):
    x, y = (part[:4] for part in known)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5))
    with pytest.raises(ModelError, match=r"the same classes: the one before answers with \(3,\), the one after with \(5,\)"):
        diva(wide, x, y, original=trained, generator=generator(0))


def test_its_steps_reach_any_budget(trained, rounded, known):
    x, y = (part[:8] for part in known)
    attack = divergence_attack(trained, {"eps": 0.5})
    assert attack.settings["step_size"] == pytest.approx(2.5 * 0.5 / 20)
    assert divergence_attack(trained, {"eps": 8 / 255}).settings["step_size"] == pytest.approx(1 / 255)
    moved = attack(rounded, x, y, generator(0))
    assert float((moved - x).abs().max()) > 0.4
