"""Lengths that follow the input: nothing may go of a dim that is cut where the size of the input says.

Which positions `table[:, :x.shape[1]]` reads is another with every input: the example shows some, and all must stay,
with the expression. A size that follows the input is that of a dim without labels, such as the batch or the length of
a sequence, and what is computed from it. Sizes of labelled dims are those of the network: bounds that are computed
from these are found again in `positions`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxprune.literals import argument, plain_name
from fxprune.records import Follows, Labelled
from fxprune.registering import registering

Known = Mapping[str, Follows]
"""Node -> whether what it returned follows the input."""

Dims = Callable[[fx.Node, int, Known], Iterator[int]]
"""Yields those of so many dims that a node cuts, or makes, by what follows the input."""

CUTS: dict[str, Dims] = {}
"""Plain name of a target -> dims of its first argument, of which it takes positions."""

MAKES: dict[str, Dims] = {}
"""Plain name of a target -> dims of its result, whose length it sets."""


def follows(n: fx.Node, tensors: bool, nodes: Mapping[str, list[Labelled]], known: Known) -> Follows:
    """Say whether numbers that a node returned follow the input: of a tuple, for each.

    Args:
        n: the node.
        tensors: whether there are tensors in what it returned.
        nodes: shapes and labels at the nodes before.
        known: the answers for the nodes before.

    Returns:
        Of tensors, whether they are computed from any that goes in, or from such a number.
    """
    if n.op in ("placeholder", "get_attr"):
        return n.op == "placeholder" and tensors
    source = n.args[0] if n.args and not tensors else None
    if isinstance(source, fx.Node):
        if nodes.get(source.name):
            return _read(n, nodes[source.name][0], given_by(source, known))
        flag = known[source.name]
        if n.target is operator.getitem and isinstance(flag, tuple) and isinstance(n.args[1], (int, slice)):
            return flag[n.args[1]]
    return _any(known[m.name] for m in n.all_input_nodes)


def _read(n: fx.Node, x: Labelled, moves: bool) -> Follows:
    """Say whether a size that is read from a tensor follows the input, or all of its sizes."""
    sizes = tuple([moves and ids is None for ids in x.labels])
    name = n.args[1] if n.target is getattr else plain_name(n)
    if name in ("numel", "nelement", "sym_numel"):
        return any(sizes)
    if name not in ("shape", "size", "sym_size"):
        return False
    dim = None if n.target is getattr else argument(n, 1, "dim")
    return sizes if dim is None else sizes[dim] if isinstance(dim, int) else any(sizes)


def given_by(arg: Any, known: Known) -> bool:
    """Say whether anything in an argument follows the input."""
    found: list[Follows] = []
    map_arg(arg, lambda n: found.append(known[n.name]))
    return _any(found)


def _any(flags: Iterable[Follows]) -> bool:
    return any(any(flag) if isinstance(flag, tuple) else flag for flag in flags)


def dims_by_length(table: Mapping[str, Dims], n: fx.Node, ndim: int, known: Known) -> list[int]:
    """Return those of `ndim` dims that a node cuts (`CUTS`) or makes (`MAKES`) by what follows the input."""
    found = table.get(plain_name(n))
    return [] if found is None else [dim % ndim for dim in found(n, ndim, known) if isinstance(dim, int)]


VIEWS = ("view", "reshape", "_unsafe_view")
"""Plain names of targets that are told all sizes of a result, and give it the elements of their first argument."""


def dims_viewed_apart(n: fx.Node, x: Labelled, out: Labelled, known: Known) -> list[int]:
    """Return the dims of `x` whose channels a view deals out in runs as long as the size of the input says.

    Such a run ends inside the dim, and is a dim of the result that has channels. A single one, where nothing else comes
    among the channels, is what the other sizes leave of them, and as long with every input.
    """
    if plain_name(n) not in VIEWS or 0 in x.shape:
        return []
    given = n.args[1:] or (n.kwargs.get("shape"),)
    made = set(_made(given, len(out.shape), known))
    sizes = given[0] if isinstance(given[0], (tuple, list)) else given
    made |= {d for d, size in enumerate(sizes) if isinstance(size, int) and size == -1}
    apart = [d for d in made if out.labels[d] is not None]
    free, left = (math.prod(size for size, ids in zip(t.shape, t.labels, strict=True) if ids is None) for t in (x, out))
    if free <= left and len(apart) < 2:
        return []
    ends = [*accumulate(reversed(out.shape), operator.mul)][::-1]
    runs = [ends[d] for d in apart]
    inner = [math.prod(x.shape[d + 1 :]) for d in range(len(x.shape))]
    return [
        d
        for d, ids in enumerate(x.labels)
        if ids is not None and any(inner[d] < run < inner[d] * x.shape[d] for run in runs)
    ]


def indexed(index: Any, ndim: int) -> Iterator[tuple[int | None, Any]]:
    """Yield the items of `x[index]`, each with the dim of `x` that it indexes; `None` and `...` index none."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim = 0
    for item in items:
        if item is None or item is Ellipsis:
            yield None, item
            dim += 0 if item is None else ndim - used
        else:
            yield dim, item
            dim += 1


def _cuts(*names: str) -> Callable[[Dims], Dims]:
    """Give targets the dims that they cut."""
    return registering(CUTS, names, "lists of dims to cut")


def _makes(*names: str) -> Callable[[Dims], Dims]:
    """Give targets the dims that they make."""
    return registering(MAKES, names, "lists of dims to make")


@_cuts("getitem", "setitem")
def _index(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`x[..]`."""
    return (dim for dim, item in indexed(n.args[1], ndim) if dim is not None and given_by(item, known))


@_cuts("index")
def _indices(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`aten.index(x, [None, positions])`."""
    items = argument(n, 1, "indices")
    return (dim for dim, item in enumerate(items if isinstance(items, (tuple, list)) else ()) if given_by(item, known))


@_cuts("narrow", "slice", "select", "index_select")
def _after_dim(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`x.narrow(dim, start, length)`."""
    if given_by((n.args[2:], n.kwargs), known):
        yield argument(n, 1, "dim", default=0)


@_cuts("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split")
def _before_dim(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`x.split(sizes, dim)`."""
    if given_by((n.args[1:2], n.kwargs), known):
        yield argument(n, 2, "dim", default=0)


@_cuts("roll")
def _shifts(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`x.roll(shifts, dims)`."""
    dims = argument(n, 2, "dims", "dim", default=())
    if given_by(argument(n, 1, "shifts"), known):
        yield from [dims] if isinstance(dims, int) else dims


@_cuts("pad", "constant_pad_nd")
@_makes("pad", "constant_pad_nd")
def _padded(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`F.pad(x, pad)`: two numbers for each dim, from the last one on."""
    pad: Any = argument(n, 1, "pad")
    if not isinstance(pad, (tuple, list)):
        return (dim for dim in range(ndim) if given_by(pad, known))
    return (ndim - 1 - i // 2 for i, amount in enumerate(pad) if given_by(amount, known))


@_makes("zeros", "ones", "empty", "rand", "randn", "full")
def _sizes(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`torch.zeros(*sizes)`."""
    return _made(n.args or (n.kwargs.get("size"),), ndim, known)


@_makes("expand", "repeat", "tile", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full")
def _sizes_after_tensor(n: fx.Node, ndim: int, known: Known) -> Iterator[int]:
    """`x.expand(*sizes)`."""
    return _made(n.args[1:] or (n.kwargs.get("size"),), ndim, known)


def _made(given: Any, ndim: int, known: Known) -> Iterator[int]:
    """Yield the dims whose sizes follow the input; they are given one by one, or first in one sequence."""
    sequence = known[given[0].name] if isinstance(given[0], fx.Node) else given[0]
    sizes = sequence if isinstance(sequence, (tuple, list)) else given
    return (dim for dim, size in enumerate(sizes, ndim - len(sizes)) if size is True or given_by(size, known))
