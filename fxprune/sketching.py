"""What a picture of a compilation shows, as plain data that outlives the coupling: boxes, groups, ties, reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxprune.atoms import FIXED
from fxprune.boxes import Box, find_boxes, groups_of, shown, split
from fxprune.closing import owner
from fxprune.coupling import Coupling
from fxprune.freezing import FrozenRow
from fxprune.grouping import Group
from fxprune.pausing import without_collector
from fxprune.planning import keep_of
from fxprune.plans import Plan

FIXED_REASON = "is at fixed positions, which no op lets go"
ONE_STEP_REASON = "is all that its group has: the last of a group always stays"


@dataclass(frozen=True, slots=True)
class Cut:
    """What a group loses along one dim of one parameter or buffer: positions before and after."""

    name: str
    dim: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Tie:
    """Why two sites hang together: the node that tied them, and the user's line.

    Attributes:
        a: a parameter with its dim, such as `conv.weight[0]`, or a node that makes channels.
        b: another.
        node: the fx node.
        source: the user's source line of that node, or "".
        relation: "tie", "row" or "crossing".
        groups: of which groups.
    """

    a: str
    b: str
    node: str
    source: str
    relation: str
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SketchedGroup:
    """A group: how many channels it has and keeps, and what it cuts."""

    name: str
    kind: str
    before: int
    after: int
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What a picture of a compilation shows.

    Attributes:
        network: class of the model.
        boxes: layers, joins, inputs and outputs; their segments name groups by position.
        edges: (node, node), from what is read to what reads it.
        sources: node of a box -> the user's source line, where there is one.
        held: node of a box -> what holds the channels of its output that may not go.
        groups: in graph order.
        ties: edges of the dependency graph.
    """

    network: str
    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]
    sources: Mapping[str, str]
    held: Mapping[str, tuple[FrozenRow, ...]]
    groups: tuple[SketchedGroup, ...]
    ties: tuple[Tie, ...]


@without_collector
def sketch(coupling: Coupling, plan: Plan) -> Sketch:
    """Take down what a picture of a plan needs.

    Args:
        coupling: of the network.
        plan: what stays of it.

    Raises:
        ArtifactError: the plan is of another network.
    """
    keep, groups = keep_of(coupling, plan), groups_of(coupling)
    boxes, graph = find_boxes(coupling, keep)
    sites = _sites(coupling, groups, keep)
    return Sketch(
        type(coupling.traced.model).__name__,
        tuple(boxes.values()),
        tuple(graph.edges),
        {node: source for node in boxes if (source := coupling.traced.source(node))},
        _held(coupling, boxes, groups),
        _groups(coupling, keep, sites),
        _ties(coupling, sites),
    )


Sites = Mapping[tuple[str, int], Mapping[int, Cut]]
"""(parameter name, dim) -> group -> what it loses there."""


def _sites(coupling: Coupling, groups: np.ndarray, keep: np.ndarray) -> Sites:
    keep = np.append(keep, True)
    known: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}  # many sites share one array of channels
    found: dict[tuple[str, int], dict[int, Cut]] = {}
    for site in coupling.sites:
        ids = site.channels
        home = (id(owner(ids)), () if ids.size == ids.shape[site.dim] else (site.dim, *ids.shape))
        if home not in known:
            rows = np.moveaxis(ids, site.dim, -1).reshape(-1, ids.shape[site.dim])
            parts = split(rows, groups, keep)
            known[home] = [(s.group, s.before, s.after) for s in parts if s.group is not None]
        found[site.name, site.dim] = {
            group: Cut(site.name, site.dim, before, after) for group, before, after in known[home]
        }
    counted = {group for there in found.values() for group in there}
    for group in coupling.groups():
        if group.index not in counted:
            _add_overlapping(coupling, group, keep, found)
    return found


def _add_overlapping(
    coupling: Coupling, group: Group, keep: np.ndarray, found: dict[tuple[str, int], dict[int, Cut]]
) -> None:
    """Add the cuts of a group whose channels are all counted elsewhere: whole rows, where columns are counted."""
    mine = np.where(coupling.in_group(group), group.index, -1)
    for channels, where in coupling.arrays:
        if (mine[channels] == group.index).any():
            for site in (coupling.sites[number] for number in where):
                rows = np.moveaxis(site.channels, site.dim, -1).reshape(-1, site.channels.shape[site.dim])
                for s in split(rows, mine, keep):
                    if s.group is not None:
                        found[site.name, site.dim][group.index] = Cut(site.name, site.dim, s.before, s.after)


def _groups(coupling: Coupling, keep: np.ndarray, sites: Sites) -> tuple[SketchedGroup, ...]:
    cuts: dict[int, list[Cut]] = {}
    for there in sites.values():
        for group, cut in there.items():
            cuts.setdefault(group, []).append(cut)
    return tuple(
        SketchedGroup(g.name, g.kind, g.width, int(keep[g.choices].sum()), tuple(cuts.get(g.index, ())))
        for g in coupling.groups()
    )


def _ties(coupling: Coupling, sites: Sites) -> tuple[Tie, ...]:
    """Return the edges between sites of a group; a node that makes channels stands in for the sites tied to it."""
    ties = []
    for a, b, edge in coupling.graph.edges(data=True):
        known = [set(sites[end]) for end in (a, b) if end in sites]
        groups = set.intersection(*known) if known else set()
        if groups:
            node, (first, second) = edge["node"], sorted([_say(a), _say(b)])
            ties.append(Tie(first, second, node, coupling.traced.source(node), edge["relation"], tuple(sorted(groups))))
    return tuple(ties)


def _say(vertex: tuple[str, int]) -> str:
    return f"{vertex[0]}[{vertex[1]}]" if vertex[1] >= 0 else f"node {vertex[0]}"


def _held(coupling: Coupling, boxes: Mapping[str, Box], groups: np.ndarray) -> dict[str, tuple[FrozenRow, ...]]:
    """Return why channels of boxes may not go, most channels first."""
    by = np.full(coupling.num_channels + 1, -1)
    for i, frozen in reversed(list(enumerate(coupling.frozen))):
        by[frozen.channels] = i
    by[FIXED] = -2
    held = {}
    for node, box in boxes.items():
        ids = None if box.kind == "output" else shown(coupling, node, groups)
        if ids is None:
            continue
        reasons, counts = np.unique(by[ids[0]][groups[ids[0]] < 0], return_counts=True)
        rows = [_row(coupling, i, n) for i, n in zip(reasons.tolist(), counts.tolist(), strict=True)]
        if rows:
            held[node] = tuple(sorted(rows, key=lambda row: -row.channels))
    return held


def _row(coupling: Coupling, index: int, count: int) -> FrozenRow:
    if index < 0:
        return FrozenRow(count, "", "", FIXED_REASON if index == -2 else ONE_STEP_REASON)
    frozen = coupling.frozen[index]
    return FrozenRow(count, frozen.node, frozen.source, frozen.reason)
