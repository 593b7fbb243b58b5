"""Evidence: who is suspected, and what the numbers that judge candidates measure."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.detect import invert, strengthen
from secateur.errors import DataError, ModelError
from secateur.measure import evaluate
from secateur.repair import evidence
from secateur.repair.anp import adversarial_noise
from secateur.repair.evidence import examine, moved_by_noise, regrown, unlearned_class
from secateur.repair.forgetting import forget
from secateur.state import generator
from secateur.types import to_float

LOOK = partial(examine, steps=30, batch_size=8)


class Fixed(nn.Module):
    """Answers one class, whatever is shown."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(1, 1), answer

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.answer), 3).float() + 0 * self.layer.weight.sum()


def test_flagged_classes_are_the_suspects(victim, monkeypatch):
    monkeypatch.setattr(evidence, "suspected", partial(evidence.suspected, shortcut=1.0, anomaly=0.0))
    found = LOOK(victim.model, make_images(90, 9), generator=generator(0))
    assert found.flagged
    assert found.suspects[0] == 0
    assert [(each.target, each.kind) for each in found.smallest[:2]] == [(0, "sparse"), (0, "smooth")]
    assert {(each.target, each.kind) for each in found.smallest} == {
        (target, kind) for target in found.suspects for kind in ("patch", "sparse", "dense", "smooth")
    }


def test_when_none_is_flagged_unlearning_names_one(victim, monkeypatch):
    monkeypatch.setattr(evidence, "suspected", partial(evidence.suspected, shortcut=1e6))
    monkeypatch.setattr(evidence, "unlearned_class", lambda *args, **kwargs: 2)
    found = LOOK(victim.model, make_images(90, 9), generator=generator(0))
    assert not found.flagged
    assert found.suspects == (2,)
    assert "any network" in found.notes[1]
    assert {each.target for each in found.smallest} == {2}


def test_unlearning_that_diverges_leaves_the_guess_to_inversion(victim, monkeypatch):
    def diverge(*args, **kwargs):
        raise ModelError("unlearning diverged")

    monkeypatch.setattr(evidence, "suspected", partial(evidence.suspected, shortcut=1e6))
    monkeypatch.setattr(evidence, "unlearn", diverge)
    found = LOOK(victim.model, make_images(90, 9), generator=generator(0))
    assert not found.flagged
    assert found.log["healed_class"] == found.log["suspect"] == found.suspects[0]
    assert "unlearning failed" in found.notes[1]


def test_unlearning_ends_at_the_backdoor(victim):
    assert unlearned_class(victim.model, make_images(120, 9), generator=generator(0)) == 0


def test_unlearning_counts_images_of_other_classes(victim, monkeypatch):
    for answer in range(3):
        monkeypatch.setattr(evidence, "unlearn", lambda *args, answer=answer, **kwargs: (Fixed(answer), 0.0))
        assert unlearned_class(victim.model, make_images(40, 9), generator=generator(0)) == answer


def test_noise_moves_images_of_other_classes(victim):
    clean = make_images(40, 9)
    moved = moved_by_noise(victim.model, clean, generator=generator(1))
    random = generator(1)
    neurons = evidence.Neurons(victim.model, clean.shape)
    neurons.network.train()
    ones, sent, others = neurons.filled(1.0), torch.zeros(3), torch.zeros(3)
    for _ in range(4):
        order = torch.randperm(len(clean), generator=random)
        x, y = to_float(clean.x[order]), clean.y[order]
        noise = adversarial_noise(neurons, ones, x, y, eps=0.4, generator=random)
        answers = noise.logits(neurons, ones, x).argmax(1)
        for target in range(3):
            sent[target] += int(((answers == target) & (y != target)).sum())
            others[target] += int((y != target).sum())
    assert torch.allclose(moved, sent / others, atol=0.05)
    assert moved.shape == (3,)


def test_a_regrown_trigger_is_adapted_on_some_images_and_measured_on_others(victim):
    fitted, judged = make_images(80, 6), make_images(70, 7)
    [found] = invert(victim.model, fitted, [0], kind="patch", steps=60, batch_size=8, generator=generator(0))
    before = regrown(victim.model, fitted, judged, found, batch_size=8, generator=generator(0))
    grown = strengthen(victim.model, fitted, found, 1.0, steps=evidence.REGROWN, batch_size=8, generator=generator(0))
    rate = evaluate(victim.model, judged, trigger=grown.trigger).attack_success
    assert rate is not None
    assert before == rate.value > 0.7
    triggers = [victim.trigger, found.trigger]
    healed = forget(victim.model, make_images(120, 9), triggers, epochs=10, lr=0.05, batch_size=20, generator=generator(0))
    assert regrown(healed, fitted, judged, found, batch_size=8, generator=generator(0)) < before - 0.3


def test_no_more_than_three_suspects_are_followed(victim, monkeypatch):
    real = evidence.suspected

    def all_flagged(found):
        suspicion = real(found)
        return type(suspicion)((2, 1, 0, 2), *list(vars(suspicion).values())[1:])

    monkeypatch.setattr(evidence, "suspected", all_flagged)
    found = LOOK(victim.model, make_images(90, 9), steps=4, generator=generator(0))
    assert found.suspects == (2, 1, 0)


def test_noise_is_put_on_a_network_without_dropout():
    """What dropout moves is no sign of a backdoor: the answer is that of the same network without it."""

    class Net(nn.Module):
        def __init__(self, drop: float) -> None:
            super().__init__()
            self.conv, self.norm, self.drop, self.last = (
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.Dropout(drop),
                nn.Linear(4, 3),
            )

        def forward(self, x):
            return self.last(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))

    def moved(drop):
        torch.manual_seed(0)
        return moved_by_noise(Net(drop), make_images(80, 6), generator=generator(0))

    assert torch.equal(moved(0.9), moved(0.0))


def test_images_of_one_class_are_too_few(victim):
    clean = make_images(60, 9)
    with pytest.raises(DataError, match="at least 2 classes"):
        examine(victim.model, clean.subset(clean.y == 1), steps=4, generator=generator(0))
