"""Where the nodes of a directed acyclic graph go in a picture: rows from top to bottom, few crossings, straight edges.

The method of Sugiyama, Tagawa and Toda (1981): longest-path rows, a stand-in wherever an edge crosses a row, barycentre
ordering inside the rows, then horizontal places by least squares.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

SWEEPS, PULLS, VISITS = 12, 100, 100_000
"""How often the rows are ordered, and then how often they are placed, downwards and upwards by turns: up to so many
visits of nodes, which even DenseNet's thousands of lanes need a few seconds for."""


@dataclass(frozen=True, slots=True)
class Layers:
    """A drawing of a graph.

    Attributes:
        at: node -> (x, row), row 0 on top.
        paths: edge -> the points (x, row) it runs through, both ends included.
    """

    at: Mapping[Any, tuple[float, int]]
    paths: Mapping[tuple[Any, Any], list[tuple[float, int]]]


def lay_out(graph: nx.DiGraph, widths: Mapping[Any, float], lane: float) -> Layers:
    """Place the nodes of a directed acyclic graph.

    Args:
        graph: edges run downwards.
        widths: node -> the horizontal room it takes.
        lane: the room an edge takes in each row it crosses.
    """
    row = {node: i for i, nodes in enumerate(nx.topological_generations(graph)) for node in nodes}
    for node in [n for n in graph if not graph.in_degree(n) and graph.out_degree(n)]:
        row[node] = min(row[below] for below in graph.successors(node)) - 1
    full, chains = _with_lanes(graph, row)
    room = {node: widths.get(node, lane) for node in full}
    rows = _ordered(full)
    x = _placed(full, rows, room)
    at = {node: (x[node], full.nodes[node]["row"]) for node in full}
    paths = {edge: [at[node] for node in chain] for edge, chain in chains.items()}
    return Layers({node: at[node] for node in graph}, paths)


def _with_lanes(
    graph: nx.DiGraph, row: Mapping[Hashable, int]
) -> tuple[nx.DiGraph, dict[tuple[Hashable, Hashable], list[Hashable]]]:
    """Put a stand-in into every row that an edge crosses. Returns the longer graph and edge -> the nodes along it."""
    full = nx.DiGraph()
    for node in graph:
        full.add_node(node, row=row[node], lane=False)
    chains = {}
    for a, b in graph.edges:
        lanes = [(a, b, r) for r in range(row[a] + 1, row[b])]
        for stand_in in lanes:
            full.add_node(stand_in, row=stand_in[2], lane=True)
        chains[a, b] = [a, *lanes, b]
        nx.add_path(full, chains[a, b])
    return full, chains


def _ordered(full: nx.DiGraph) -> list[list[Hashable]]:
    """Order every row by the mean place of its neighbours in the row before, downwards and upwards by turns."""
    rows: list[list[Hashable]] = [[] for _ in range(1 + max((full.nodes[n]["row"] for n in full), default=-1))]
    for node in nx.dfs_preorder_nodes(full.to_undirected()):
        rows[full.nodes[node]["row"]].append(node)
    place = {node: i for r in rows for i, node in enumerate(r)}
    best, fewest = [list(r) for r in rows], _crossings(full, rows)
    for sweep in range(SWEEPS):
        neighbours = full.pred if sweep % 2 == 0 else full.succ
        for r in rows if sweep % 2 == 0 else reversed(rows):
            centre = {n: sum(place[m] for m in neighbours[n]) / len(neighbours[n]) for n in r if neighbours[n]}
            r.sort(key=lambda n: centre.get(n, place[n]))
            place.update((node, i) for i, node in enumerate(r))
        crossings = _crossings(full, rows)
        if crossings < fewest:
            best, fewest = [list(r) for r in rows], crossings
    return best


def _crossings(full: nx.DiGraph, rows: list[list[Hashable]]) -> int:
    place = {node: i for r in rows for i, node in enumerate(r)}
    total = 0
    for r in rows[:-1]:
        ends = np.array([place[b] for a in r for b in sorted(full.succ[a], key=place.__getitem__)])
        total += int((ends[:, None] > ends[None, :])[np.triu_indices(len(ends), 1)].sum()) if len(ends) else 0
    return total


def _placed(full: nx.DiGraph, rows: list[list[Hashable]], room: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Pull every node towards its neighbours, passing edges most, while rows keep their order and their distances."""
    lanes = dict(full.nodes(data="lane"))
    near = {n: [(m, (1.0, 2.0, 8.0)[lanes[n] + lanes[m]]) for m in (*full.pred[n], *full.succ[n])] for n in full}
    weight = {n: sum(w for _, w in pulls) or 1.0 for n, pulls in near.items()}
    x: dict[Hashable, float] = {}
    for r in rows:
        starts = _starts(r, room)
        x.update(zip(r, (starts - starts[-1] / 2).tolist(), strict=True))
    for sweep in range(min(PULLS, 2 + VISITS // max(len(full), 1))):
        for r in rows if sweep % 2 == 0 else reversed(rows):
            starts = _starts(r, room)
            wish = [sum(w * x[m] for m, w in near[n]) / weight[n] if near[n] else x[n] for n in r]
            found = _isotonic(np.array(wish) - starts, np.array([weight[n] for n in r])) + starts
            x.update(zip(r, found.tolist(), strict=True))
    return x


def _starts(row: list[Hashable], room: Mapping[Hashable, float]) -> np.ndarray:
    """Return the places of a row's nodes when they stand side by side."""
    half = np.array([room[node] / 2 for node in row])
    return np.concatenate([[0.0], np.cumsum(half[:-1] + half[1:])])


def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the ascending sequence nearest to `values` (n,) in weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return np.concatenate([np.full(count, value) for value, _, count in blocks])
