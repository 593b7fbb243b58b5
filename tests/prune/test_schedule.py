"""Rounds of pruning: how much when, what stays cut, what is healed, and what is gone back to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from secateur.errors import MethodError, ModelError
from secateur.measure import cost
from secateur.prune import (
    Below,
    Compression,
    Count,
    Fraction,
    Sentence,
    Until,
    amount_at,
    apply_and_heal,
    apply_mask,
    prune,
    prune_in_rounds,
    removed,
    rewound,
)
from secateur.prune.magnitude import l1, random
from secateur.state import generator
from secateur.train import Recipe
from secateur.types import WeightMask

RECIPE = Recipe(epochs=1, lr=0.05, batch_size=120)


def total_of(model) -> int:
    return cost(model, (1, 12, 12)).parameters


def parameters(model) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.net.named_parameters()}


@pytest.mark.parametrize(("pace", "shares"), [
    ("geometric", [1 - 0.25**0.5, 0.75]),
    ("cubic", [0.75 * 0.875, 0.75]),
    ("linear", [0.375, 0.75]),
])  # fmt: skip
def test_shares_half_way_and_at_the_end(pace, shares):
    assert [amount_at(Fraction(0.75), part, pace).fraction for part in (0.5, 1.0)] == pytest.approx(shares)
    halves = [amount_at(Compression(4, total=1000), part, pace).compression for part in (0.5, 1.0)]
    assert halves == pytest.approx([1 / (1 - share) for share in shares])
    if pace != "geometric":
        assert amount_at(Count(80), 0.5, pace) == Count({"cubic": 70, "linear": 40}[pace])


def test_geometric_rounds_multiply_the_compression():
    found = [amount_at(Compression(16, total=9999), i / 4, "geometric") for i in (1, 2, 3, 4)]
    assert [amount.compression for amount in found] == pytest.approx([2, 4, 8, 16])
    assert found[-1] == Compression(16, total=9999)


@pytest.mark.parametrize(("amount", "pace", "match"), [
    (Until(0.1), "cubic", "needs a Count, Fraction or Compression, got Until"),
    (Below(0.1), "cubic", "needs a Count, Fraction or Compression, got Below"),
    (Count(3), "geometric", "give a Fraction or Compression, or another pace"),
    (Fraction(1.0), "geometric", "never cuts everything"),
    (Fraction(1.5), "linear", r"fraction must lie in \[0, 1\], got 1.5"),
    (Compression(0.5, 10), "linear", r"compression must lie in \[1, 10\], got 0.5"),
    (Fraction(0.5), "cubical", "unknown pace 'cubical'; did you mean 'cubic'"),
])  # fmt: skip
def test_amounts_without_a_schedule(amount, pace, match):
    with pytest.raises(MethodError, match=match):
        amount_at(amount, 0.5, pace)


@pytest.mark.parametrize("part", [0.0, 1.1])
def test_part_out_of_range(part):
    with pytest.raises(MethodError, match=r"part must lie in \(0, 1\]"):
        amount_at(Fraction(0.5), part, "linear")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("order", ["smallest", "largest"])
@pytest.mark.parametrize(
    ("granularity", "edit"), [("weight", "weight+bias"), ("channel", "weight+bias"), ("channel", "weight")]
)
def test_nothing_comes_back_and_the_end_is_exact(trained, images, scope, order, granularity, edit):
    """Scores by chance, drawn anew in each round, would bring most of it back."""
    sentence = Sentence(random, Fraction(0.7), granularity, scope=scope, order=order, edit=edit)
    pruned = prune_in_rounds(trained, images, sentence, rounds=4, heal=RECIPE, generator=generator(0))
    cuts = [candidate.mask.keep for candidate in pruned.path]
    assert len(cuts) == 4
    for before, after in pairwise(cuts):
        assert all(bool((after[name] <= before[name]).all()) for name in after)
        assert any(not torch.equal(after[name], before[name]) for name in after)
    sizes = {name: keep.numel() for name, keep in cuts[-1].items()}
    if scope == "layer":
        assert removed(pruned.mask) == {name: int(0.7 * size + 1e-9) for name, size in sizes.items()}
    else:
        assert sum(removed(pruned.mask).values()) == int(0.7 * sum(sizes.values()) + 1e-9)
    own = parameters(pruned.model)
    for name, keep in pruned.mask.keep.items():
        for parameter in [name] if name in own else [f"{name}.weight", f"{name}.bias"]:
            assert torch.equal(own[parameter] != 0, keep)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pace", ["geometric", "cubic", "linear"])
def test_a_compression_ends_with_exactly_the_zeros_asked_for(trained, images, scope, pace):
    total = total_of(trained)
    sentence = Sentence(random, Compression(5, total), scope=scope)
    pruned = prune_in_rounds(trained, images, sentence, rounds=3, pace=pace, generator=generator(0))
    assert cost(pruned.model, images.shape).nonzero == round(total / 5)
    assert [c.removed for c in pruned.path] == sorted({c.removed for c in pruned.path})
    assert pruned.log["rounds"] == 3


def test_one_round_is_one_shot(trained, images):
    sentence = Sentence(l1, Fraction(0.5), scope="global")
    once = prune(trained, images, sentence, heal=RECIPE, generator=generator(0))
    round_ = prune_in_rounds(trained, images, sentence, rounds=1, heal=RECIPE, generator=generator(0))
    assert all(torch.equal(value, parameters(once.model)[name]) for name, value in parameters(round_.model).items())


def test_without_healing_rounds_of_magnitudes_are_one_shot_and_with_it_they_are_scored_anew(trained, images):
    sentence = Sentence(l1, Fraction(0.8), scope="global")
    once = prune(trained, images, sentence, generator=generator(0)).mask.keep
    plain = prune_in_rounds(trained, images, sentence, rounds=3, generator=generator(0)).mask.keep
    assert all(torch.equal(plain[name], once[name]) for name in once)
    healed = prune_in_rounds(
        trained, images, sentence, rounds=3, heal=Recipe(epochs=3, lr=0.3, batch_size=24), generator=generator(0)
    )
    assert any(not torch.equal(healed.mask.keep[name], once[name]) for name in once)


def test_what_began_at_zero_is_trained_again_after_rewinding(trained, images, tiny):
    start = tiny(seed=7)
    with torch.no_grad():
        start.net.bn2.weight.zero_()
        start.net.conv1.weight[:, 0, 0] = 0
    sentence = Sentence(l1, Compression(2, total_of(trained)), scope="global")
    ticket = prune_in_rounds(trained, images, sentence, rounds=1, heal=RECIPE, rewind=start, generator=generator(0))
    assert bool(ticket.model.net.bn2.weight.any())
    kept = ticket.mask.keep["conv1.weight"]
    assert bool(kept[:, 0, 0].any())
    assert torch.equal(ticket.model.net.conv1.weight != 0, kept)


@pytest.fixture
def early(tiny):
    return tiny(seed=7)


def test_rewinding_goes_back_to_earlier_weights_and_statistics(trained, early, images):
    sentence = Sentence(l1, Fraction(0.5), scope="global")
    ticket = prune_in_rounds(trained, images, sentence, rounds=1, rewind=early, generator=generator(0))
    mask = prune(trained, images, sentence, generator=generator(0)).mask
    assert isinstance(mask, WeightMask)
    wanted = apply_mask(early, mask).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in ticket.model.state_dict().items())
    assert not torch.equal(wanted["net.bn1.running_mean"], trained.state_dict()["net.bn1.running_mean"])


def test_every_round_trains_from_the_earlier_weights(trained, early, images):
    sentence = Sentence(l1, Fraction(0.5), scope="global")
    ticket = prune_in_rounds(trained, images, sentence, rounds=2, heal=RECIPE, rewind=early, generator=generator(0))
    draw = generator(0)
    first = prune(trained, images, Sentence(l1, Fraction(1 - 0.5**0.5), scope="global"), generator=draw)
    middle = apply_and_heal(early, images, first.mask, heal=RECIPE, generator=draw).model
    assert all(torch.equal(ticket.path[0].mask.keep[n], keep) for n, keep in first.mask.keep.items())
    own = parameters(middle)
    cut = torch.cat([own[name].abs().masked_fill(~keep, -1).flatten() for name, keep in first.mask.keep.items()])
    gone = torch.zeros(len(cut), dtype=torch.bool)
    gone[cut.argsort(stable=True)[: len(cut) // 2]] = True
    assert torch.equal(torch.cat([keep.flatten() for keep in ticket.mask.keep.values()]), ~gone)
    last = apply_and_heal(early, images, ticket.mask, heal=RECIPE, generator=draw).model
    assert all(torch.equal(value, parameters(last)[name]) for name, value in parameters(ticket.model).items())


@pytest.mark.parametrize("kind", ["network", "core", "state", "state of the core"])
def test_what_to_go_back_to_may_be_a_network_or_its_state(trained, early, images, kind):
    given = {"network": early, "core": early.net, "state": early.state_dict(), "state of the core": early.net.state_dict()}
    sentence = Sentence(l1, Fraction(0.5))
    ticket = prune_in_rounds(trained, images, sentence, rounds=1, rewind=given[kind], generator=generator(0))
    wanted = apply_mask(early, ticket.mask).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in ticket.model.state_dict().items())


def test_another_network_is_nothing_to_go_back_to(trained, tiny, images):
    sentence = Sentence(l1, Fraction(0.5))
    with pytest.raises(ModelError, match="do not fit the network that is rewound"):
        prune_in_rounds(trained, images, sentence, rewind=tiny(width=8), heal=RECIPE, generator=generator(0))
    with pytest.raises(MethodError, match="give heal, or one round"):
        prune_in_rounds(trained, images, sentence, rounds=2, rewind=tiny(), generator=generator(0))
    with pytest.raises(MethodError, match=r"rounds must lie in \[1, 10000\], got 0"):
        prune_in_rounds(trained, images, sentence, rounds=0, generator=generator(0))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "multistep", "triangle"])
def test_a_rewound_recipe_has_the_learning_rates_that_were_left(schedule):
    recipe = Recipe(epochs=10, lr=0.3, schedule=schedule, nesterov=False)
    rest = rewound(recipe, epoch=4)
    assert (rest.epochs, rest.lr, rest.nesterov) == (6, 0.3, False)
    for part in (0.0, 0.25, 0.5, 0.99):
        assert rest.factor(part) == pytest.approx(recipe.factor(0.4 + 0.6 * part))
    twice = rewound(rest, epoch=3)
    assert twice.epochs == 3
    assert twice.factor(0.5) == pytest.approx(recipe.factor(0.85))
    whole = rewound(recipe, epoch=0)
    assert (whole.epochs, whole.factor(0.3)) == (10, recipe.factor(0.3))
    assert rewound(recipe, epoch=10).epochs == 0
    with pytest.raises(MethodError, match=r"epoch must lie in \[0, 10\], got 11"):
        rewound(recipe, epoch=11)


def test_a_rewound_recipe_trains(trained, images):
    recipe = Recipe(epochs=4, lr=0.1, batch_size=120, schedule="multistep", milestones=(0.5,))
    sentence = Sentence(l1, Fraction(0.5))
    slow = prune_in_rounds(trained, images, sentence, rounds=1, heal=rewound(recipe, epoch=2), generator=generator(0))
    same = Recipe(epochs=2, lr=0.01, batch_size=120, schedule="constant")
    plain = prune_in_rounds(trained, images, sentence, rounds=1, heal=same, generator=generator(0))
    for name, value in parameters(slow.model).items():
        assert torch.allclose(value, parameters(plain.model)[name], atol=1e-6)


def test_progress_goes_over_all_rounds(trained, images):
    told = []
    prune_in_rounds(
        trained, images, Sentence(l1, Fraction(0.5)), rounds=2, heal=RECIPE, on_step=lambda *step: told.append(step),
        generator=generator(0),
    )  # fmt: skip
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_network_that_comes_in_is_not_changed(trained, early, images):
    before = {name: value.clone() for name, value in [*trained.state_dict().items(), *early.state_dict().items()]}
    rng = torch.get_rng_state()
    prune_in_rounds(trained, images, Sentence(l1, Fraction(0.5)), rounds=2, heal=RECIPE, rewind=early, generator=generator(0))
    assert all(torch.equal(v, before[n]) for n, v in [*early.state_dict().items()])
    assert torch.equal(torch.get_rng_state(), rng)
