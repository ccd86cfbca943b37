"""Which layers of a slim network the dense one has too, and what the output of each is added to, such as a shortcut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.aliasing import writes
from fxprune.emptying import live_operand
from fxprune.gathering import Call
from fxprune.walking import Seen, Walk

AUDIBLE = 1e-3
"""A channel that a batch norm scales by less than this share of the most is not made to say what others miss."""
MOMENTS = 12
"""How many times the moment of a layer is there while it is fitted."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a node runs: a layer or a batch norm.

    Attributes:
        name: of the layer's weight, or of the batch norm's running mean.
        call: how the layer uses its weight; None for a batch norm.
        eps: of the batch norm.
        scale: the batch norm's weight, if it has one.
    """

    name: str
    call: Call | None
    eps: float
    scale: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Survey:
    """Where a network uses what.

    Attributes:
        order: node -> its number among all nodes.
        places: node -> the layer or batch norm that it runs, where that is one, and is run nowhere else.
        reads: node -> the nodes of tensors that it reads, but for parameters and buffers.
        passing: nodes that return what they read as it is, such as dropout.
        shapes: node -> shape of what it returned, where that is a tensor.
        peak: the most bytes that values take.
    """

    order: Mapping[fx.Node, int]
    places: Mapping[fx.Node, Place]
    reads: Mapping[fx.Node, Sequence[fx.Node]]
    passing: Container[fx.Node]
    shapes: Mapping[fx.Node, torch.Size]
    peak: int

    def norm_behind(self, layer: fx.Node) -> fx.Node | None:
        """Return the batch norm over the channels of a layer that reads its output, and nothing else does."""
        call = self.places[layer].call if layer in self.places else None
        if call is None or len(layer.users) != 1 or not (call.kernel or len(self.shapes[layer]) == 2):
            return None
        (user,) = layer.users
        place = self.places.get(user)
        return user if place is not None and place.call is None and self.reads[user] == [layer] else None


def survey(module: torch.nn.Module, graph: fx.Graph, example: Sequence[Any]) -> Survey:
    """Run a network on one example, in eval mode and without gradients, for which the caller cares."""
    walk = Walk(module, graph, [example])
    (values,) = walk.values
    seen: dict[fx.Node, list[Place]] = {}
    reads, passing = {}, set()
    shapes = {n: value.shape for n, value in values.items() if isinstance(value, torch.Tensor)}
    often: Counter[str] = Counter()
    for n in walk.nodes():
        found = walk.run(n)[0]
        often.update(_names(found))
        seen[n] = [Place(s.name, s.call, s.eps, s.scale) for s in found]
        reads[n] = [a for a in n.all_input_nodes if a.op != "get_attr" and isinstance(values[a], torch.Tensor)]
        if isinstance(values[n], torch.Tensor):
            shapes[n] = values[n].shape
            if len(reads[n]) == 1 and not writes(n, module) and _is_same(values[reads[n][0]], values[n]):
                passing.add(n)
    places = {n: p[0] for n, p in seen.items() if len(p) == 1 and all(often[name] == 1 for name in _names(p))}
    return Survey({n: i for i, n in enumerate(graph.nodes)}, places, reads, passing, shapes, walk.peak)


def _names(found: Iterable[Seen | Place]) -> list[str]:
    """Return the parameters and buffers that are used: weights, running means, biases."""
    layers = [s.call.layer for s in found if s.call is not None]
    return [s.name for s in found] + [layer.bias for layer in layers if layer.bias is not None]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors are the same memory, read in the same way."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


@dataclass(frozen=True, slots=True)
class Addition:
    """Where the output of a layer is added to something else, with a batch norm on the way or none.

    Attributes:
        name: of the node.
        other: the node that it is added to; it runs before the layer.
        norm: the batch norm on the way.
    """

    name: str
    other: fx.Node
    norm: Place | None

    def owed(self, missing: torch.Tensor, dim: int, var: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
        """Return by how much the layer's output has to rise for the sum to have what the other operand misses.

        Args:
            missing: of the other operand.
            dim: of the channels.
            var: the batch norm's running variance.
            kept: of the batch norm's channels, those of what is missing.
        """
        if self.norm is None or var is None:
            return missing
        gain = (var[kept] + self.norm.eps).rsqrt()
        if self.norm.scale is not None:
            gain = gain * self.norm.scale[kept]
        shape = [1] * missing.ndim
        shape[dim] = -1
        return missing * torch.where(gain.abs() > AUDIBLE * gain.abs().max(), 1 / gain, 0).reshape(shape)


def addition_of(layer: fx.Node, seen: Survey) -> Addition | None:
    """Return the addition that the output of a layer goes to, and nothing else; None where there is none."""
    norm = seen.norm_behind(layer)
    at = layer if norm is None else norm
    while len(at.users) == 1:
        (user,) = at.users
        other = live_operand(user, at)
        if other is not None:
            fits = seen.order[other] < seen.order[layer] and seen.shapes.get(other) == seen.shapes[at]
            return Addition(user.name, other, None if norm is None else seen.places[norm]) if fits else None
        if user not in seen.passing:
            return None
        at = user
    return None


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer that both networks have.

    Attributes:
        home: the dense network's node of the weight.
        call: how the slim network uses it.
        absorbs: whether a constant in the output is taken up: by the layer's bias, or by the batch norm behind it.
        additions: of the output, in the dense and the slim network; None where either has none.
    """

    home: fx.Node
    call: Call
    absorbs: bool
    additions: tuple[Addition, Addition] | None


def pairs_of(dense: Survey, slim: Survey, norms: Container[str], room: int) -> dict[fx.Node, Pair]:
    """Return node of the slim network -> its layer, of those that both networks come to in the same order.

    Args:
        dense: survey of the dense network.
        slim: of the slim one.
        norms: running means of the batch norms whose statistics are set.
        room: bytes that the fit of a layer may take.
    """
    homes = {place.name: n for n, place in dense.places.items() if place.call is not None}
    found: dict[fx.Node, Pair] = {}
    last = -1
    for n, place in slim.places.items():
        home = homes.get(place.name)
        if place.call is None or home is None or dense.order[home] < last:
            continue
        if not _is_alike(place.call, slim.shapes[n], dense.shapes[home], room):
            continue
        norm = slim.norm_behind(n)
        absorbs = place.call.layer.bias is not None or (norm is not None and slim.places[norm].name in norms)
        additions = _additions(addition_of(home, dense), addition_of(n, slim), norms)
        found[n] = Pair(home, place.call, absorbs, additions)
        last = dense.order[home]
    return found


def _is_alike(call: Call, slim: torch.Size, dense: torch.Size, room: int) -> bool:
    """Say whether two outputs have the same positions, and the fit of the layer finds room."""
    layer = call.layer
    n = layer.inputs * layer.taps + layer.outputs
    positions = [[size for i, size in enumerate(shape) if i != call.dim % len(shape)] for shape in (slim, dense)]
    return positions[0] == positions[1] and 8 * MOMENTS * layer.blocks * n * n <= room


def _additions(
    dense: Addition | None, slim: Addition | None, norms: Container[str]
) -> tuple[Addition, Addition] | None:
    """Return both, where they are the same one, with the same batch norm on the way, whose statistics are set, or none.

    A branch that has gone may have taken its addition along: then the output of a layer goes to the next one.
    """
    if dense is None or slim is None or dense.name != slim.name:
        return None
    names = {addition.norm.name if addition.norm is not None else "" for addition in (dense, slim)}
    return (dense, slim) if names == {""} or (len(names) == 1 and names.pop() in norms) else None
