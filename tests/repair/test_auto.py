"""The repair that chooses: what it tries, by what it chooses, and that it takes a backdoor out without having seen it."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.errors import DataError, MethodError, ModelError
from secateur.measure import evaluate, wilson
from secateur.models import core
from secateur.prune.mask import apply_mask
from secateur.repair.auto import Tried, auto
from secateur.state import generator
from secateur.types import ImageSet, Repaired, WeightMask

module = sys.modules["secateur.repair.auto"]
QUICK = partial(auto, steps=20, iterations=10, epochs=4, lr=0.05)


def candidate(name, accuracy, lost, risk, error=0.0):
    return Tried(name, Repaired(nn.Identity(), None), wilson(accuracy, 100), lost, error, risk, risk)


@pytest.mark.parametrize(
    ("tried", "chosen"),
    [
        ([("as it is", 90, 0.0, 0.9), ("cut", 89, 0.01, 0.1)], "cut"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 80, 0.1, 0.1)], "as it is"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 89, 0.01, 0.12), ("healed", 88, 0.02, 0.1)], "cut"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 88, 0.02, 0.1), ("healed", 89, 0.01, 0.12)], "healed"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 89, 0.01, 0.19), ("healed", 88, 0.02, 0.1)], "healed"),
        ([("as it is", 90, 0.0, 0.02), ("cut", 89, 0.01, 0.0)], "as it is"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 80, 0.1, 0.0), ("healed", 88, 0.02, 0.5)], "healed"),
        ([("as it is", 90, 0.0, 0.9), ("cut", 87, 0.03, 0.1, 0.015), ("healed", 88, 0.02, 0.5)], "cut"),
    ],
)
def test_the_lowest_risk_that_accuracy_allows_is_chosen_and_accuracy_decides_between_like_ones(tried, chosen):
    assert module._best([candidate(*each) for each in tried], 0.02).name == chosen


def only(monkeypatch, *names):
    """Try these alone."""
    every = module._attempts
    monkeypatch.setattr(module, "_attempts", lambda *given: [each for each in every(*given) if each[0] in names])


@pytest.fixture
def one_mask(monkeypatch):
    """Try one mask, the one that costs nothing, and healing."""
    only(monkeypatch, "clp", "healed")


@pytest.fixture
def never_clear(monkeypatch):
    """Try everything."""
    monkeypatch.setattr(module, "CLEAR", -1.0)


@pytest.fixture(scope="module")
def repaired(victim):
    return QUICK(victim.model, make_images(150, 9), drop=0.05, generator=generator(0))


def test_it_takes_a_backdoor_out(victim, repaired):
    before, after = (evaluate(net, victim.test, trigger=victim.trigger) for net in (victim.model, repaired.model))
    assert after.attack_success is not None
    assert after.attack_success.value < 0.3
    assert after.accuracy.value > before.accuracy.value - 0.08
    assert repaired.log["healed_class"] == 0
    assert repaired.log["risk"] < repaired.log["risk_before"]


def test_it_says_what_it_tried_and_chose(repaired):
    names = [note.split(":")[0] for note in repaired.notes if note.startswith("tried ")]
    assert names[:4] == [
        f"tried {name}" for name in ("as it is", "healed", "healed, 50 % of the way", "healed, 75 % of the way")
    ]
    assert "clp cut nothing" in repaired.notes
    [chosen] = [note.removeprefix("chosen: ") for note in repaired.notes if note.startswith("chosen: ")]
    assert f"tried {chosen}" in names


@pytest.mark.parametrize(("reached", "tried"), [("as it is", 1), ("healed, 50 % of the way", 4), ("anp", 5)])
def test_nothing_more_is_tried_once_a_candidate_is_clear(victim, monkeypatch, reached, tried):
    """The two on the way to a healed network cost next to nothing, and are judged with it."""
    only(monkeypatch, "healed", "anp", "rnp")
    monkeypatch.setattr(module, "anp", lambda model, *args, **kwargs: Repaired(model, None))
    judge = module._Judge

    class Set(judge):
        def __call__(self, name, repaired):
            sign = 0.0 if name == reached else 0.5
            return Tried(name, repaired, wilson(9, 10), 0.0, 0.0, sign, None if sign else 0.1)

    monkeypatch.setattr(module, "_Judge", Set)
    result = QUICK(victim.model, make_images(60, 9), steps=4, epochs=0, generator=generator(0))
    assert sum(note.startswith("tried ") for note in result.notes) == tried
    assert f"chosen: {reached}" in result.notes


@pytest.mark.parametrize(
    ("inverted", "noise", "lost", "over"),
    [
        (0.1, 0.1, 0.02, True),
        (0.11, 0.0, 0.0, False),
        (0.0, 0.11, 0.0, False),
        (0.1, None, 0.0, True),
        (0.0, 0.0, 0.021, False),
    ],
)
def test_clear_is_what_shows_neither_sign_and_is_not_too_dear(inverted, noise, lost, over):
    contest = module._Contest(
        nn.Identity(),
        lambda name, made: Tried(name, made, wilson(9, 10), lost, 0.0, inverted, noise),
        0.02,
        (told := []).append,
    )
    contest.enter("a", lambda: Repaired(nn.Identity(), None))
    assert contest.over == over
    assert len(told) == 1


def test_the_judge_draws_the_same_for_each_candidate(victim):
    evidence = module.examine(victim.model, make_images(60, 9), steps=4, generator=generator(0))
    judge = module._Judge(victim.model, make_images(60, 9), make_images(40, 10), evidence, 4, "float32", generator(0))
    one, other = (judge("again", Repaired(victim.model, None)) for _ in range(2))
    assert (one.inverted, one.noise) == (other.inverted, other.noise)
    assert one.lost == 0


def test_the_worst_suspect_counts(victim, monkeypatch):
    evidence = module.examine(victim.model, make_images(60, 9), steps=4, generator=generator(0))
    two = module.Evidence((0, 2), True, evidence.smallest, {}, ())
    judge = module._Judge(victim.model, make_images(60, 9), make_images(40, 10), two, 4, "float32", generator(0))
    assert [(each.target, each.kind) for each in judge.triggers][:3] == [(0, "patch"), (2, "patch"), (0, "sparse")]
    rates = {"patch": 0.1, "sparse": 0.3, "dense": 0.5, "smooth": 0.3}
    monkeypatch.setattr(
        module, "regrown", lambda net, fitted, judged, each, **given: rates[each.kind] * (1 + (each.target == 2))
    )
    assert judge("it", Repaired(victim.model, None)).inverted == pytest.approx(0.6)


@pytest.mark.usefixtures("never_clear")
def test_progress_goes_on_from_round_to_round(victim, monkeypatch):
    only(monkeypatch, "healed", "healed, sharpness-aware")
    told = []
    given = {"steps": 2, "epochs": 1, "on_step": lambda step, steps: told.append((step, steps))}
    QUICK(victim.model, make_images(60, 9), **given, generator=generator(0))
    assert told == [(step, 6) for step in (1, 2, 3, 4)]


def test_a_mask_that_does_not_apply_is_named(victim, monkeypatch):
    def refuse(*args, **kwargs):
        raise MethodError("bnp needs batch-norms")

    monkeypatch.setattr(module, "bnp", refuse)
    only(monkeypatch, "clp", "bnp")
    told = []
    result = QUICK(victim.model, make_images(60, 9), steps=4, epochs=1, on_note=told.append, generator=generator(0))
    assert "bnp was not possible: bnp needs batch-norms" in result.notes
    assert not any(note.startswith("tried bnp") for note in result.notes)
    assert sorted(told) == sorted(note for note in result.notes if not note.startswith("chosen"))


def test_what_the_chosen_mask_cuts_stays_cut(victim, monkeypatch):
    """When the best mask, healed, is the best of all, its zeros are in the network that is returned."""
    name = next(name for name, m in core(victim.model).named_modules() if isinstance(m, nn.BatchNorm2d)) + ".weight"
    mask = WeightMask({name: torch.arange(len(core(victim.model).get_parameter(name))) > 0})
    cut = Repaired(apply_mask(victim.model, mask), mask, log={"removed": 1.0}, notes=("a note of the mask",))
    monkeypatch.setattr(module, "_attempts", lambda *args: [("cut", lambda: cut, False)])
    real = module._Judge.__call__

    def partial_to(self, name, candidate):
        tried = real(self, name, candidate)
        return Tried(name, candidate, tried.accuracy, 0.0, 0.0, {"cut": 0.5, "cut, healed": 0.0}.get(name, 1.0), None)

    monkeypatch.setattr(module._Judge, "__call__", partial_to)
    result = QUICK(victim.model, make_images(60, 9), steps=4, epochs=1, generator=generator(0))
    assert "chosen: cut, healed" in result.notes
    assert result.notes[-1] == "a note of the mask"
    assert result.log["removed"] == 1
    assert result.mask is mask
    weight = core(result.model).get_parameter(name)
    assert float(weight[0].detach()) == 0
    assert bool((weight[1:] != core(cut.model).get_parameter(name)[1:]).all())


@pytest.mark.usefixtures("one_mask")
def test_the_images_that_judge_are_seen_by_nothing_that_learns(victim, monkeypatch):
    """Every part but the judge gets the same other images."""
    seen = {}

    def spy(name, real, model, images, *args, **kwargs):
        seen[name] = {x.numpy().tobytes() for x in images.x}
        return real(model, images, *args, **kwargs)

    def judge(model, fitted, images, *args, real=module._Judge):
        seen["_Judge"] = {x.numpy().tobytes() for x in fitted.x}
        judged.update(x.numpy().tobytes() for x in images.x)
        return real(model, fitted, images, *args)

    judged: set[bytes] = set()
    for name in ("examine", "_attempts", "_Healer"):
        monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
    monkeypatch.setattr(module, "_Judge", judge)
    clean = make_images(60, 9)
    QUICK(victim.model, clean, steps=4, epochs=1, generator=generator(0))
    assert len(judged) == 15
    for name, learned in seen.items():
        assert len(learned) == 45, name
        assert not judged & learned, name


@pytest.mark.usefixtures("one_mask")
def test_a_healing_that_fails_loses_nothing(victim, monkeypatch):
    def diverge(*args, **kwargs):
        raise ModelError("training diverged")

    monkeypatch.setattr(module, "forget", diverge)
    result = QUICK(victim.model, make_images(60, 9), steps=4, generator=generator(0))
    assert "healed was not possible: training diverged" in result.notes
    assert "chosen: as it is" in result.notes


@pytest.mark.parametrize("n", [6, 30])
def test_too_few_images_are_refused_at_once(n, victim):
    with pytest.raises(DataError, match="at least 40 clean images"):
        auto(victim.model, make_images(n, 9), generator=generator(0))


def test_two_classes_are_refused_at_once(victim):
    clean = make_images(90, 9)
    two = ImageSet(clean.x[clean.y < 2], clean.y[clean.y < 2], clean.classes[:2])
    with pytest.raises(MethodError, match="at least 3, got 2"):
        auto(victim.model, two, generator=generator(0))


@pytest.mark.usefixtures("one_mask")
def test_a_network_that_is_not_flagged_can_be_left_as_it_is(victim, monkeypatch):
    found = module.examine(victim.model, make_images(60, 9), steps=4, generator=generator(0))
    calm = type(found)(found.suspects, False, found.smallest, found.log, ("no class was flagged",))
    monkeypatch.setattr(module, "examine", lambda *args, **kwargs: calm)
    left = QUICK(victim.model, make_images(60, 9), unflagged="leave", generator=generator(0))
    assert left.notes == ("no class was flagged",)
    for name, value in victim.model.state_dict().items():
        assert torch.equal(left.model.state_dict()[name], value)
    healed = QUICK(victim.model, make_images(60, 9), steps=4, epochs=1, generator=generator(0))
    assert len(healed.notes) > 5


@pytest.mark.parametrize("wrong", [{"drop": 2.0}, {"unflagged": "perhaps"}, {"steps": 0}, {"epochs": -1}, {"iterations": 0}])
@pytest.mark.usefixtures("one_mask")
def test_arguments_out_of_range_are_refused(wrong, victim):
    settings = {"steps": 2, "iterations": 2, "epochs": 1, **wrong}
    with pytest.raises(MethodError):
        auto(victim.model, make_images(40, 9), **settings, generator=generator(0))
