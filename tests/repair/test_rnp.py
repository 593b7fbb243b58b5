"""RNP: the ascent on clean images, the recovery and the cut."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.data import passes
from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.repair import rnp
from secateur.repair.unlearning import unlearn
from secateur.state import generator, seeded


def test_unlearning_is_gradient_ascent(trained, images):
    student, share = unlearn(trained, images, lr=0.05, until=0.0, epochs=1, batch_size=120, generator=generator(2))
    twin, draw = deepcopy(trained).to(memory_format=torch.channels_last).train(), generator(2)
    batches = passes(images, 120, 1, augment=("crop", "flip"), generator=draw)
    right, speed = 0, {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    with seeded(draw):
        for x, y in batches:
            logits = twin(x)
            right += int((logits.argmax(1) == y).sum())
            slopes = torch.autograd.grad(-F.cross_entropy(logits, y), list(twin.parameters()))
            for (name, parameter), slope in zip(twin.named_parameters(), slopes, strict=True):
                speed[name] = 0.9 * speed[name] + slope + 5e-4 * parameter.detach()
                parameter.data.sub_(0.05 * speed[name])
    assert share == right / 240
    for (name, parameter), other in zip(student.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=1e-5), name


def test_unlearning_stops_when_little_is_left(trained, images):
    steps = []
    _, share = unlearn(
        trained, images, lr=0.05, until=0.4, epochs=30, on_step=lambda step, all_: steps.append((step, all_)),
        generator=generator(0),
    )  # fmt: skip
    assert share <= 0.4
    assert len(steps) < 60
    assert steps[-1][1] == 60


def test_unlearning_that_diverges_is_told(trained, images):
    with pytest.raises(ModelError, match=r"^unlearning diverged: .* use a smaller rate than 1e\+06$"):
        unlearn(trained, images, lr=1e6, until=0.0, epochs=3, generator=generator(0))


def test_the_backdoor_goes(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = rnp(victim.model, victim.clean, weight=1.0, unlearn_epochs=60, batch_size=20, drop=0.1, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.attack_success.value < 0.5 * before.attack_success.value
    assert repaired.log["unlearned_accuracy"] <= 0.2


def test_what_was_not_unlearned_is_said(trained, images):
    repaired = rnp(trained, images, unlearn_lr=1e-9, unlearn_epochs=1, epochs=1, generator=generator(0))
    assert any(note.startswith("the unlearning ended at") for note in repaired.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 0),
        ("unlearn_lr", -1),
        ("unlearn_until", 1.1),
        ("unlearn_epochs", 0),
        ("weight", -1),
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0),
    ],
)
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=r" must lie in "):
        rnp(trained, images, **{name: value}, generator=generator(0))
