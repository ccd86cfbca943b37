"""Blocks that a network repeats, drawn once: equal boxes in equal places, each block reading the one before it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from fxprune.boxes import Box, Segment, change, short

LONGEST_BLOCK = 100
"""Boxes of a block, at most."""
LEAST_SAVED = 3
"""Boxes that are not drawn, at least, or the block is not worth a frame."""

Look = tuple[Hashable, int]
"""What has to be equal, and a size that has to be equal or to grow by the same from block to block."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """A block that is drawn once.

    Attributes:
        blocks: the nodes of every block, the first of which is drawn.
    """

    blocks: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)


def find_repeats(graph: nx.DiGraph, looks: Mapping[str, Look]) -> list[Repeat]:
    """Return the blocks that follow each other and are equal, those that save most boxes first.

    A block is a run of nodes in the order of the graph. Nodes of all blocks look alike and read the same: nodes of
    their own block or the one before it, or, all of them, one and the same earlier node. Only the last block is read
    by anything that comes after.

    Args:
        graph: its nodes in the order they run.
        looks: node -> how it looks.
    """
    order = list(graph)
    at = {node: i for i, node in enumerate(order)}
    reads = [frozenset(at[m] for m in graph.pred[n]) for n in order]
    last_reader = [max((at[m] for m in graph.succ[n]), default=-1) for n in order]
    seen = [looks[n] for n in order]
    found = []
    for start in range(len(order)):
        for period in range(1, min(LONGEST_BLOCK, (len(order) - start) // 2) + 1):
            count = _count(start, period, seen, reads, last_reader)
            if (count - 1) * period >= LEAST_SAVED:
                found.append(((1 - count) * period, period, start, count))
    taken: set[int] = set()
    repeats = []
    for _, period, start, count in sorted(found):
        places = range(start, start + period * count)
        if taken.isdisjoint(places):
            taken.update(places)
            blocks = [order[start + i * period : start + (i + 1) * period] for i in range(count)]
            repeats.append(Repeat(tuple(map(tuple, blocks))))
    return repeats


def _count(
    start: int, period: int, seen: Sequence[Look], reads: Sequence[frozenset[int]], last_reader: Sequence[int]
) -> int:
    """Return how many equal blocks of `period` nodes there are from `start` on."""
    count, step = 1, [0] * period
    while (end := start + (count + 1) * period) <= len(seen):
        before = end - 2 * period
        if any(last_reader[a] >= end for a in range(before, before + period)):
            break
        for place, b in enumerate(range(end - period, end)):
            a = b - period
            grows = seen[b][1] - seen[a][1]
            if seen[a][0] != seen[b][0] or (count > 1 and grows != step[place]):
                break
            if {u - period if u >= before else u for u in reads[b]} != reads[a]:
                break
            if any(start <= u < before for u in reads[b]):
                break
            step[place] = grows
        else:
            count += 1
            continue
        break
    return count if count > 2 or not any(step) else 1


def folded(graph: nx.DiGraph, repeats: Sequence[Repeat]) -> nx.DiGraph:
    """Return the graph with the first block of every repeat in place of all its blocks."""
    first = {node: own for r in repeats for block in r.blocks for node, own in zip(block, r.blocks[0], strict=True)}
    drawn = [node for node in graph if first.get(node, node) == node]
    new = nx.DiGraph()
    new.add_nodes_from(drawn)
    new.add_edges_from((first.get(a, a), b) for b in drawn for a in graph.pred[b])
    return new


def collapse(
    boxes: Mapping[str, Box], graph: nx.DiGraph
) -> tuple[dict[str, Box], nx.DiGraph, list[Repeat], dict[int, set[int]]]:
    """Put one box in place of the boxes of repeated blocks.

    Args:
        boxes: node -> box.
        graph: between them.

    Returns:
        Boxes, whose names and widths tell what they stand for; the graph between them; the repeats; and group -> the
        groups that it stands for, of those that stand for several.
    """
    repeats = find_repeats(graph, {node: _look(box) for node, box in boxes.items()})
    new = folded(graph, repeats)
    drawn = {node: boxes[node] for node in new}
    groups: dict[int, set[int]] = {}
    for repeat in repeats:
        for nodes in zip(*repeat.blocks, strict=True):
            alike = [boxes[node] for node in nodes]
            drawn[nodes[0]] = _joined(alike)
            for box in alike:
                for own, other in zip(alike[0].groups, box.groups, strict=True):
                    groups.setdefault(own, set()).add(other)
    return drawn, new, repeats, {own: others for own, others in groups.items() if len(others) > 1}


def _look(box: Box) -> Look:
    moves = tuple(s.group is None for s in box.segments)
    name = box.layer if box.kind == "layer" else box.name
    return (box.kind, re.sub(r"\d+", "#", name), moves), sum(s.before for s in box.segments)


def _joined(boxes: Sequence[Box]) -> Box:
    """Return one box for several that look alike."""
    first, last = boxes[0], boxes[-1]
    segments = tuple(
        Segment(same[0].group, same[0].before, round(sum(s.after for s in same) / len(same)))
        for same in zip(*(box.segments for box in boxes), strict=True)
    )
    name = short(named_together(first.layer, last.layer)) if first.layer else first.name
    before, after = ([sum(getattr(s, side) for s in b.segments) for b in boxes] for side in ("before", "after"))
    spread = change(_range(before), _range(after)) if segments else ""
    return replace(first, name=name, segments=segments, spread=spread)


def named_together(first: str, last: str) -> str:
    """Return one name for several that differ in numbers: `layer3.1` and `layer3.35` are `layer3.1-35`."""
    parts, others = re.split(r"(\d+)", first), re.split(r"(\d+)", last)
    if len(parts) != len(others):
        return f"{first}\N{EN DASH}{last}"
    return "".join(a if a == b else f"{a}\N{EN DASH}{b}" for a, b in zip(parts, others, strict=True))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}\N{EN DASH}{high}"
