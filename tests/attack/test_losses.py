"""Losses against their formulas, logit by logit."""

import pytest
import torch

from secateur.attack.losses import Aim, cross_entropy, dlr, margin, together
from secateur.errors import DataError, MethodError
from secateur.state import generator

LOGITS = 3 * torch.randn(40, 6, generator=generator(0))
Y = torch.randint(6, (40,), generator=generator(1))


def by_hand(name, z, y):
    ordered = sorted(z, reverse=True)
    rival = max(value for i, value in enumerate(z) if i != y)
    if name == "margin":
        return rival - z[y]
    return (rival - z[y]) / (ordered[0] - ordered[2])


@pytest.mark.parametrize(("name", "loss"), [("margin", margin), ("dlr", dlr)])
@pytest.mark.parametrize("shift", [0, -100, 100], ids=lambda shift: f"shift{shift}")
def test_formula(name, loss, shift):
    """Also where all logits are negative, where some libraries' loss collapses."""
    found = loss(LOGITS + shift, Y)
    expected = torch.tensor([by_hand(name, z, y) for z, y in zip((LOGITS + shift).tolist(), Y.tolist(), strict=True)])
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found > 0, (LOGITS + shift).argmax(dim=1) != Y)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_a_gradient_is_left_when_all_logits_are_negative(loss):
    logits = (LOGITS - 100).requires_grad_()
    right = LOGITS.argmax(dim=1)
    [slope] = torch.autograd.grad(loss(logits, right).sum(), [logits])
    assert bool((slope.abs().sum(dim=1) > 0).all())
    assert bool((slope.gather(1, right[:, None]) < 0).all())


def test_scale_does_not_change_dlr_and_silences_cross_entropy():
    assert torch.allclose(dlr(1000 * LOGITS + 7, Y), dlr(LOGITS, Y), atol=1e-3)
    right = LOGITS.argmax(dim=1)
    sure = (1000 * LOGITS).requires_grad_()
    [slope] = torch.autograd.grad(cross_entropy(sure, right).sum(), [sure])
    assert float((slope.abs().sum(dim=1) == 0).float().mean()) > 0.8


def test_aims():
    aim, wanted = Aim("margin"), Aim("margin", targeted=True)
    assert torch.equal(aim.value(LOGITS, Y), -wanted.value(LOGITS, Y))
    assert torch.equal(aim.reached(LOGITS, Y), LOGITS.argmax(dim=1) != Y)
    assert torch.equal(wanted.reached(LOGITS, Y), LOGITS.argmax(dim=1) == Y)


def test_draws_are_averaged_by_probability():
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    draws = torch.stack([sure, unsure, unsure])
    mean = draws.softmax(dim=-1).mean(dim=0)
    assert torch.allclose(together(draws).softmax(dim=1), mean)
    y = torch.tensor([1])
    assert float(Aim("cross-entropy").value(draws, y)) == pytest.approx(
        sum(float(cross_entropy(draw, y)) for draw in draws) / 3
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_dlr_needs_four_classes(classes):
    with pytest.raises(MethodError, match=f"'dlr' needs at least 4 classes, got {classes}; use 'margin'"):
        Aim("dlr").check(LOGITS[:, :classes], Y.clamp(max=classes - 1))


def test_labels_must_be_classes():
    with pytest.raises(DataError, match=r"labels must lie in \[0, 4\] \(the network has 5 classes\), got 5"):
        Aim("margin").check(LOGITS[:, :5], Y)


def test_unknown_losses_suggest_the_nearest():
    with pytest.raises(MethodError, match="did you mean 'cross-entropy'"):
        Aim("crossentropy")
