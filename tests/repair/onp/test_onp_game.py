"""The game, who plays it, and that playing is learned."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from conftest import make_images
from secateur.errors import MethodError, ModelError
from secateur.prune.mask import apply_mask
from secateur.repair.onp import signs
from secateur.repair.onp.env import CONTEXT, Pruning
from secateur.repair.onp.features import NAMES, features
from secateur.repair.onp.layers import layers
from secateur.repair.onp.policy import RULE, SHY, Policy, together
from secateur.repair.onp.ppo import ASCENT, GAMMA, LAMBDA, Learner, Played, chances, play, train
from secateur.state import generator
from secateur.types import ChannelMask


def board(victim, **kind):
    images = make_images(60, 9)
    found = layers(victim.model, images.shape)
    error, sign = signs.clean_errors(victim.model, images), signs.triggered(victim.model, images, [victim.trigger])
    return Pruning(victim.model, found, features(victim.model, images, found, [error, sign], {}), error, [sign], **kind)


@pytest.fixture
def env(victim):
    return board(victim)


def first_of(env):
    action = np.zeros(env.action_space.n, np.int8)
    action[0] = 1
    return action


def test_it_is_an_environment(env):
    check_env(env, skip_render_check=True)
    assert isinstance(env, gymnasium.Env)


def test_layers_move_from_the_last_to_the_first_and_the_mask_is_of_all_moves(env, victim):
    shown, _ = env.reset()
    done, order = False, []
    while not done:
        layer = env.layer
        order.append(layer.sites)
        assert shown.nodes.shape == (layer.size, len(NAMES) + len(CONTEXT))
        assert env.observation_space.contains(shown)
        shown, _, done, cut_short, info = env.step(first_of(env))
        assert not cut_short
    assert order == [layer.sites for layer in reversed(env.layers)]
    whole = ChannelMask({site: torch.arange(layer.size) > 0 for layer in env.layers for site in layer.sites})
    weights = dict(env.mask.keep)
    assert set(weights) == {f"{site}.weight" for site in whole.keep}
    model = apply_mask(env.model, env.mask)
    assert info["trigger"] == pytest.approx(signs.triggered(model, make_images(60, 9), [victim.trigger])(ChannelMask({})))
    with pytest.raises(MethodError, match="the game is over"):
        env.step(first_of(env))
    assert float(env.reset()[0].nodes[0, len(NAMES)]) == 1.0


def test_rewards_add_up_to_what_the_end_is_worth(env):
    env.reset()
    start = env.value(env.standing)
    total, done = 0.0, False
    while not done:
        _, reward, done, _, _ = env.step(first_of(env))
        total += reward
    assert start + total == pytest.approx(env.value(env.standing))
    standing = env.standing
    assert standing.cut == pytest.approx(len(env.layers) / env.neurons)
    expected = -standing.sign - env.multiplier * max(0, standing.rise - env.drop) + env.bonus * standing.cut
    assert env.value(standing) == pytest.approx(expected)


def test_a_move_that_cuts_nothing_costs_no_evaluation(env):
    env.reset()
    before = env.evaluations
    _, reward, _, _, _ = env.step(np.zeros(env.action_space.n, np.int8))
    assert env.evaluations == before
    assert reward == 0


@pytest.mark.parametrize("kind", [{"drop": 2.0}, {"bonus": -1.0}])
def test_rules_out_of_range(victim, kind):
    with pytest.raises(MethodError):
        board(victim, **kind)


def shown_by(env):
    shown, _ = env.reset()
    found, done = [shown], False
    while not done:
        shown, _, done, _, _ = env.step(np.zeros(env.action_space.n, np.int8))
        found += [] if done else [shown]
    return found


def test_a_policy_starts_shy_and_sees_neighbours_where_there_are_any(env):
    for graph in (True, False):
        shown = shown_by(env)
        if not graph:
            shown = [each._replace(edges=each.edges[:0], edge_links=each.edge_links[:0]) for each in shown]
        torch.manual_seed(0)
        policy = Policy(rule=False)
        logits, values = policy(together(shown))
        assert logits.tolist() == pytest.approx([SHY] * len(logits))
        assert values.shape == (len(shown),)
        torch.nn.init.normal_(policy.act.weight)
        whole = policy(together(shown[:1]))[0]
        apart = [each._replace(nodes=each.nodes.copy()) for each in shown[:1]]
        apart[0].nodes[1] += 3
        moved = (policy(together(apart))[0] - whole).abs() > 1e-6
        assert bool(moved[1])
        assert bool(moved[torch.arange(len(moved)) != 1].any()) == graph


def test_a_new_policy_cuts_the_likelier_the_further_a_slope_stands_out(env):
    [shown] = shown_by(env)[:1]
    slopes = shown.nodes[:, [NAMES.index(f"{name} in the network") for name in ("noise", "unlearned", "trigger")]]
    slopes[:3] = [[1.0, -2.0, 3.0], [0.5, 0.0, 0.0], [-1.0, -1.0, -1.0]]
    shown.nodes[:, [NAMES.index(f"{name} in the network") for name in ("noise", "unlearned", "trigger")]] = slopes
    logits, _ = Policy()(together([shown]))
    assert logits[:3].tolist() == pytest.approx([SHY + 3 * RULE, SHY + 0.5 * RULE, SHY])


def test_a_new_policy_cuts_the_likelier_the_more_the_signs_fall_and_the_less_accuracy_does(env):
    [shown] = shown_by(env)[:1]
    shown.nodes[:] = 0
    shown.nodes[:3, [NAMES.index(f"{name} without it") for name in ("error", "signs")]] = [
        [1.0, -3.0],
        [-1.0, -3.0],
        [2.0, 1.0],
    ]
    logits, _ = Policy()(together([shown]))
    assert logits[:3].tolist() == pytest.approx([SHY + 2 * RULE, SHY + 3 * RULE, SHY - 3 * RULE])


def test_a_batch_of_layers_is_seen_as_each_alone(env):
    torch.manual_seed(0)
    policy, shown = Policy(), shown_by(env)
    torch.nn.init.normal_(policy.act.weight)
    logits, values = policy(together(shown))
    single = [policy(together([each])) for each in shown]
    torch.testing.assert_close(logits, torch.cat([each[0] for each in single]))
    torch.testing.assert_close(values, torch.cat([each[1] for each in single]))


def test_advantages_by_hand():
    game = Played(values=[1.0, 2.0], rewards=[0.5, -1.0])
    last = -1.0 - 2.0
    first = 0.5 + GAMMA * 2.0 - 1.0 + GAMMA * LAMBDA * last
    assert game.advantages().tolist() == pytest.approx([first, last])


def test_playing_is_learned_and_the_same_seed_learns_the_same(victim):
    """With the attacker's own trigger as the sign, a few games are enough to find the neurons."""

    def learned(seed):
        env = board(victim, drop=0.05)
        torch.manual_seed(seed)
        learner = Learner(Policy(), lr=0.01)
        before = sum(play(env, learner.policy).rewards)
        history = train(learner, [env], games=80, generator=generator(seed))
        return env, learner, before, history

    env, learner, before, history = learned(0)
    after = sum(play(env, learner.policy).rewards)
    assert before == 0  # shy
    assert after > 0.5
    assert env.standing.rise <= 0.05
    assert history[-1]["games"] == 80
    assert history[-1]["evaluations"] > history[0]["evaluations"]
    assert learned(0)[3] == history
    assert [len(each) for each in chances(env, learner.policy)] == [layer.size for layer in env.layers]


def test_lost_accuracy_becomes_dearer_while_it_is_lost(victim):
    env = board(victim, drop=0.0)
    policy = Policy()
    with torch.no_grad():
        policy.act.bias.fill_(8.0)  # cuts all
    start = env.multiplier
    train(Learner(policy, lr=1e-9), [env], games=2, at_once=1, generator=generator(0))
    assert env.standing.rise > 0.3
    assert env.multiplier == pytest.approx(start * math.exp(2 * ASCENT))
    env.drop, env.multiplier = 1.0, 1.1
    train(Learner(policy, lr=1e-9), [env], games=2, at_once=1, generator=generator(0))
    assert env.multiplier == 1  # no lower


def test_each_board_has_its_own_multiplier_moved_by_the_mean_of_its_games(victim):
    dear, cheap = board(victim, drop=0.0), board(victim, drop=1.0)
    policy = Policy()
    with torch.no_grad():
        policy.act.bias.fill_(8.0)  # cuts all
    start = dear.multiplier
    train(Learner(policy, lr=1e-9), [dear, cheap], games=4, at_once=4, generator=generator(0))
    assert dear.multiplier == pytest.approx(start * math.exp(ASCENT))
    broken = (cheap.standing.rise - 1.0) / 1.0
    assert cheap.multiplier == pytest.approx(start * math.exp(ASCENT * broken))


def test_without_signs_cuts_are_worth_their_bonus(victim):
    env = board(victim, drop=1.0)
    env.signs = []
    env.reset()
    assert env.step(first_of(env))[1] == pytest.approx(env.bonus / env.neurons)


def test_a_goal_is_played_for_in_place_of_the_signs_and_not_shown(victim):
    known, blind = board(victim, goal=lambda mask: 0.25 if mask.keep else 1.0), board(victim)
    for env in (known, blind):
        env.reset()
    (seen, reward, *_), (other, *_) = known.step(first_of(known)), blind.step(first_of(blind))
    lost = known.multiplier * max(0, known.standing.rise - known.drop)
    assert reward == pytest.approx(0.75 - lost + known.bonus * known.standing.cut)
    assert seen.nodes.tolist() == other.nodes.tolist()
    assert known.standing.sign == blind.standing.sign


def test_learning_goes_on_where_it_was_killed(victim, tmp_path):
    def start():
        env = board(victim, drop=0.05)
        torch.manual_seed(0)
        return env, Learner(Policy(width=8), lr=0.01), generator(0)

    env, whole, random = start()
    history = train(whole, [env], games=24, generator=random)
    env, learner, random = start()
    train(learner, [env], games=8, progress=tmp_path / "run" / "progress", generator=random)
    env, learner, random = start()
    told = []
    again = partial(train, learner, [env], progress=tmp_path / "run" / "progress", generator=random)
    assert again(games=24, on_update=lambda done, _: told.append(done)) == history
    assert told == [16, 24]
    assert env.evaluations == history[-1]["evaluations"]
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(learner.policy.state_dict()[name], value)
    with pytest.raises(ModelError, match=r"^cannot resume .* delete it to start anew$"):
        again(games=24)  # from where the generator is now
    env, learner, random = start()
    env.layers = [replace(layer, edges=layer.edges[:, :0]) for layer in env.layers]
    with pytest.raises(ModelError, match="a run with other settings"):
        train(learner, [env], games=24, progress=tmp_path / "run" / "progress", generator=random)
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_one_move_alone_can_be_learned_from(env):
    """It has no spread to measure its advantage by."""
    torch.manual_seed(0)
    learner = Learner(Policy())
    game = play(env, learner.policy, generator=generator(0))
    learner.update([Played(game.shown[:1], game.cuts[:1], game.logits[:1], game.values[:1], game.rewards[:1])])
    assert all(bool(parameter.isfinite().all()) for parameter in learner.policy.parameters())
