"""Who plays: a graph network that says for each neuron how likely it is to be cut, and what the game is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv, global_max_pool, global_mean_pool

from .env import CONTEXT
from .features import NAMES, SIGNS

SHY, RULE = -5.0, 1.0  # log-odds of a cut before anything is learned, and what a unit of the rules adds to them
SLOPES = tuple(NAMES.index(f"{name} in the network") for name in SIGNS)
GAIN, COST = NAMES.index("signs without it"), NAMES.index("error without it")


class Graphs(NamedTuple):
    """Several graphs side by side.

    Attributes:
        x: Features of all nodes, ``(nodes, features)``.
        edges: Pairs of nodes, ``(2, e)``.
        of: The graph of each node, ``(nodes,)``.
    """

    x: Tensor
    edges: Tensor
    of: Tensor


class Policy(nn.Module):
    """Two graph convolutions (GraphSAGE, arXiv:1706.02216) over a layer, one head for its nodes and one for the game.

    It starts as two rules (see `features`), by which a neuron is cut the likelier the further its largest slope stands out, and
    the more the signs fall and the less the error rises without it, and learns what to add to that. In a layer without edges
    each neuron is looked at alone: a multilayer perceptron.
    """

    def __init__(self, *, width: int = 32, rule: bool = True) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(len(NAMES) + len(CONTEXT), width)
        self.mix = nn.ModuleList([SAGEConv(width, width), SAGEConv(width, width)])
        self.act = nn.Linear(width, 1)
        self.judge = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))
        nn.init.zeros_(self.act.weight)
        nn.init.constant_(self.act.bias, SHY)
        self.rules = nn.Parameter(torch.full((2,), RULE if rule else 0.0))

    def forward(self, shown: Graphs) -> tuple[Tensor, Tensor]:
        """Return the log-odds of a cut for each node, ``(nodes,)``, and the value of each graph, ``(graphs,)``."""
        x = torch.tanh(self.enter(shown.x))
        for layer in self.mix:
            x = x + F.relu(layer(x, shown.edges))
        pooled = torch.cat([global_mean_pool(x, shown.of), global_max_pool(x, shown.of)], dim=1)
        slopes = shown.x[:, SLOPES].amax(1).clamp_min(0)
        gains = -shown.x[:, GAIN] - shown.x[:, COST].clamp_min(0)
        likely = self.act(x).squeeze(1) + torch.stack([slopes, gains], 1) @ self.rules
        return likely, self.judge(pooled).squeeze(1)


def together(observations: Sequence[Any]) -> Graphs:
    """Return observations of `Pruning` as one batch."""
    batch: Any = Batch.from_data_list(
        [
            Data(x=torch.from_numpy(each.nodes), edge_index=torch.from_numpy(each.edge_links).T.contiguous())
            for each in observations
        ]
    )
    return Graphs(batch.x, batch.edge_index, batch.batch)
