"""PGD and FGSM against closed forms, what they cost, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from attacked_models import Counting, Linear, Scaled, accuracy, distance, grey, linear

from secateur.attack import fgsm, pgd, random_noise
from secateur.attack.ball import Ball
from secateur.attack.common import climb
from secateur.attack.losses import Aim
from secateur.attack.network import Network
from secateur.state import generator

SHAPE = (2, 5, 4)
ATTACKS = pytest.mark.parametrize("attack", [fgsm, pgd], ids=["fgsm", "pgd"])


@ATTACKS
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_two_classes_linf_is_the_sign_of_the_weights(attack, loss):
    model, x, y = linear(2, 40), grey(9, SHAPE), torch.arange(9) % 2
    weight = (model.linear.weight[1] - model.linear.weight[0]).detach().reshape(SHAPE)
    best = x + 0.1 * torch.where(y == 0, 1, -1)[:, None, None, None] * weight.sign()
    adv = attack(model, x, y, eps=0.1, loss=loss, generator=generator(0))
    assert torch.allclose(adv, best, atol=1e-6)


@ATTACKS
def test_two_classes_l2_is_along_the_weights(attack):
    model, x, y = linear(2, 40), grey(9, SHAPE), torch.arange(9) % 2
    weight = (model.linear.weight[1] - model.linear.weight[0]).detach().reshape(SHAPE)
    best = x + 0.2 * torch.where(y == 0, 1, -1)[:, None, None, None] * weight / weight.norm()
    steps = {} if attack is fgsm else {"steps": 20, "step_size": 0.4}
    adv = attack(model, x, y, eps=0.2, norm="l2", generator=generator(0), **steps)
    assert torch.allclose(adv, best, atol=1e-4)


def margins_reached(model, x, y, eps, norm):
    """The largest margin any image within the budget has, for a linear network without clipping: by the dual norm."""
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()
    logits = x.flatten(1) @ weight.T + bias
    pull = weight[None] - weight[y][:, None]
    reach = pull.abs().sum(dim=2) if norm == "linf" else pull.norm(dim=2)
    found = logits - logits.gather(1, y[:, None]) + eps * reach
    return found.scatter(1, y[:, None], -torch.inf).amax(dim=1)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3)])
def test_many_classes_reach_the_certified_optimum(norm, eps):
    """With restarts PGD breaks exactly the images that can be broken, by the closed form of a linear network."""
    model, x = linear(6, 40), grey(120, SHAPE)
    y = model(x).argmax(dim=1)
    can = margins_reached(model, x, y, eps, norm) > 1e-3
    cannot = margins_reached(model, x, y, eps, norm) < -1e-3
    assert 20 < int(can.sum()) < 115
    adv = pgd(model, x, y, eps=eps, norm=norm, loss="margin", steps=20, restarts=8, generator=generator(0))
    broken = model(adv).argmax(dim=1) != y
    assert not bool((broken & cannot).any())
    assert float(broken[can].float().mean()) > 0.98


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5)])
def test_the_budget_holds_exactly_on_real_images(norm, eps, hardened):
    adv = pgd(hardened.model, hardened.x, hardened.y, eps=eps, norm=norm, steps=4, generator=generator(0))
    assert float(distance(adv, hardened.x, norm).max()) <= eps
    assert 0 <= float(adv.min()) <= float(adv.max()) <= 1
    assert adv.shape == hardened.x.shape
    assert adv.dtype == torch.float32


def test_targeted_goes_where_it_is_told():
    model, x = linear(5, 40), grey(60, SHAPE)
    y = (model(x).argmax(dim=1) + 1) % 5
    for attack in (fgsm, pgd):
        adv = attack(model, x, y, eps=0.3, targeted=True, generator=generator(0))
        assert accuracy(model, adv, y) > accuracy(model, x, y) + 0.5
    assert accuracy(model, pgd(model, x, y, eps=0.3, targeted=True, generator=generator(0)), y) == 1


@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_logits_times_a_thousand_fool_cross_entropy_alone(loss, hardened):
    model, x, y = Scaled(hardened.model, 1000).eval(), hardened.x[:200], hardened.y[:200]
    plain = accuracy(model, pgd(hardened.model, x, y, eps=0.2, loss=loss, generator=generator(0)), y)
    scaled = accuracy(model, pgd(model, x, y, eps=0.2, loss=loss, generator=generator(0)), y)
    silenced = accuracy(model, pgd(model, x, y, eps=0.2, generator=generator(0)), y)
    assert abs(plain - scaled) <= 0.02
    assert silenced > scaled + 0.1


def test_more_steps_and_more_starts_break_more(hardened):
    def rate(**settings):
        adv = pgd(hardened.model, hardened.x, hardened.y, eps=hardened.eps, generator=generator(0), **settings)
        return accuracy(hardened.model, adv, hardened.y)

    one, ten, starts = rate(steps=1), rate(steps=10), rate(steps=10, restarts=3)
    noise = random_noise(hardened.model, hardened.x, hardened.y, eps=hardened.eps, generator=generator(0))
    assert starts <= ten < one < accuracy(hardened.model, noise, hardened.y)
    assert 0.3 < ten < 0.8


def test_a_later_start_forgets_nothing(hardened):
    """The same first start, then others: what it broke stays broken, though each start alone misses some of it."""
    x, y = hardened.x[:200], hardened.y[:200]

    def broken(restarts):
        adv = pgd(hardened.model, x, y, eps=0.1, steps=2, restarts=restarts, generator=generator(2))
        return hardened.model(adv).argmax(dim=1) != y

    one, four = broken(1), broken(4)
    assert not bool((one & ~four).any())
    assert int(four.sum()) > int(one.sum())


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("targeted", [False, True], ids=["away", "towards"])
def test_dropping_what_is_broken_breaks_the_same(restarts, norm, eps, targeted, hardened):
    model, x, y = hardened.model, hardened.x[:120], hardened.y[:120]
    wanted = (y + 1) % 10 if targeted else y
    answers = []
    for drop in (False, True):
        adv = pgd(
            model, x, wanted, eps=eps, norm=norm, steps=5, restarts=restarts, drop_broken=drop, targeted=targeted,
            generator=generator(4),
        )  # fmt: skip
        assert float(distance(adv, x, norm).max()) <= eps
        answers.append(model(adv).argmax(dim=1) == wanted)
    assert torch.equal(*answers)
    assert 0 < int(answers[0].sum()) < len(y)


def test_one_forward_a_step_and_fewer_images_when_dropping(hardened):
    x, y = hardened.x[:100], hardened.y[:100]
    for drop, restarts in ((False, 1), (True, 1), (False, 2)):
        model = Counting(hardened.model)
        model.register_forward_hook(lambda *_: None)  # so that it is counted itself and no copy of it
        pgd(model, x, y, eps=0.1, steps=7, restarts=restarts, drop_broken=drop, generator=generator(0))
        assert model.calls == 7 * restarts + (restarts - 1)
        assert (model.images < 700) if drop else (model.images == 100 * model.calls)


def test_a_version_that_broke_the_image_on_the_way_is_kept():
    """A network that only a thin shell fools: the last points are past it, those kept are in it."""

    class Shell(torch.nn.Module):
        def forward(self, x):
            s = x.flatten(1).mean(dim=1)
            return torch.stack([torch.zeros_like(s), 0.06 - (s - 0.65).abs() + 0.001 * s], dim=1)

    model, x, y = Shell(), torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    settings = {"eps": 0.4, "steps": 4, "step_size": 0.1, "random_start": False}
    ball = Ball(x, 0.4, "linf")

    def onward(ball, points, slope):
        return ball.project(points + 0.1)

    network = Network(model, None, torch.contiguous_format)
    last = climb(network, ball, y, x, steps=4, aim=Aim("margin"), move=onward, keep=False)[0]
    kept = climb(network, ball, y, x, steps=4, aim=Aim("margin"), move=onward)[0]
    dropped = climb(network, ball, y, x, steps=4, aim=Aim("margin"), move=onward, drop=True)[0]
    assert accuracy(model, last, y) == 1
    assert accuracy(model, kept, y) == accuracy(model, dropped, y) == 0
    assert float(kept.mean()) == pytest.approx(0.7)  # of 0.6 and 0.7, both broken, the higher loss is at ...
    assert float(dropped.mean()) == pytest.approx(0.6)  # ... and this came first
    assert accuracy(model, pgd(model, x, y, generator=generator(0), **settings), y) == 0


def test_the_default_step_is_that_of_the_docs():
    x, y = grey(3, SHAPE), torch.zeros(3, dtype=torch.int64)
    model = Linear(torch.randn(2, 40, generator=generator(0)), torch.tensor([1000.0, 0.0]))  # nothing breaks it
    step = {"steps": 3, "random_start": False, "loss": "margin", "generator": generator(0)}
    assert torch.equal(pgd(model, x, y, eps=0.1, **step), pgd(model, x, y, eps=0.1, step_size=0.25 / 3, **step))
    short = pgd(model, x, y, eps=0.1, step_size=0.01, **step)
    assert distance(short, x, "linf") == pytest.approx(torch.full((3,), 0.03).double(), rel=1e-5)


def test_a_zero_gradient_moves_nothing_and_breaks_nothing():
    model = Linear(torch.zeros(2, 40), torch.tensor([1.0, 0.0]))
    x, y = grey(4, SHAPE), torch.zeros(4, dtype=torch.int64)
    for norm in ("linf", "l2"):
        assert torch.equal(pgd(model, x, y, norm=norm, random_start=False, generator=generator(0)), x)


def test_it_climbs_the_true_gradient(hardened):
    """One small L2 step from the image goes along the gradient that autograd gives for the network itself."""
    inner, y = (0.3 + 0.4 * hardened.x[:40]).requires_grad_(), hardened.y[:40]
    [slope] = torch.autograd.grad(F.cross_entropy(hardened.model(inner), y, reduction="sum"), [inner])
    inner = inner.detach()
    adv = pgd(
        hardened.model, inner, y, eps=0.01, norm="l2", steps=1, step_size=0.01, random_start=False, generator=generator(0)
    )
    along = F.cosine_similarity((adv - inner).flatten(1), slope.flatten(1))
    wrong = hardened.model(inner).argmax(dim=1) != y
    assert bool((along[~wrong] > 0.999).all())
    assert torch.equal(adv[wrong], inner[wrong])  # wrong as it is: that version is kept
