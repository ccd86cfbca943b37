"""Questions about a coupling, answered in words."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from fxprune.atoms import FIXED
from fxprune.errors import CouplingError

if TYPE_CHECKING:
    from fxprune.coupling import Coupling, Site

Vertex = tuple[str, int]


def dependency_graph(coupling: Coupling) -> nx.Graph:
    """Return the graph of everything that was tied.

    Vertices are (parameter, dim), and (node, -1) for channels that a node made (constants, rows, crossings). Edges
    carry `node`, the fx node that tied the two, and `relation`: "tie", "row" or "crossing".
    """
    record = coupling.record
    vertices, of_atom = origins(coupling)
    graph = nx.Graph()
    graph.add_nodes_from((site.name, site.dim) for site in coupling.sites)

    def connect(a: np.ndarray, b: np.ndarray, node: str, relation: str) -> None:
        real = (a != FIXED) & (b != FIXED)
        for i, j in np.unique(np.stack([of_atom[a[real]], of_atom[b[real]]], 1), axis=0).tolist():
            if i != j and not graph.has_edge(vertices[i], vertices[j]):
                graph.add_edge(vertices[i], vertices[j], node=node, relation=relation)

    for tie in record.ledger.ties:
        connect(tie.a, tie.b, tie.node, "tie")
    for batch in record.ledger.rows:
        row = np.broadcast_to(batch.row[:, None], batch.columns.shape)
        connect(row.ravel(), batch.columns.ravel(), batch.node, "row")
    for product in record.ledger.products:
        connect(product.atom, product.row, product.node, "crossing")
        connect(product.atom, product.column, product.node, "crossing")
    for name, (_, labels, _, _) in record.issued.items():
        for dim, ids in enumerate(labels):
            for i in np.unique(of_atom[ids[ids != FIXED]]).tolist() if ids is not None else ():
                if vertices[i] != (name, dim) and not graph.has_edge(vertices[i], (name, dim)):
                    graph.add_edge(vertices[i], (name, dim), node=record.named_at[name], relation="tie")
    return graph


def origins(coupling: Coupling) -> tuple[list[Vertex], np.ndarray]:
    """Return the vertices, and for each atom the index of the one it was born at."""
    record = coupling.record
    births = record.ledger.births
    starts = [start for start, _ in births]
    vertices: list[Vertex] = [(node, -1) for _, node in births]
    index = np.repeat(np.arange(len(births)), np.diff([*starts, record.ledger.num_atoms]))
    for name, (_, labels, _, _) in record.issued.items():
        for dim, ids in enumerate(labels):
            if ids is not None:
                own = ids[ids != FIXED]
                index[own[index[own] < len(births)]] = len(vertices)
                vertices.append((name, dim))
    return vertices, index


def _sites(coupling: Coupling, name: str | Vertex) -> list[Site]:
    wanted, dim = (name, None) if isinstance(name, str) else name
    found = [s for s in coupling.sites if s.name == wanted and dim in (None, s.dim)]
    if not found:
        known = sorted({s.name for s in coupling.sites})
        close = [k for k in known if wanted.split(".")[-1] in k][:3] or known[:3]
        raise CouplingError(
            f"no parameter {name!r} with channels in this network. There are, for example: {', '.join(close)}."
        )
    return found


def _say(vertex: Vertex) -> str:
    return f"{vertex[0]}[{vertex[1]}]" if vertex[1] >= 0 else f"channels made at node {vertex[0]!r}"


def explain(coupling: Coupling, a: str | Vertex, b: str | Vertex) -> str:
    """Return the shortest chain of ties between two parameters, in words."""
    starts = [(s.name, s.dim) for s in _sites(coupling, a)]
    ends = {(s.name, s.dim) for s in _sites(coupling, b)}
    paths = []
    for start in starts:
        reached = nx.single_source_shortest_path(coupling.graph, start)
        paths += [path for end, path in reached.items() if end in ends and (len(path) > 1 or start in ends)]
    if not paths:
        return f"{a} and {b} are not coupled: no chain of ties joins them."
    path = min(paths, key=len)
    if len(path) == 1:
        return f"{_say(path[0])} is one and the same site."
    lines = [_say(path[0])]
    for here, there in pairwise(path):
        edge = coupling.graph.edges[here, there]
        verb = {"tie": "is tied to", "row": "shares rows with", "crossing": "crosses"}[edge["relation"]]
        lines.append(f"  {verb} {_say(there)} at node {edge['node']!r}{coupling.traced.where(edge['node'])}")
    return "\n".join(lines)


def why_frozen(coupling: Coupling, name: str | Vertex) -> str:
    """Return which channels of a parameter may not go, and why."""
    lines = []
    for site in _sites(coupling, name):
        channels = np.unique(site.channels)
        held = int((channels == FIXED).sum())
        channels = channels[channels != FIXED]
        stuck = coupling.is_frozen[channels]
        title = f"{site.name}[{site.dim}]"
        if not stuck.any() and not held:
            lines.append(f"{title}: nothing is frozen, all {len(channels)} channels may go.")
            continue
        lines.append(f"{title}: {int(stuck.sum()) + held} of {len(channels) + held} channels may not go:")
        for frozen in coupling.frozen:
            count = int(np.isin(channels, frozen.channels).sum())
            if count:
                where = f" ({frozen.source})" if frozen.source else ""
                lines.append(f"  {count} because node {frozen.node!r}{where} {frozen.reason}")
        if held:
            lines.append(f"  {held} because they are at fixed positions")
    return "\n".join(lines)
