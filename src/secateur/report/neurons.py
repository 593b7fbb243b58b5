"""The graphs of neurons that a page draws, made small enough to be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .wording import clip, places

LAYERS = 3
NODES = 160
EDGES = 2000


@dataclass(frozen=True)
class View:
    """What is shown of one layer.

    Attributes:
        caption: What it is, and what is left out.
        nodes: The neurons that are shown.
        cut: Those of them that were cut.
        edges: Between neurons that are shown, each once.
    """

    caption: str
    nodes: tuple[int, ...]
    cut: frozenset[int]
    edges: tuple[tuple[int, int], ...]

    def layout(self) -> dict[int, tuple[float, float]]:
        """Return a place for each neuron, the same every time; loads networkx."""
        from networkx import Graph, spring_layout

        graph = Graph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from(self.edges)
        return {node: (float(x), float(y)) for node, (x, y) in spring_layout(graph, seed=0).items()}


def views(graphs: Sequence[Mapping[str, Any]]) -> list[View]:
    """Return what is shown of the layers with the most cut neurons, `LAYERS` at most, the most first."""
    ranked = sorted(graphs, key=lambda graph: -len(graph["cut"]))
    return list(islice(_views(ranked), LAYERS))


def _views(graphs: Sequence[Mapping[str, Any]]) -> Iterator[View]:
    for graph in graphs:
        size = graph["size"]
        cut = sorted({i for i in graph["cut"] if i < size})
        edges = sorted({(min(edge), max(edge)) for edge in graph["edges"] if edge[0] != edge[1] and max(edge) < size})
        if cut and edges:
            yield _view(clip(places(graph["sites"]), 200), size, cut, edges, graph.get("edges_left_out", 0))


def _view(name: str, size: int, cut: Sequence[int], edges: Sequence[tuple[int, int]], left_out: int) -> View:
    caption = f"{name}: {len(cut):,} of {size:,} neurons cut."
    nodes = range(size)
    if size > NODES:
        nodes = [*cut, *_neighbours(frozenset(cut), edges)][:NODES]
        near = len(nodes) - len(cut)
        caption += f" Shown are {f'the cut ones and {near} of their neighbours' if near > 0 else f'{NODES} of the cut ones'}."
    if left_out:
        caption += f" {left_out:,} edges had no room in the record."
    shown = frozenset(nodes)
    inside = [edge for edge in edges if shown.issuperset(edge)]
    if len(inside) > EDGES:
        caption += f" Of {len(inside):,} edges {EDGES:,} are drawn."
    return View(caption, tuple(sorted(nodes)), shown.intersection(cut), tuple(inside[:EDGES]))


def _neighbours(cut: frozenset[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the kept neurons that have cut neighbours, those with the most first."""
    near = Counter(node for edge in edges if not cut.isdisjoint(edge) for node in edge if node not in cut)
    return sorted(near, key=lambda node: (-near[node], node))
