"""Which tasks each layer of a picture serves: those whose outputs are computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase

import networkx as nx

from fxprune.boxes import Box


def serve(boxes: Mapping[str, Box], graph: nx.DiGraph) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Say which tasks what is drawn serves.

    Tasks are the outputs of the network, or what the outermost container that holds several of them calls its parts.

    Args:
        boxes: node -> box.
        graph: between them.

    Returns:
        Letter -> task, of networks with several tasks; and node -> the letters of the tasks it serves, of those that
        do not serve all.
    """
    paths = {box.node: box.name.split(".") for box in boxes.values() if box.kind == "output"}
    depth = 0
    while len({tuple(path[: depth + 1]) for path in paths.values()}) == 1 and all(p[depth:] for p in paths.values()):
        depth += 1
    tasks: dict[str, set[str]] = {}
    for node, path in paths.items():
        tasks.setdefault(".".join(path[: depth + 1]), set()).update(nx.ancestors(graph, node), [node])
    if len(tasks) < 2:
        return {}, {}
    letters = {_letter(i): task for i, task in enumerate(tasks)}
    serves = {node: tuple(letter for letter, task in letters.items() if node in tasks[task]) for node in graph}
    return letters, {node: found for node, found in serves.items() if 0 < len(found) < len(tasks)}


def _letter(number: int) -> str:
    """Return A to Z, then AA, AB, ..."""
    rest = ascii_uppercase[number % 26]
    return rest if number < 26 else _letter(number // 26 - 1) + rest
