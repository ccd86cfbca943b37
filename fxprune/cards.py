"""One group in detail, as plain data: its sites layer by layer, in the order they run, and the nodes that tie them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
from torch import fx

from fxprune.boxes import layer_of
from fxprune.collapsing import Repeat, find_repeats, named_together
from fxprune.coupling import Coupling, Site
from fxprune.errors import CouplingError
from fxprune.explaining import Vertex, origins
from fxprune.grouping import Group
from fxprune.units import makers_of


@dataclass(frozen=True, slots=True)
class Card:
    """The sites of a group in one layer.

    Attributes:
        layer: qualified name of the layer, or of a parameter that the network has itself; where a node makes channels
            without any parameter (rows, constants), that node.
        node: the fx node that runs it.
        reads: it reads the channels. Else it makes them, or has one value for each.
        sites: (parameter name, dim).
        width: how many positions of these dims the group has.
        size: how many positions there are.
        ties: nodes that tie it to a card before it, other than those that run one of the two.
        sources: of these nodes, or of the one that makes the channels, the user's source lines that are known.
    """

    layer: str
    node: str
    reads: bool
    sites: tuple[Vertex, ...]
    width: int
    size: int
    ties: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def made(self) -> bool:
        """Whether a node makes the channels without any parameter."""
        return self.sites[0][1] < 0

    @property
    def words(self) -> str:
        """The sites without the name of the layer, dim by dim: `weight, bias [0]`."""
        dims: dict[int, list[str]] = {}
        for name, dim in self.sites:
            dims.setdefault(dim, []).append(name.removeprefix(self.layer).removeprefix("."))
        return "; ".join(f"{', '.join(names)} [{dim}]".strip() for dim, names in dims.items())


def find_group(coupling: Coupling, wanted: int | str | Vertex) -> Group:
    """Return the group of a number, of a parameter, or of one dim of it.

    A parameter alone stands for the channels that it makes, if it makes some.

    Raises:
        CouplingError: there is no such group, or there are several.
    """
    groups = coupling.groups()
    if isinstance(wanted, int):
        if not 0 <= wanted < len(groups):
            raise CouplingError(f"there is no group {wanted}: the network has {len(groups)}, numbered from 0.")
        return groups[wanted]
    named = [group for group in groups if group.name == wanted]
    if len(named) == 1:
        return named[0]
    name, dim = (wanted, None) if isinstance(wanted, str) else wanted
    sites = [s for s in coupling.sites if s.name == name and dim in (None, s.dim)]
    channels = np.unique(np.concatenate([s.channels.ravel() for s in sites])) if sites else np.empty(0, dtype=np.int64)
    found = [g for g in groups if np.isin(g.choices, channels).any()]
    found = found or [g for g in groups if coupling.in_group(g)[channels].any()]
    if len(found) > 1 and dim is None:
        makers = makers_of(coupling)
        found = [g for g in found if any(s.name == name for s in makers[g.index])] or found
    if len(found) == 1:
        return found[0]
    if not sites:
        raise CouplingError(f"no parameter {wanted!r} with channels in this network. See `coupling.sites`.")
    if not found:
        raise CouplingError(f"no channel of {wanted!r} may go. Ask `coupling.why_frozen({wanted!r})`.")
    numbers = ", ".join(str(group.index) for group in found)
    raise CouplingError(f"{wanted!r} has channels of the groups {numbers}. Name one, or pass a dim: ({name!r}, 0).")


def cards_of(coupling: Coupling, group: Group) -> list[Card]:
    """Return the sites of a group, layer by layer, in the order they run."""
    mine = coupling.in_group(group)
    place = {node.name: i for i, node in enumerate(coupling.traced.graph.nodes)}
    runs = _runs(coupling.traced.graph.nodes)
    makers = {(s.name, s.dim) for s in makers_of(coupling)[group.index]}
    sites = [s for s in coupling.sites if mine[s.channels].any()]
    twice = {s.name for s in sites if sum(t.name == s.name for t in sites) > 1}
    found: dict[tuple[str, bool, int], Card] = {}
    own: dict[str, list[str]] = {}
    for site in sites:
        layer, nodes = _layer(coupling, site, runs)
        own[layer] = nodes if layer != site.name else []  # what reads a parameter of the network itself is no layer
        passes = any(mine[ids].any() for n in nodes for t in coupling.at(n) for ids in t.labels if ids is not None)
        reads = not passes or (site.name in twice and (site.name, site.dim) not in makers)
        row = np.moveaxis(site.channels, site.dim, -1).reshape(-1, site.channels.shape[site.dim])[0]
        key = (layer, reads, len(row))
        card = found.get(key) or Card(
            layer, min(nodes, key=place.__getitem__), reads, (), int(mine[row].sum()), len(row)
        )
        found[key] = replace(card, sites=(*card.sites, (site.name, site.dim)))
    made = _made(coupling, mine)
    own.update((node, [node]) for node in made)
    cards = [*found.values(), *(Card(node, node, False, ((node, -1),), n, n) for node, n in made.items())]
    cards.sort(key=lambda card: (place[card.node], card.reads))
    return _tied(coupling, cards, own)


def _runs(nodes: Iterable[fx.Node]) -> dict[str, list[str]]:
    """Return module or parameter -> the nodes that run or read it."""
    runs: dict[str, list[str]] = {}
    for node in nodes:
        if node.op == "call_module":
            runs.setdefault(str(node.target), []).append(node.name)
        elif node.op == "get_attr":
            readers = [user.name for user in node.users if user.op != "output"]
            runs.setdefault(str(node.target), []).extend(readers or [node.name])
    return runs


def _layer(coupling: Coupling, site: Site, runs: dict[str, list[str]]) -> tuple[str, list[str]]:
    """Return the layer of a site, and the nodes that run it."""
    layer, at = layer_of(site.name), site.name
    while at and at not in runs:
        at = at.rpartition(".")[0]
    return layer, runs[at] if at else [coupling.record.named_at[site.name]]


def _made(coupling: Coupling, mine: np.ndarray) -> dict[str, int]:
    """Return the nodes that make channels of a group without a parameter, with how many."""
    vertices, of_atom = origins(coupling)
    hit = of_atom[mine[coupling.channels(np.arange(len(of_atom)))]]
    counts = np.bincount(hit, minlength=len(vertices))
    found: dict[str, int] = {}
    for i in np.flatnonzero(counts).tolist():
        node, dim = vertices[i]
        if dim < 0:
            found[node] = found.get(node, 0) + int(counts[i])
    return found


def _tied(coupling: Coupling, cards: Sequence[Card], own: dict[str, list[str]]) -> list[Card]:
    """Add to each card the nodes that tie it to one before it."""
    home = {vertex: i for i, card in enumerate(cards) for vertex in card.sites}
    ties: list[dict[str, None]] = [{} for _ in cards]
    for a, b, edge in coupling.graph.subgraph(home).edges(data=True):
        first, last = sorted((home[a], home[b]))
        if first != last and edge["node"] not in (*own.get(cards[first].layer, ()), *own.get(cards[last].layer, ())):
            ties[last][edge["node"]] = None
    source = coupling.traced.source
    return [
        replace(card, ties=tuple(found), sources=tuple(dict.fromkeys(line for n in nodes if (line := source(n)))))
        for card, found in zip(cards, ties, strict=True)
        for nodes in [[card.node] if card.made else found]
    ]


def fold(cards: Sequence[Card]) -> tuple[list[Card], dict[int, tuple[int, int]]]:
    """Put one card in place of those of repeated blocks.

    Returns:
        The cards; and position of the first card of a block -> how many cards it has, and how often it occurs.
    """
    names = ["", *map(str, range(len(cards)))]
    chain = nx.DiGraph()
    nx.add_path(chain, names)
    looks = {str(i): (_look(card), card.width) for i, card in enumerate(cards)}
    repeats = find_repeats(chain, {"": (None, 0), **looks})
    first = {block[0]: r for r in repeats for block in r.blocks[:1]}
    gone = {node for r in repeats for block in r.blocks[1:] for node in block}
    found: list[Card] = []
    blocks: dict[int, tuple[int, int]] = {}
    joined = {n: card for r in repeats for n, card in _joined(r, cards)}
    for i, card in enumerate(cards):
        if str(i) in first:
            blocks[len(found)] = (len(first[str(i)].blocks[0]), first[str(i)].count)
        if str(i) not in gone:
            found.append(joined.get(i, card))
    return found, blocks


def _look(card: Card) -> tuple[str, ...]:
    ties = [re.sub(r"_\d+$", "", tie) for tie in card.ties]
    return tuple(re.sub(r"\d+", "#", word) for word in (card.layer, card.words, str(card.reads), *ties))


def _joined(repeat: Repeat, cards: Sequence[Card]) -> Iterable[tuple[int, Card]]:
    for a, b in zip(repeat.blocks[0], repeat.blocks[-1], strict=True):
        one, other = cards[int(a)], cards[int(b)]
        ties = tuple(named_together(x, y) for x, y in zip(one.ties, other.ties, strict=True))
        layer = named_together(one.layer, other.layer)
        sites = tuple((named_together(x, y), dim) for (x, dim), (y, _) in zip(one.sites, other.sites, strict=True))
        yield int(a), replace(one, layer=layer, sites=sites, ties=ties)
