"""What a picture of a network shows: layers, joins, inputs and outputs, and the groups their channels belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.atoms import FIXED
from fxprune.coupling import Coupling
from fxprune.grouping import Group

CONCATS = (torch.cat, torch.concat, torch.ops.aten.cat.default)
LONGEST_NAME = 26
"""Characters of a layer's name; longer ones lose their first parts."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Channels of one group in one output: `group` is None for those that stay as they are."""

    group: int | None
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Box:
    """What is drawn for one layer, join, input or output of the network.

    Attributes:
        node: the fx node; for outputs of the network a name of its own.
        kind: "layer", "join", "input" or "output".
        name: what is written.
        segments: the channels of the output, group by group.
        layer: the qualified name of a layer, of which `name` may be the end.
        spread: the widths of a box that stands for several, as text.
    """

    node: str
    kind: str
    name: str
    segments: tuple[Segment, ...] = ()
    layer: str = ""
    spread: str = ""

    @property
    def size(self) -> str:
        """The width of the output: before, and after where that is another."""
        if self.spread or not self.segments:
            return self.spread
        return change(sum(s.before for s in self.segments), sum(s.after for s in self.segments))

    @property
    def groups(self) -> list[int]:
        """The groups that decide over the output."""
        return [s.group for s in self.segments if s.group is not None]


def change(before: int | str, after: int | str) -> str:
    """Return a width before, and after where that is another."""
    return f"{before}" if before == after else f"{before}\N{RIGHTWARDS ARROW}{after}"


def find_boxes(coupling: Coupling, keep: np.ndarray) -> tuple[dict[str, Box], nx.DiGraph]:
    """Return what to draw: layers that own parameters, joins, inputs and outputs, and the edges between them.

    A concat of all that an earlier one holds, and more, is drawn as reading that one: dense blocks are chains then.

    Args:
        coupling: the coupled network.
        keep: (channels,) which stay.
    """
    module = coupling.traced.root
    groups = groups_of(coupling)
    boxes: dict[str, Box] = {}
    graph = nx.DiGraph()
    reach: dict[fx.Node, list[str]] = {}
    concats: dict[tuple[Any, ...], fx.Node] = {}

    def add(box: Box, sources: Iterable[str]) -> list[str]:
        boxes[box.node] = box
        graph.add_node(box.node)
        graph.add_edges_from((source, box.node) for source in sources)
        return [box.node]

    for node in coupling.traced.graph.nodes:
        sources = list(dict.fromkeys(s for n in _read(node, concats) for s in reach[n]))
        if node.op == "output":
            for name, leaf in _outputs(node).items():
                add(Box(f"output:{name}", "output", name), reach[leaf])
        elif not coupling.at(node.name) or node.op == "get_attr":
            reach[node] = []
        elif node.op == "placeholder":
            shape = "\N{MULTIPLICATION SIGN}".join(map(str, coupling.at(node.name)[0].shape))
            reach[node] = add(Box(node.name, "input", f"{node.name} {shape}"), [])
        else:
            layer, flat = _layer(node, module)
            segments = _segments(coupling, node.name, groups, keep)
            alone = all(len(n.users) == 1 for n in node.all_input_nodes if reach[n])
            if layer and not (flat and alone and _same(sources, boxes, segments)):
                reach[node] = add(Box(node.name, "layer", short(layer), segments, layer), sources)
            elif not layer and len(sources) > 1:
                reach[node] = add(Box(node.name, "join", _operation(node), segments), sources)
            else:
                reach[node] = sources
    return boxes, graph


def _read(node: fx.Node, concats: dict[tuple[Any, ...], fx.Node]) -> list[fx.Node]:
    """Return what a node reads; instead of the first inputs of a concat, the longest earlier concat of just these.

    Args:
        node: the node.
        concats: (dim, inputs) -> node, of all concats so far; this one is added.
    """
    if node.target not in CONCATS or not node.args or not isinstance(node.args[0], (tuple, list)):
        return node.all_input_nodes
    along = (*node.args[1:], *node.kwargs.items())
    inputs = tuple([n for n in node.args[0] if isinstance(n, fx.Node)])
    first = next((n for n in range(len(inputs) - 1, 1, -1) if (along, inputs[:n]) in concats), 0)
    earlier = concats.get((along, inputs[:first]))
    concats[along, inputs] = node
    return node.all_input_nodes if earlier is None else [earlier, *inputs[first:]]


def _same(sources: list[str], boxes: dict[str, Box], segments: tuple[Segment, ...]) -> bool:
    """Say whether a node only reads one layer, and returns that layer's channels."""
    return len(sources) == 1 and boxes[sources[0]].kind == "layer" and boxes[sources[0]].segments == segments


def _layer(node: fx.Node, module: nn.Module) -> tuple[str, bool]:
    """Return the layer whose parameters a node reads, or "", and whether all of them are vectors, as a norm's are."""
    if node.op == "call_module":
        parameters = list(module.get_submodule(str(node.target)).parameters())
        return (str(node.target) if parameters else ""), all(p.ndim < 2 for p in parameters)
    read: list[tuple[str, nn.Parameter]] = []
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            prefix, _, name = str(source.target).rpartition(".")
            value = getattr(module.get_submodule(prefix), name, None)
            if isinstance(value, nn.Parameter):
                read.append((prefix or name, value))
    return (read[0][0] if read else ""), all(p.ndim < 2 for _, p in read)


def _outputs(node: fx.Node) -> dict[str, fx.Node]:
    """Return name -> node of everything that the network returns."""
    leaves, _ = pytree.tree_flatten_with_path(node.args[0])
    named = {".".join(re.findall(r"\w+", pytree.keystr(path))): leaf for path, leaf in leaves}
    if len(named) == 1:
        named = {re.sub(r"^\d*$", "output", name): leaf for name, leaf in named.items()}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, fx.Node)}


def _operation(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.rpartition(".")[2].strip("_") if node.op == "call_module" else name.partition(".")[0].strip("_")


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter, or the parameter where it has none."""
    return parameter.rpartition(".")[0] or parameter


def short(name: str) -> str:
    """Shorten a layer's name to its last parts."""
    while len(name) > LONGEST_NAME and "." in name:
        name = name.lstrip("\N{HORIZONTAL ELLIPSIS}").partition(".")[2]
        name = "\N{HORIZONTAL ELLIPSIS}" + name
    return name


def groups_of(coupling: Coupling) -> np.ndarray:
    """Return the group (channels + 1,) that decides over each channel, the widest of several; -1 where it stays."""
    of = np.full(coupling.num_channels + 1, -1)
    width = np.zeros(coupling.num_channels + 1)
    for group in shrinking(coupling):
        of[group.choices] = group.index
        width[group.choices] = group.width
    members = coupling.members
    pairs = np.flatnonzero((of[members.choice] >= 0) & (of[members.channel] < 0))
    pairs = pairs[np.argsort(width[members.choice[pairs]], kind="stable")]
    of[members.channel[pairs]] = of[members.choice[pairs]]
    of[:-1][coupling.is_frozen] = -1
    of[FIXED] = -1
    return of


def shrinking(coupling: Coupling) -> list[Group]:
    """Return the groups that have more than what they must keep."""
    return [group for group in coupling.groups() if group.levels > 1]


def shown(coupling: Coupling, node: str, groups: np.ndarray) -> np.ndarray | None:
    """Return the channels (rows, size) of a node's first tensor along the dim with most of them that may go.

    None where no dim has any channels. Where there are several rows, positions differ from row to row.
    """
    tensor = coupling.at(node)[0]
    labelled = [d for d, ids in enumerate(tensor.labels) if ids is not None]
    found = [np.moveaxis(np.asarray(tensor.labels[d]), d, -1).reshape(-1, tensor.shape[d]) for d in labelled]
    return max(found, key=lambda rows: (int((groups[rows[0]] >= 0).sum()), rows.shape[1]), default=None)


def split(ids: np.ndarray, groups: np.ndarray, keep: np.ndarray) -> tuple[Segment, ...]:
    """Count channels (rows, size) group by group: those of a row, and those that stay of it.

    Args:
        ids: the channels, -1 at fixed positions.
        groups: (channels + 1,) the group of each.
        keep: (channels + 1,) which stay.
    """
    of, stays = groups[ids[0]], keep[ids]
    after = {g: int(stays[:, of == g].sum(axis=1).max()) for g in dict.fromkeys(of.tolist())}
    return tuple(Segment(g if g >= 0 else None, int((of == g).sum()), n) for g, n in after.items())


def _segments(coupling: Coupling, node: str, groups: np.ndarray, keep: np.ndarray) -> tuple[Segment, ...]:
    ids = shown(coupling, node, groups)
    if ids is not None:
        return split(ids, groups, np.append(keep, True))
    shape = coupling.at(node)[0].shape
    size = shape[1 if len(shape) in (2, 4, 5) else -1] if shape else 1
    return (Segment(None, size, size),)
