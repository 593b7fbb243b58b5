"""The repair as a whole: it finds a backdoor by signs that need no trigger, and says what it needs."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from conftest import make_images
from secateur.errors import DataError, MethodError, ModelError
from secateur.measure import evaluate
from secateur.prune.mask import removed
from secateur.repair.onp import onp
from secateur.repair.onp.choice import PATIENCE, choose, walk
from secateur.repair.onp.env import Standing
from secateur.repair.onp.features import NAMES
from secateur.repair.onp.layers import layers, mask_of
from secateur.repair.onp.onp import read_proxies
from secateur.state import generator
from secateur.types import ChannelMask

QUICK = partial(onp, proxies="unlearned", games=16, images=64, epochs=0)


@pytest.fixture(scope="module")
def repaired(victim):
    clean = make_images(200, 9)
    return onp(victim.model, clean, proxies="unlearned", games=128, drop=0.05, epochs=0, generator=generator(0))


def test_it_takes_a_backdoor_out(victim, repaired):
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.accuracy.value > 0.9
    assert after.attack_success is not None
    assert after.attack_success.value < 0.3
    assert sum(removed(repaired.mask).values()) > 0
    cut, whole = sum(len(graph.cut) for graph in repaired.graphs), sum(graph.size for graph in repaired.graphs)
    assert repaired.log["removed_share"] == cut / whole == repaired.path[-1].amount
    assert repaired.log["evaluations"] > whole


def test_what_was_cut_stays_cut_while_the_rest_is_tuned(victim):
    result = QUICK(victim.model, make_images(200, 9), proxies="none", games=0, drop=0.3, epochs=2, generator=generator(0))
    moved = False
    for name, value in result.model.named_parameters():
        keep = result.mask.keep.get(name.removeprefix("net."))
        if keep is not None:
            assert not bool(value[~keep].any())
        moved = moved or not torch.equal(value, victim.model.get_parameter(name))
    assert result.log["removed"] > 0
    assert moved


def test_the_result_shows_how_it_was_learned_and_what_was_cut_where(victim, repaired):
    assert [entry["games"] for entry in repaired.history] == list(range(8, 129, 8))
    assert repaired.history[-1]["evaluations"] <= repaired.log["evaluations"]
    assert [each.mask for each in repaired.path].count(repaired.mask) == 1
    found = layers(victim.model, victim.test.shape)
    assert [(graph.sites, graph.size) for graph in repaired.graphs] == [(layer.sites, layer.size) for layer in found]
    keeps = [
        torch.ones(graph.size, dtype=torch.bool).index_fill(0, torch.tensor(graph.cut).long(), False)
        for graph in repaired.graphs
    ]
    mask = mask_of(victim.model, found, keeps, "weight")
    assert {name: keep.tolist() for name, keep in mask.keep.items()} == {
        name: keep.tolist() for name, keep in repaired.mask.keep.items()
    }
    for graph, layer in zip(repaired.graphs, found, strict=True):
        assert all(i < j for i, j in graph.edges)
        assert {*graph.edges, *((j, i) for i, j in graph.edges)} == set(map(tuple, layer.edges.T.tolist()))


def test_the_same_seed_gives_the_same_network_and_progress_counts_games(victim):
    told: list[tuple[int, int]] = []
    notes: list[str] = []
    watched = partial(QUICK, epochs=2, on_step=lambda *step: told.append(step), on_note=notes.append)
    one = watched(victim.model, make_images(100, 9), generator=generator(0))
    other = QUICK(victim.model, make_images(100, 9), epochs=2, generator=generator(0))
    assert told == [(8, 20), (16, 20), (17, 20), (18, 20), (19, 20), (20, 20)]
    assert re.fullmatch(r"16 of 16 games: reward -?\d+\.\d\d, accuracy [+-]\d+\.\d, signs \d+ %, \d+\.\d % cut", notes[1])
    assert one.history == other.history
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])


@pytest.mark.parametrize("proxies", ["trigger", "noise", "none"])
def test_every_proxy_can_be_played_for(proxies, victim):
    result = QUICK(victim.model, make_images(100, 9), proxies=proxies, games=8, generator=generator(0))
    assert any("class" in note for note in result.notes) == (proxies == "trigger")


def test_without_games_neurons_are_ranked_by_slope_or_at_random(victim, monkeypatch):
    module, seen = sys.modules["secateur.repair.onp.onp"], []
    real = module.choose
    monkeypatch.setattr(module, "choose", lambda *given, **more: seen.append(torch.cat(given[3])) or real(*given, **more))
    for policy in ("", "random"):
        result = QUICK(victim.model, make_images(100, 9), policy=policy, games=0, generator=generator(0))
        assert result.history == ()
    by_slope, random = seen
    assert random.unique().numel() == 1
    assert by_slope.unique().numel() > 3


@pytest.mark.parametrize(
    ("judged", "why"),
    [
        (1, "no cut that is affordable is worth anything"),
        (3, "the 2 best cuts cost too much on images kept for this; allow more (drop)"),
    ],
)
def test_where_nothing_is_cut_it_says_why(judged, why, victim, monkeypatch):
    module = sys.modules["secateur.repair.onp.onp"]
    whole = [torch.ones(layer.size, dtype=torch.bool) for layer in layers(victim.model, victim.test.shape)]
    path = (None,) * judged
    monkeypatch.setattr(module, "choose", lambda *given, **more: (path, ChannelMask({}), whole))
    result = QUICK(victim.model, make_images(60, 9), games=0, generator=generator(0))
    assert f"nothing was cut: {why}" in result.notes
    result = QUICK(victim.model, make_images(60, 9), games=0, epochs=1, generator=generator(0))
    assert f"nothing was cut, and the network only fine-tuned: {why}" in result.notes


def test_the_policy_is_told_of_ablations_unless_it_is_not_to_be(victim, monkeypatch):
    module, boards = sys.modules["secateur.repair.onp.onp"], []
    real = module.board
    monkeypatch.setattr(module, "board", lambda *given, **more: boards.append(real(*given, **more)) or boards[-1])
    columns = [NAMES.index(f"{name} without it") for name in ("error", "unlearned", "signs")]
    spent = []
    for ablate in (True, False):
        result = QUICK(victim.model, make_images(100, 9), ablate=ablate, games=0, generator=generator(0))
        assert bool(torch.cat(boards[-1].nodes)[:, columns].any()) == ablate
        spent.append(result.log["evaluations"])
    assert spent[0] > boards[0].neurons


def test_without_signs_as_much_goes_as_accuracy_allows(victim):
    board = Board(victim.model, lambda gone: 0.0, rise=lambda gone: 0.0 if gone < 6 else 0.2)
    board.bonus, stand = 1.0, board.stand
    board.stand = lambda keeps: replace(stand(keeps), signs={})
    path, _, keeps = chosen(victim.model, board)
    amounts = [each.amount for each in path]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] == 5 / board.neurons
    assert len(cut_of(keeps)) == amounts[-1] * board.neurons


def test_what_is_wrong_is_said_before_the_long_search(victim, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["secateur.repair.onp.onp"], "seek", lambda *args, **kwargs: pytest.fail("too late"))
    for wrong in (
        {"policy": str(tmp_path / "none")},
        {"bonus": -1.0},
        {"drop": 2.0},
        {"residual": "both"},
        {"degree": -1},
        {"edit": "bias"},
        {"precision": "float16"},
        {"width": 5000},
        {"tuning_lr": 0.0},
        {"epochs": -1},
    ):
        with pytest.raises((MethodError, ModelError)):
            QUICK(victim.model, make_images(60, 9), **wrong, generator=generator(0))


def test_a_cut_takes_a_channel_at_all_sites_of_its_stream():
    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)
            self.last = torch.nn.Linear(4, 3)

        def forward(self, x):
            x = self.one(x)
            return self.last((x + self.two(x)).mean((2, 3)))

    model = Chain()
    found = layers(model, (3, 8, 8))
    assert [layer.sites for layer in found] == [("one", "two")]
    mask = mask_of(model, found, [torch.tensor([True, False, True, False])], "weight+bias")
    assert isinstance(mask, ChannelMask)
    assert {site: keep.tolist() for site, keep in mask.keep.items()} == {
        site: [True, False, True, False] for site in ("one", "two")
    }


class Board:
    """A board on which what a cut does follows from how many neurons it takes."""

    drop, bonus, edit = 0.1, 0.0, "weight"

    def __init__(self, model, sign, rise=lambda gone: 0.0):
        self.layers = layers(model, (1, 12, 12))
        self.neurons = sum(layer.size for layer in self.layers)
        self.sign, self.rises, self.ends = sign, rise, []

    def stand(self, keeps):
        gone = len(cut_of(keeps))
        return Standing(self.rises(gone), {"a": self.sign(gone)}, gone / self.neurons)

    def rise(self, keeps):
        return self.rises(len(cut_of(keeps)))

    def chances(self, seed=1):
        drawn = torch.rand(self.neurons, generator=generator(seed))
        return list(drawn.split([layer.size for layer in self.layers]))


def cut_of(keeps):
    return (~torch.cat(list(keeps))).nonzero().flatten().tolist()


def chosen(model, board, chances=None, images=None, seed=0):
    chances = board.chances() if chances is None else chances
    return choose(model, images or make_images(40, 9), board, chances, generator=generator(seed))


def test_along_the_ranking_the_cut_with_the_lowest_signs_is_taken(victim):
    board = Board(victim.model, lambda gone: abs(gone - 3) / 100)
    board.drop = 1.0
    path, mask, keeps = chosen(victim.model, board)
    assert cut_of(keeps) == sorted(torch.cat(board.chances()).topk(3).indices.tolist())
    assert path[-1].mask is mask
    assert len(path) == 1


def test_the_end_of_a_game_is_taken_where_it_is_better(victim):
    board = Board(victim.model, lambda gone: 0.5)
    board.drop = 1.0
    keeps = tuple(torch.arange(layer.size) != 1 for layer in board.layers)
    board.ends = [(Standing(0.0, {"a": 0.4}, 0.1), keeps), (Standing(1.1, {"a": 0.1}, 0.1), (*keeps[:-1], ~keeps[-1]))]
    assert all(torch.equal(one, other) for one, other in zip(chosen(victim.model, board)[2], keeps, strict=True))


def test_what_costs_too_much_on_images_of_the_game_or_on_others_is_not_taken(victim):
    board = Board(victim.model, lambda gone: -gone / 1000, rise=lambda gone: 0.2 if gone > 40 else 0.0)
    path, _, keeps = chosen(victim.model, board, images=make_images(200, 9))
    assert 0 < len(cut_of(keeps)) < 40
    rates = [each.holdout.value for each in path]
    whole = evaluate(victim.model, make_images(200, 9)).accuracy.value
    assert all(rate < whole - 0.1 for rate in rates[:-1])
    assert rates[-1] >= whole - 0.1
    assert len(path) > 1
    board.rises = lambda gone: float(gone > 0)
    assert cut_of(chosen(victim.model, board)[2]) == []


class Costs(Board):
    """A board on which each neuron has its own cost; what was asked is kept."""

    def __init__(self, model, costs, free=0.0):
        super().__init__(model, lambda gone: 0.0)
        self.costs = {neuron: costs.get(neuron, free) for neuron in range(self.neurons)}
        self.asked = []

    def rise(self, keeps):
        cut = cut_of(keeps)
        self.asked.append(cut)
        return sum(self.costs[neuron] for neuron in cut)


def walked(board):
    return [cut_of(keeps) for keeps in walk(board, torch.arange(board.neurons))]


def test_each_neuron_of_the_ranking_goes_unless_it_costs_too_much(victim):
    board = Costs(victim.model, {0: 0.05, 3: 1.0, 7: 0.04, 8: 0.02})
    half = board.neurons // 2
    assert half > 12
    path = walked(board)
    assert path[0] == []
    assert path[-1] == [neuron for neuron in range(half) if neuron not in (3, 8)]  # 8 alone would be one point too much
    assert all(set(one) < set(other) for one, other in pairwise(path))
    assert all(sum(board.costs[neuron] for neuron in cut) <= board.drop for cut in path)


def test_neurons_that_cost_nothing_are_tried_together(victim):
    board = Costs(victim.model, {})
    assert walked(board)[-1] == list(range(board.neurons // 2))
    assert [len(cut) for cut in board.asked[:4]] == [1, 3, 7, 15]


def test_after_so_many_that_cost_too_much_the_rest_is_left(victim):
    board = Costs(victim.model, dict.fromkeys(range(3), 0.0), free=1.0)
    assert walked(board) == [[], [0], [0, 1, 2]]
    assert sum(len(cut) == 4 for cut in board.asked) == PATIENCE
    assert max(max(cut) for cut in board.asked if len(cut) == 4) == 2 + PATIENCE


def test_what_is_cut_has_its_bonus(victim):
    board = Board(victim.model, lambda gone: 0.3 if gone <= 3 else 0.5)
    board.drop = 1.0
    assert len(cut_of(chosen(victim.model, board)[2])) <= 3
    board.bonus = 1.0
    assert len(cut_of(chosen(victim.model, board)[2])) == board.neurons // 2


def test_so_many_cuts_are_judged_and_no_more(victim, monkeypatch):
    board = Board(victim.model, lambda gone: -gone / 1000)
    images = make_images(200, 9)
    whole = len(chosen(victim.model, board, images=images)[0])
    assert whole > 2
    monkeypatch.setattr(sys.modules["secateur.repair.onp.choice"], "LISTED", 1)
    path, _, keeps = chosen(victim.model, board, images=images)
    assert len(path) == 2
    assert cut_of(keeps) == []


def test_neurons_that_are_as_likely_as_each_other_come_in_random_order(victim):
    board = Board(victim.model, lambda gone: abs(gone - 3) / 100)
    board.drop = 1.0
    chances = [torch.full((layer.size,), 0.05) for layer in board.layers]
    first, again, other = (cut_of(chosen(victim.model, board, chances, seed=seed)[2]) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("text", "names"), [("none", ()), ("noise", ("noise",)), ("trigger+noise", ("trigger", "noise"))])
def test_proxies_are_read(text, names):
    assert read_proxies(text) == names


@pytest.mark.parametrize(
    "wrong",
    [{"proxies": "magic"}, {"proxies": ""}, {"games": -1}, {"images": 0}, {"drop": 2.0}, {"bonus": -1.0}, {"lr": 0.0},
     {"width": 0}, {"degree": -1}, {"residual": "both"}, {"edit": "bias"}],
)  # fmt: skip
def test_settings_out_of_range(wrong, victim):
    with pytest.raises(MethodError):
        QUICK(victim.model, make_images(60, 9), **wrong, generator=generator(0))


def test_too_few_images(victim):
    with pytest.raises(DataError):
        QUICK(victim.model, make_images(1, 9), generator=generator(0))


def test_what_it_needs_is_said(victim, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("secateur.repair.onp.p")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(MethodError, match=r"pip install secateur\[onp\]"):
        QUICK(victim.model, make_images(60, 9), generator=generator(0))
