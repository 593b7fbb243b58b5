"""Agreement with foolbox and torchattacks within a point of accuracy, on a network that PGD breaks in part."""

import copy
import importlib
import warnings

import pytest
import torch
from attacked_models import accuracy, distance

from secateur.attack import fgsm, mi_fgsm, pgd
from secateur.state import generator, seeded

POINT = 0.0101
STEPS = 10


def peer(name):
    """Import a peer; its own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"the peer {name} is not installed: {error}")


def agree(hardened, adv, theirs, norm, eps):
    assert float(distance(theirs, hardened.x, norm).max()) <= eps * (1 + 1e-5)
    assert float(distance(adv, hardened.x, norm).max()) <= eps
    ours, others = (accuracy(hardened.model, points, hardened.y) for points in (adv, theirs))
    assert 0.15 < others < 0.8
    assert abs(ours - others) <= POINT


@pytest.mark.parametrize(("norm", "eps", "name"), [("linf", 0.1, "LinfPGD"), ("l2", 1.2, "L2PGD")])
def test_pgd_and_foolbox(norm, eps, name, hardened):
    foolbox = peer("foolbox")
    model = foolbox.PyTorchModel(copy.deepcopy(hardened.model), bounds=(0, 1), device="cpu")
    settings = {"abs_stepsize": 2.5 * eps / STEPS, "steps": STEPS, "random_start": True}
    with seeded(generator(3)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(foolbox.attacks, name)(**settings)(model, hardened.x, hardened.y, epsilons=eps)[1]
    adv = pgd(hardened.model, hardened.x, hardened.y, eps=eps, norm=norm, steps=STEPS, generator=generator(0))
    agree(hardened, adv, theirs, norm, eps)


def test_fgsm_and_foolbox(hardened):
    foolbox = peer("foolbox")
    model = foolbox.PyTorchModel(copy.deepcopy(hardened.model), bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.FGSM()(model, hardened.x, hardened.y, epsilons=0.1)[1]
    adv = fgsm(hardened.model, hardened.x, hardened.y, eps=0.1, generator=generator(0))
    agree(hardened, adv, theirs, "linf", 0.1)
    assert float((adv - theirs).abs().gt(1e-6).float().mean()) < 0.001


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "FGSM", "MIFGSM"])
def test_torchattacks(name, hardened):
    torchattacks = peer("torchattacks")
    model = copy.deepcopy(hardened.model)
    norm, eps = ("l2", 1.2) if name == "PGDL2" else ("linf", 0.1)
    size = 2.5 * eps / STEPS
    settings, ours = {
        "PGD": ({"alpha": size, "steps": STEPS}, lambda *given, **more: pgd(*given, steps=STEPS, **more)),
        "PGDL2": ({"alpha": size, "steps": STEPS}, lambda *given, **more: pgd(*given, steps=STEPS, **more)),
        "FGSM": ({}, fgsm),
        "MIFGSM": ({"alpha": eps / STEPS, "steps": STEPS}, mi_fgsm),
    }[name]
    with seeded(generator(3)):
        theirs = getattr(torchattacks, name)(model, eps=eps, **settings)(hardened.x, hardened.y).detach()
    adv = ours(hardened.model, hardened.x, hardened.y, eps=eps, norm=norm, generator=generator(0))
    agree(hardened, adv, theirs, norm, eps)
    assert torch.isfinite(theirs).all()
