"""Pruning as a game: one layer after the other, from the last to the first, a player says which neurons go.

A `gymnasium.Env`, so that any reinforcement learner can play it. From the last layer to the first the evaluator has to compute
only what lies behind the layer of the move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ...errors import MethodError, check_range
from ...prune.mask import Edit
from ...types import ChannelMask, HardMask
from .features import NAMES
from .layers import Layer, mask_of
from .signs import Sign

CONTEXT = "left", "error", "sign", "cut"


@dataclass(frozen=True)
class Standing:
    """Where a game stands.

    Attributes:
        rise: How much the clean error has risen, in [-1, 1].
        signs: Sign -> its share.
        cut: Share of all neurons that are cut.
        goal: What is to become small in place of the signs, where it is known.
    """

    rise: float
    signs: Mapping[str, float]
    cut: float
    goal: float | None = None

    @property
    def sign(self) -> float:
        """The mean of the signs, 0 without any."""
        return sum(self.signs.values()) / len(self.signs) if self.signs else 0.0

    @property
    def backdoor(self) -> float:
        """What is to become small: the goal where it is known, else the mean of the signs."""
        return self.sign if self.goal is None else self.goal


class Pruning(gymnasium.Env):
    """One network's game.

    An observation is a graph: a node per neuron of the layer that is to move, with the features of `NAMES` and how the game
    stands (`CONTEXT`: share of layers left, rise of the clean error over ``drop``, mean of the signs, share cut), and the edges
    of the layer. An action has an entry per neuron, 1 = cut; the layer reads as many as it has neurons. The reward of a move is
    by how much it raises ``-signs - multiplier * max(0, rise - drop) + bonus * cut``, where ``signs`` is the mean of the signs,
    or the goal where that is known. Without any only the bonus counts: as much goes as accuracy allows.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        nodes: Sequence[Tensor],
        error: Sign,
        signs: Sequence[Sign],
        *,
        drop: float = 0.1,
        bonus: float = 1.0,
        edit: Edit = "weight",
        goal: Callable[[HardMask], float] | None = None,
    ) -> None:
        """Set the board.

        Args:
            model: The network; not changed.
            layers: Its layers.
            nodes: Features of each layer's neurons.
            error: Of clean images.
            signs: What is to become small.
            drop: Accuracy that may be lost, in [0, 1].
            bonus: What it is worth to cut all neurons, >= 0.
            edit: What of a cut neuron goes to 0.
            goal: What the reward counts in place of the signs: attack success on a victim of one's own, whose trigger is known,
                so that a policy learns which signs to believe. It is never shown.

        Raises:
            MethodError: An argument is out of range.
        """
        check_range("drop", drop, 0, 1)
        check_range("bonus", bonus, 0, 1e6)
        if len(layers) != len(nodes):
            raise MethodError(f"each layer needs its features, got {len(nodes)} for {len(layers)} layers")
        self.model, self.layers, self.nodes = model, layers, nodes
        self.error, self.signs, self.drop, self.bonus = error, signs, drop, bonus
        self.edit: Edit = edit
        self.goal = goal
        self.multiplier = 10.0
        self.neurons = sum(layer.size for layer in layers)
        self.observation_space = spaces.Graph(
            spaces.Box(-np.inf, np.inf, (len(NAMES) + len(CONTEXT),), np.float32), spaces.Box(1.0, 1.0, (1,), np.float32)
        )  # it allows of no edges without a feature
        self.action_space = spaces.MultiBinary(max(layer.size for layer in layers))
        self.evaluations = 0
        self.ends: list[tuple[Standing, tuple[Tensor, ...]]] = []
        self._first = error(ChannelMask({}))
        self._keeps: list[Tensor] = []
        self.standing = self._stand(ChannelMask({}), 0.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start again with nothing cut."""
        super().reset(seed=seed)
        self._keeps = []
        self.standing = self._stand(ChannelMask({}), 0.0)
        return self._observation(), {}

    @property
    def layer(self) -> Layer:
        """The layer that is to move; after the end the first."""
        return self.layers[max(0, self._next)]

    @property
    def _next(self) -> int:
        return len(self.layers) - 1 - len(self._keeps)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Cut in one layer.

        Raises:
            MethodError: The game is over.
        """
        if self._next < 0:
            raise MethodError("the game is over: every layer has moved; reset it")
        before = self.value(self.standing)
        cut = torch.as_tensor(np.asarray(action))[: self.layer.size].bool()
        self._keeps.append(~cut)
        if bool(cut.any()):
            self.standing = self._stand(self.mask, sum(int((~keep).sum()) for keep in self._keeps) / self.neurons)
        done = self._next < 0
        if done:
            self.ends.append((self.standing, tuple(reversed(self._keeps))))
        reward = self.value(self.standing) - before
        info = {"rise": self.standing.rise, "cut": self.standing.cut, **self.standing.signs}
        return self._observation(), reward, done, False, info

    def value(self, standing: Standing) -> float:
        """Return what a standing is worth."""
        lost = self.multiplier * max(0.0, standing.rise - self.drop)
        return -standing.backdoor - lost + self.bonus * standing.cut

    @property
    def mask(self) -> HardMask:
        """What has been cut so far."""
        moved = self.layers[len(self.layers) - len(self._keeps) :]
        return mask_of(self.model, moved, self._keeps[::-1], self.edit)

    def stand(self, keeps: Sequence[Tensor]) -> Standing:
        """Return where a game stands that ends with these neurons: what is kept, bool ``(size,)`` for each layer."""
        gone = sum(int((~keep).sum()) for keep in keeps)
        return self._stand(mask_of(self.model, self.layers, keeps, self.edit), gone / self.neurons)

    def rise(self, keeps: Sequence[Tensor]) -> float:
        """Return how much the clean error rises in such an end, in [-1, 1]; no sign is asked."""
        self.evaluations += 1
        return self.error(mask_of(self.model, self.layers, keeps, self.edit)) - self._first

    def _stand(self, mask: HardMask, cut: float) -> Standing:
        self.evaluations += 1
        signs = {sign.name: sign(mask) for sign in self.signs}
        return Standing(self.error(mask) - self._first, signs, cut, None if self.goal is None else self.goal(mask))

    def _observation(self) -> spaces.GraphInstance:
        nodes = self.nodes[max(0, self._next)]
        standing = self.standing
        left = (self._next + 1) / len(self.layers)
        context = torch.tensor([left, standing.rise / max(self.drop, 0.005), standing.sign, standing.cut])
        shown = torch.cat([nodes, context.expand(len(nodes), -1)], dim=1).float()
        edges = self.layer.edges.T.numpy().copy()
        return spaces.GraphInstance(nodes=shown.numpy(), edges=np.ones((len(edges), 1), np.float32), edge_links=edges)
