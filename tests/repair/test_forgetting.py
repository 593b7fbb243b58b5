"""Forgetting takes the steps of its formula, keeps what is cut, and takes a known trigger out."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_images
from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.models import core
from secateur.prune.mask import apply_mask
from secateur.repair.forgetting import between, forget
from secateur.state import generator
from secateur.types import Trigger, WeightMask, to_float

GREY = Trigger("blend", {"alpha": 0.5}, {"mask": torch.ones(1, 12, 12), "pattern": torch.full((1, 12, 12), 0.5)}, 0)


@pytest.mark.parametrize(("trust", "share"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.0), (0.7, 1.0)])
def test_a_step_follows_the_formula(trust, share, trained, images):
    few = images.subset(torch.arange(8))
    healed = forget(
        trained, few, [GREY], epochs=1, lr=0.1, batch_size=8, share=share, rho=0, trust=trust, generator=generator(0)
    )
    x, y = to_float(few.x), few.y
    with torch.no_grad():
        known = (trained(x) / 2).softmax(1)
    by_hand = deepcopy(trained).train()
    logits = by_hand(x / 2 + 0.25 if share else x)
    apart = (known * (known.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    ((1 - trust) * F.cross_entropy(logits, y) + trust * 4 * apart).backward()
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - 0.1 * 0.5 * parameter.grad  # the cosine in the middle of the only step
        assert torch.allclose(healed.get_parameter(name), expected, atol=1e-5), name
    assert not healed.training


def test_sharp_steps_are_other_steps(trained, images):
    few = images.subset(torch.arange(16))
    flat, sharp = (forget(trained, few, [], epochs=1, rho=rho, generator=generator(0)) for rho in (0.0, 2.0))
    assert any(not torch.equal(a, b) for a, b in zip(flat.parameters(), sharp.parameters(), strict=True))


def test_it_takes_a_known_trigger_out_and_keeps_accuracy(victim):
    clean = make_images(120, 9)
    healed = forget(victim.model, clean, [victim.trigger], epochs=10, lr=0.05, batch_size=20, share=0.3, generator=generator(0))
    before, after = (evaluate(net, victim.test, trigger=victim.trigger) for net in (victim.model, healed))
    assert after.attack_success is not None
    assert after.attack_success.value < 0.2
    assert after.accuracy.value > before.accuracy.value - 0.05


def test_without_the_trigger_the_backdoor_stays(victim):
    """What takes it out is the trigger, not the training."""
    healed = forget(victim.model, make_images(120, 9), [], epochs=10, lr=0.05, batch_size=20, rho=0, generator=generator(0))
    after = evaluate(healed, victim.test, trigger=victim.trigger)
    assert after.attack_success is not None
    assert after.attack_success.value > 0.7


def test_what_was_cut_stays_cut_and_the_teacher_may_be_another(trained, images):
    """A weight at 0 whose bias still speaks has a gradient: without the mask it grows back."""
    site, channels = next((name, m.num_features) for name, m in core(trained).named_modules() if isinstance(m, nn.BatchNorm2d))
    mask = WeightMask({f"{site}.weight": torch.arange(channels) > 0})
    cut = apply_mask(trained, mask)
    tune = partial(forget, cut, images, [], epochs=2, lr=0.05, rho=0, trust=1.0)
    free, own, others = (
        tune(mask=held, teacher=teacher, generator=generator(0))
        for held, teacher in ((None, None), (mask, None), (mask, trained))
    )
    first = [float(net.get_parameter(f"net.{site}.weight")[0].detach()) for net in (free, own, others)]
    assert first[0] != 0
    assert first[1:] == [0, 0]
    assert any(not torch.equal(a, b) for a, b in zip(own.parameters(), others.parameters(), strict=True))


def test_dropout_stays_off():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(144, 3), nn.Dropout(0.9)

        def forward(self, x):
            return self.layer(self.drop(x.flatten(1)))

    torch.manual_seed(0)
    dropping, images = Dropping(), make_images(30, 1)
    plain = deepcopy(dropping)
    plain.drop.p = 0.0
    first, second = (forget(net, images, [], epochs=2, generator=generator(0)) for net in (dropping, plain))
    assert torch.equal(first.layer.weight, second.layer.weight)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"rho": -1.0}, {"trust": 2.0}, {"epochs": -1}, {"lr": 0.0}])
def test_arguments_out_of_range_are_refused(wrong, trained, images):
    with pytest.raises(MethodError):
        forget(trained, images, [], **wrong, generator=generator(0))


def test_training_that_diverges_is_an_error(trained, images):
    with pytest.raises(ModelError, match="diverged"):
        forget(trained, images, [], lr=1e6, epochs=20, batch_size=10, generator=generator(0))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_network_between_two_lies_on_the_line_between_them(victim, share):
    """Weights and running statistics; counters are those of the end."""
    after = forget(victim.model, make_images(60, 9), [], epochs=1, lr=0.05, generator=generator(0))
    middle = between(victim.model, after, share)
    start, end, found = victim.model.state_dict(), after.state_dict(), middle.state_dict()
    for name, value in end.items():
        wanted = start[name] + share * (value - start[name]) if value.is_floating_point() else value
        torch.testing.assert_close(found[name], wanted)
    assert not middle.training
    assert any(not torch.equal(start[name], value) for name, value in end.items())


def test_a_point_beyond_the_line_is_refused(victim):
    with pytest.raises(MethodError, match="share"):
        between(victim.model, victim.model, 1.5)
