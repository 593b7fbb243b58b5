"""IMS: losses and perturbations by hand, and a backdoor that goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.errors import MethodError
from secateur.prune.neurons import Neurons
from secateur.repair import ims
from secateur.repair.ims import Game, agree, disagree
from secateur.state import generator
from secateur.types import to_float


def test_agreement_is_the_overlap_of_the_answers():
    one, other = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0], [0.0, 1.0, 0.5]])
    overlaps = []
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        overlaps.append(sum(x * y for x, y in zip(p, q, strict=True)))
    assert float(agree(one, other)) == pytest.approx(-sum(map(math.log, overlaps)) / 2, rel=1e-5)
    assert float(disagree(one, other)) == pytest.approx(-sum(math.log(1 - o) for o in overlaps) / 2, rel=1e-5)


def game_of(model: nn.Module, shape) -> Game:
    game, draw = Game(Neurons(model, shape), 20.0), generator(3)
    for values in (game.mask, game.selection):
        for value in values.values():
            value.copy_(torch.rand(value.shape, generator=draw))
    return game


def test_what_nobody_selected_is_in_both(tiny, images):
    game = game_of(tiny(), images.shape)
    for inverse in (False, True):
        for site, factor in game.factors(inverse=inverse).items():
            for i, value in enumerate(factor.tolist()):
                m, s = float(game.mask[site][i]), float(game.selection[site][i])
                soft = 1 / (1 + math.exp(-20 * ((1 - m if inverse else m) - 0.5)))
                assert value == pytest.approx(soft + s * (1 - soft), abs=1e-5)
    chosen = [1 - v for s in game.selection.values() for v in s.tolist()]
    assert float(game.selected()) == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)


def test_the_loss_has_five_parts(tiny, images):
    game = game_of(tiny(), images.shape)
    x, hurt = to_float(images.x[:30]), to_float(images.x[30:60])
    with torch.no_grad():
        masked, inverse = (game.factors(inverse=inverse) for inverse in (False, True))
        original, fooled = game.neurons(x, {}), game.neurons(hurt, {})
        clean = agree(game.neurons(x, masked), original) + disagree(game.neurons(x, inverse), original)
        more = agree(game.neurons(hurt, masked), original) + agree(game.neurons(hurt, inverse), fooled)
        more = more + disagree(game.neurons(hurt, inverse), original)
        assert float(game.loss(x, None)) == pytest.approx(float(clean), rel=1e-4)
        assert float(game.loss(x, hurt)) == pytest.approx(float(clean + more), rel=1e-4)


def test_perturbations_fool_the_original_within_their_radius(trained, images):
    game, x = Game(Neurons(trained, images.shape), 20.0), to_float(images.x[:60])
    hurt = game.perturbed(x, steps=15, lr=0.05, radius=0.2)
    assert float((hurt - x).abs().max()) <= 0.2 + 1e-6
    assert 0 <= float(hurt.min()) <= float(hurt.max()) <= 1
    with torch.no_grad():
        changed = (trained(hurt).argmax(1) != trained(x).argmax(1)).double().mean()
    assert changed > 0.5


def test_masks_that_disagree_are_learned(trained, images):
    """After the first part the masked network answers as before, its inverse does not, and few neurons are selected."""
    game, x = Game(Neurons(trained, images.shape), 20.0), to_float(images.x[:120])
    game.minimise(lambda x: game.loss(x, None) + game.selected(), [x] * 60, lr=0.05, patience=60, on_step=None)
    with torch.no_grad():
        before = trained(x).argmax(1)
        masked, inverse = (game.neurons(x, game.factors(inverse=inverse)).argmax(1) for inverse in (False, True))
    assert (masked == before).double().mean() > 0.9
    assert (inverse == before).double().mean() < 0.5
    assert 0 < float(game.selected()) < 0.5


def test_a_part_ends_when_nothing_gets_better(trained, images):
    game, steps = Game(Neurons(trained, images.shape), 20.0), []
    flat = lambda x: 0 * game.selected()  # noqa: E731
    game.minimise(flat, [to_float(images.x[:5])] * 50, lr=0.01, patience=4, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("inner_steps", 0), ("radius", 1.5), ("lr", -1), ("slope", -1)])
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in"):
        ims(trained, images, **{name: value}, generator=generator(0))
