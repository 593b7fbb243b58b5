"""Learning to play by proximal policy optimisation (Schulman et al., arXiv:1707.06347), with the accuracy as a constraint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...state import load_progress, save_progress
from .env import Pruning
from .policy import Policy, together

GAMMA, LAMBDA = 0.99, 0.95
CLIP, EPOCHS = 0.2, 4
CRITIC, ENTROPY = 0.5, 0.003
ASCENT, SMALLEST, LARGEST = 0.2, 1.0, 100.0  # of the multiplier's logarithm, and the multiplier's bounds


@dataclass
class Played:
    """What a game was, move by move."""

    shown: list[Any] = field(default_factory=list)
    cuts: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # log-odds of a cut
    values: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def advantages(self) -> Tensor:
        """Return the generalised advantages, ``(moves,)``."""
        after, running, found = [*self.values[1:], 0.0], 0.0, []
        for reward, value, then in zip(reversed(self.rewards), reversed(self.values), reversed(after), strict=True):
            running = reward + GAMMA * then - value + GAMMA * LAMBDA * running
            found.append(running)
        return torch.tensor(found[::-1])


def play(env: Pruning, policy: Policy, *, generator: torch.Generator | None = None) -> Played:
    """Play one game: with a generator by chance, without one by cutting what is more likely cut than not."""
    game = Played()
    shown, _ = env.reset()
    done = False
    while not done:
        with torch.no_grad():
            logits, value = policy(together([shown]))
        cut = logits > 0 if generator is None else torch.rand(logits.shape, generator=generator) < logits.sigmoid()
        game.shown.append(shown)
        game.cuts.append(cut.float())
        game.logits.append(logits)
        game.values.append(float(value))
        shown, reward, done, _, _ = env.step(cut.int().numpy())
        game.rewards.append(float(reward))
    return game


def chances(env: Pruning, policy: Policy) -> list[Tensor]:
    """Return for each layer how likely the policy cuts each neuron, in a game where it cuts what is likelier cut than not."""
    return [logits.sigmoid() for logits in reversed(play(env, policy).logits)]


@dataclass
class Learner:
    """A policy in training; one update per batch of games.

    Attributes:
        policy: Who learns.
        lr: Learning rate of Adam.
    """

    policy: Policy
    lr: float = 3e-3

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.lr)

    def update(self, games: Sequence[Played]) -> None:
        """Learn from games that this policy played.

        Each neuron's choice has its own ratio of probabilities, clipped on its own, with the advantage of the move: the product
        over a layer would leave the clip at once.
        """
        shown = together([each for game in games for each in game.shown])
        cuts = torch.cat([cut for game in games for cut in game.cuts])
        before = _likelihoods(torch.cat([logits for game in games for logits in game.logits]), cuts)
        advantages = torch.cat([game.advantages() for game in games])
        returns = advantages + torch.tensor([value for game in games for value in game.values])
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
        by_node = advantages[shown.of]
        for _ in range(EPOCHS):
            logits, values = self.policy(shown)
            ratio = (_likelihoods(logits, cuts) - before).exp()
            gain = torch.min(ratio * by_node, ratio.clamp(1 - CLIP, 1 + CLIP) * by_node).mean()
            entropy = (F.softplus(logits) - logits.sigmoid() * logits).mean()
            loss = -gain + CRITIC * F.mse_loss(values, returns) - ENTROPY * entropy
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
            self.optimizer.step()


def _likelihoods(logits: Tensor, cuts: Tensor) -> Tensor:
    """Return the logarithm of how likely each choice was, ``(nodes,)``."""
    return -F.binary_cross_entropy_with_logits(logits, cuts, reduction="none")


def train(
    learner: Learner,
    envs: Sequence[Pruning],
    *,
    games: int,
    at_once: int = 8,
    on_update: Callable[[int, dict[str, float]], None] | None = None,
    progress: Path | None = None,
    run: str = "",
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """Play so many games, on the boards in turn, and learn after every ``at_once``.

    After each update the price of lost accuracy on each board that was played on rises with what its games lost beyond the
    tolerance on average, and falls with what they left of it.

    Args:
        learner: Learns, in place.
        envs: The boards.
        games: How many.
        at_once: Games to an update.
        on_update: Called after each with the games so far, and its entry of what is returned.
        progress: Where to write how far this is after each update; an existing file of the same run is resumed.
        run: What else tells this run from others.
        generator: Source of all randomness.

    Returns:
        For each update the games so far, the evaluations, and the means of reward, rise, sign and share cut at the end; where
        all boards have a goal, its mean too.

    Raises:
        ModelError: ``progress`` is of another run.
    """
    history: list[dict[str, float]] = []
    run = _fingerprint(learner, envs, at_once, generator, run) if progress is not None else ""
    if progress is not None and progress.exists():
        history = _resume(load_progress(progress, run), learner, envs, generator)
    for first in range(int(history[-1]["games"]) if history else 0, games, at_once):
        played, ends = [], []
        for number in range(first, min(games, first + at_once)):
            env = envs[number % len(envs)]
            played.append(play(env, learner.policy, generator=generator))
            ends.append((env, env.standing))
        learner.update(played)
        for env in dict.fromkeys(env for env, _ in ends):
            rises = [standing.rise for board, standing in ends if board is env]
            broken = sum((rise - env.drop) / max(env.drop, 0.005) for rise in rises) / len(rises)
            step = ASCENT * min(1.0, max(-1.0, broken))
            env.multiplier = min(LARGEST, max(SMALLEST, env.multiplier * math.exp(step)))
        count = len(ends)
        history.append(
            {
                "games": float(first + count),
                "evaluations": float(sum(env.evaluations for env in envs)),
                "reward": sum(sum(game.rewards) for game in played) / count,
                "rise": sum(standing.rise for _, standing in ends) / count,
                "sign": sum(standing.sign for _, standing in ends) / count,
                "cut": sum(standing.cut for _, standing in ends) / count,
            }
        )
        goals = [standing.goal for _, standing in ends if standing.goal is not None]
        if len(goals) == count:
            history[-1]["goal"] = sum(goals) / count
        if progress is not None:
            state = {
                "policy": learner.policy.state_dict(),
                "optimizer": learner.optimizer.state_dict(),
                "boards": [(env.multiplier, env.evaluations) for env in envs],
                "generator": generator.get_state(),
                "history": history,
            }
            save_progress(progress, state, run)
        if on_update is not None:
            on_update(first + count, history[-1])
    return history


def _resume(
    state: dict[str, Any], learner: Learner, envs: Sequence[Pruning], generator: torch.Generator
) -> list[dict[str, float]]:
    learner.policy.load_state_dict(state["policy"])
    learner.optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    for env, (multiplier, evaluations) in zip(envs, state["boards"], strict=True):
        env.multiplier, env.evaluations = multiplier, evaluations
    return state["history"]


def _fingerprint(learner: Learner, envs: Sequence[Pruning], at_once: int, generator: torch.Generator, run: str) -> str:
    """Return a text that another start, another board or another seed would change.

    It is of what a board is made from, not of what was computed on it: that may differ in its last digits on another day.
    """
    digest = hashlib.sha256(repr((learner.lr, at_once, run)).encode())
    for env in envs:
        seen = env.error.images.sha256, [sign.name for sign in env.signs], env.goal is not None
        rules = env.drop, env.bonus, env.edit, [layer.sites for layer in env.layers]
        digest.update(repr((seen, rules)).encode())
    networks = [tensor for env in envs for tensor in env.model.state_dict().values()]
    edges = [layer.edges for env in envs for layer in env.layers]
    for tensor in (generator.get_state(), *learner.policy.state_dict().values(), *networks, *edges):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
