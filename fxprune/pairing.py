"""Which layers of a slim network the dense one has too, and what the output of each is added to, such as a shortcut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Survey:
    """Where a network uses what.

    Attributes:
        order: node -> its place among all nodes.
        places: node -> the layer or batch norm that it runs, where that is one, and is run nowhere else.
        passing: nodes that return their input as it is, such as dropout.
        shapes: node -> shape of what it returned, where that is a tensor.
        peak: the most bytes that values take.
    """

    order: Mapping[fx.Node, int]
    places: Mapping[fx.Node, Seen]
    passing: Container[fx.Node]
    shapes: Mapping[fx.Node, torch.Size]
    peak: int


def survey(module: torch.nn.Module, graph: fx.Graph, example: Sequence[Any]) -> Survey:
    """Run a network on one example, in eval mode and without gradients, for which the caller cares."""
    walk = Walk(module, graph, [example])
    (values,) = walk.values
    seen, passing, shapes = {}, set(), {n: v.shape for n, v in values.items() if isinstance(v, torch.Tensor)}
    for n in walk.nodes():
        seen[n] = walk.run(n)[0]
        if isinstance(values[n], torch.Tensor):
            shapes[n] = values[n].shape
            given = [values[a] for a in n.all_input_nodes]
            if len(given) == 1 and not writes(n, module) and _is_same(given[0], values[n]):
                passing.add(n)
    often = Counter(s.name for found in seen.values() for s in found)
    places = {n: s[0] for n, s in seen.items() if len(s) == 1 and often[s[0].name] == 1}
    return Survey({n: i for i, n in enumerate(graph.nodes)}, places, passing, shapes, walk.peak)


def _is_same(a: Any, b: torch.Tensor) -> bool:
    """Say whether two tensors are the same memory, read in the same way."""
    return isinstance(a, torch.Tensor) and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


@dataclass(frozen=True, slots=True)
class Addition:
    """Where the output of a layer is added to something else, with a batch norm on the way or none.

    Attributes:
        other: the node that it is added to; it runs before the layer.
        norm: the batch norm at work, as it was seen.
    """

    other: fx.Node
    norm: Seen | None

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
    norm, at = None, layer
    while len(at.users) == 1:
        (user,) = at.users
        other, place = live_operand(user, at), seen.places.get(user)
        if other is not None:
            fits = seen.order[other] < seen.order[layer] and seen.shapes.get(other) == seen.shapes[at]
            return Addition(other, norm) if fits else None
        if norm is None and place is not None and place.call is None and user.all_input_nodes == [at]:
            norm = place
        elif user not in seen.passing:
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
        room: bytes that the moment of a layer may take.
    """
    homes = {s.name: n for n, s in dense.places.items() if s.call is not None}
    normed = {id(s.x) for s in slim.places.values() if s.call is None and s.name in norms}
    found: dict[fx.Node, Pair] = {}
    last = -1
    for n, seen in slim.places.items():
        home = homes.get(seen.name)
        if seen.call is None or home is None or dense.order[home] < last:
            continue
        if not _is_alike(seen.call, seen.out, dense.places[home].out, room):
            continue
        absorbs = seen.call.layer.bias is not None or id(seen.out) in normed
        found[n] = Pair(home, seen.call, absorbs, _additions(addition_of(home, dense), addition_of(n, slim), norms))
        last = dense.order[home]
    return found


def _is_alike(call: Call, out: torch.Tensor, dense: torch.Tensor, room: int) -> bool:
    """Say whether two outputs have the same positions, and the moment of the layer fits into memory."""
    layer, dim = call.layer, call.dim
    n = layer.inputs * layer.taps + layer.outputs
    return out.select(dim, 0).shape == dense.select(dim, 0).shape and 8 * layer.blocks * n * n <= room


def _additions(
    dense: Addition | None, slim: Addition | None, norms: Container[str]
) -> tuple[Addition, Addition] | None:
    """Return both, where there are both, with the same batch norm on the way, whose statistics are set, or none."""
    if dense is None or slim is None:
        return None
    names = {addition.norm.name if addition.norm is not None else "" for addition in (dense, slim)}
    return (dense, slim) if names == {""} or (len(names) == 1 and names.pop() in norms) else None
