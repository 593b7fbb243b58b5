"""APGD and AutoAttack: as strong as the authors' own run, without its side effects."""

import copy
import logging
import sys

import pytest
import torch
from attacked_models import accuracy, distance, linear
from torch import nn

from secateur.attack import apgd, autoattack, pgd
from secateur.attack.ensemble import _tiled
from secateur.errors import DataError, MethodError, ModelError
from secateur.state import generator

BOTH = pytest.mark.parametrize("attack", [apgd, autoattack])
QUICK = {apgd: {"steps": 10}, autoattack: {"steps": 5, "queries": 30}}


@pytest.fixture(autouse=True)
def authors():
    return pytest.importorskip("pyautoattack", reason="the extra robust is not installed")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
def test_it_breaks_what_the_authors_run_breaks(norm, eps, authors, hardened):
    x, y = hardened.x[:50], hardened.y[:50]
    theirs = authors.AutoAttack(
        copy.deepcopy(hardened.model), attacks=["apgd-ce", "apgd-t", "fab-t", "square"], eps=eps, seed=1, version="custom",
        norm={"linf": "Linf", "l2": "L2"}[norm],
    )  # fmt: skip
    theirs.apgd.n_restarts = theirs.fab.n_restarts = 1
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = part.n_iter_orig = 10
    theirs.square.n_queries = 100
    trace, rng = sys.gettrace(), torch.get_rng_state()
    theirs.logger.setLevel(logging.CRITICAL)
    adv, _ = theirs.run_standard_evaluation(x, y)
    sys.settrace(trace)
    torch.set_rng_state(rng)
    ours = autoattack(hardened.model, x, y, eps=eps, norm=norm, steps=10, queries=100, generator=generator(0))
    assert float(distance(ours, x, norm).max()) <= eps
    assert accuracy(hardened.model, ours, y) == pytest.approx(accuracy(hardened.model, adv, y), abs=0.021)
    plain = pgd(hardened.model, x, y, eps=eps, norm=norm, generator=generator(0))
    assert accuracy(hardened.model, ours, y) <= accuracy(hardened.model, plain, y)


@BOTH
def test_nothing_of_the_caller_changes(attack, hardened):
    model = copy.deepcopy(hardened.model).train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def trace(*_):
        return None

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        found = attack(model, hardened.x[:20], hardened.y[:20], eps=0.1, **QUICK[attack], generator=generator(0))
        assert sys.gettrace() is trace
    finally:
        sys.settrace(old)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())
    evaluated = attack(hardened.model, hardened.x[:20], hardened.y[:20], eps=0.1, **QUICK[attack], generator=generator(0))
    assert torch.equal(found, evaluated)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_few_classes(classes, version):
    """On linear networks what can be broken is broken; DLR is left out below four classes."""
    model, x = linear(classes, 64), torch.rand(12, 1, 8, 8, generator=generator(0))
    y = model(x).argmax(dim=1)
    adv = autoattack(model, x, y, eps=0.5, version=version, steps=4, queries=10, generator=generator(0))
    assert accuracy(model, adv, y) == 0


def test_apgd_on_dlr_sees_through_scaled_logits(hardened):
    from attacked_models import Scaled

    x, y, model = hardened.x[:80], hardened.y[:80], Scaled(hardened.model, 1000)
    on_entropy = apgd(model, x, y, eps=0.12, steps=10, generator=generator(0))
    on_dlr = apgd(model, x, y, eps=0.12, steps=10, loss="dlr", generator=generator(0))
    assert accuracy(model, on_dlr, y) < accuracy(model, on_entropy, y) - 0.1


@pytest.mark.parametrize("side", [4, 12, 28])
def test_square_for_l2_on_images_that_their_grid_does_not_fit(side):
    assert _tiled(side, side) == (side == 28)
    model, x = linear(3, side * side), torch.rand(6, 1, side, side, generator=generator(0))
    y = model(x).argmax(dim=1)
    adv = autoattack(model, x, y, eps=0.05, norm="l2", steps=2, queries=5, generator=generator(0))
    assert float(distance(adv, x, "l2").max()) <= 0.05


@BOTH
def test_a_missing_extra_is_one_line(attack, hardened, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pyautoattack")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    name = attack.__name__
    with pytest.raises(MethodError, match=rf"^{name} needs pyautoattack; run: pip install secateur\[robust\]$"):
        attack(hardened.model, hardened.x[:2], hardened.y[:2], generator=generator(0))


def test_bad_input(hardened):
    x, y = hardened.x[:2], hardened.y[:2]
    with pytest.raises(MethodError, match=r"unknown loss 'margin'; choose from: cross-entropy, dlr"):
        apgd(hardened.model, x, y, loss="margin", generator=generator(0))
    with pytest.raises(MethodError, match=r"unknown version 'standardd'; did you mean 'standard'\?"):
        autoattack(hardened.model, x, y, version="standardd", generator=generator(0))
    with pytest.raises(MethodError, match=r"queries must lie in \[1, "):
        autoattack(hardened.model, x, y, queries=0, generator=generator(0))
    with pytest.raises(MethodError, match="'dlr' needs at least 4 classes, got 3"):
        apgd(linear(3, 784), x, torch.zeros(2).long(), loss="dlr", generator=generator(0))
    with pytest.raises(DataError, match=r"labels must lie in \[0, 9\]"):
        autoattack(hardened.model, x, y + 10, generator=generator(0))


@pytest.mark.parametrize("attack", [apgd, autoattack])
def test_no_gradient_is_told(attack, trained, images):
    class Detached(nn.Module):
        def forward(self, x):
            return trained(x.detach())

    with pytest.raises(ModelError, match=r"passes no gradient back to the images"):
        attack(Detached(), images.x[:6], images.y[:6], eps=0.1, steps=2, generator=generator(0))
