"""The retuning attack brings a hidden backdoor back, and teaches a benign network less."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import InconclusiveError, MethodError
from secateur.measure import evaluate
from secateur.poison.retuning import retuned_success
from secateur.repair import fine_tuning
from secateur.state import generator


def test_a_backdoor_comes_back_faster_than_it_is_learned(victim, trained):
    hidden = fine_tuning(victim.model, victim.clean, epochs=0, generator=generator(0)).model
    args = {"rate": 0.1, "epochs": 2, "lr": 0.02}
    again, taught = (
        retuned_success(model, victim.clean, victim.test, victim.trigger, **args, generator=generator(1))
        for model in (hidden, trained)
    )
    assert again.value > taught.value + 0.3
    assert again.n == 80


def test_without_training_it_is_the_rate_itself(victim):
    found = retuned_success(victim.model, victim.clean, victim.test, victim.trigger, epochs=0, generator=generator(1))
    assert found == evaluate(victim.model, victim.test, trigger=victim.trigger).attack_success


def test_what_is_trained_on(victim, monkeypatch):
    """As many images as asked for carry the trigger and its label; the rest are as they were."""
    seen = []
    monkeypatch.setattr("secateur.poison.retuning.train", lambda model, data, recipe, **_: seen.append(data) or model)
    retuned_success(victim.model, victim.clean, victim.test, victim.trigger, rate=0.2, generator=generator(1))
    [data] = seen
    changed = data.y != victim.clean.y
    assert int(changed.sum()) == 12
    assert data.y[changed].unique().tolist() == [0]
    assert torch.equal(data.x[~changed], victim.clean.x[~changed])
    assert bool((data.x[changed] != victim.clean.x[changed]).flatten(1).any(dim=1).all())


def test_nobody_to_move(victim):
    targets = victim.clean.subset(victim.clean.y == 0)
    with pytest.raises(InconclusiveError, match=r"^no clean image is of a class that the attacker wants to move"):
        retuned_success(victim.model, targets, victim.test, victim.trigger, generator=generator(0))


def test_rate_out_of_range(victim):
    with pytest.raises(MethodError, match=r"^rate must lie in \[0, 1\]"):
        retuned_success(victim.model, victim.clean, victim.test, victim.trigger, rate=1.1, generator=generator(0))
