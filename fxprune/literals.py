"""Sizes written into a graph: re-derived from the predicted shapes and from the positions that stay.

One fixer per fx target, by its plain name: `x.view`, `torch.Tensor.view` and `aten.view` are one. Slices, splits,
pads and indices along a labelled dim are always re-derived, since a wrong slice can have the right size. Sizes of
views and the like change only where what they evaluate to differs from the prediction, so that batch and spatial
sizes stay dynamic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from fxprune.labels import Shape


class CannotRewriteError(Exception):
    """A literal that cannot be expressed for the slim network."""


class Context(Protocol):
    """What a fixer knows about the node it fixes."""

    def value(self, arg: Any) -> Any:
        """Return what an argument evaluates to in the slim network (tensors on the meta device)."""
        ...

    def dense(self, arg: Any) -> Any:
        """Return what a number or a constant integer tensor was in the dense network."""
        ...

    def shapes(self, node: fx.Node) -> list[Shape]:
        """Return the predicted shapes of what a node returns."""
        ...

    def dense_shape(self, node: fx.Node) -> Shape:
        """Return the dense shape of the tensor that a node returns."""
        ...

    def kept(self, node: fx.Node, dim: int) -> np.ndarray | None:
        """Return which positions of a dim stay, (rows, size) bool, one row for each that stays; None where all stay by rule."""
        ...

    def rows(self, node: fx.Node, dim: int, count: int) -> int:
        """Return how many of `count` equal rows of a dim stay."""
        ...


Fixer = Callable[[Context, fx.Node], None]
FIXERS: dict[str, Fixer] = {}


def fixes(*names: str) -> Callable[[Fixer], Fixer]:
    """Register a fixer for targets of these plain names."""

    def register(function: Fixer) -> Fixer:
        for name in names:
            if name in FIXERS:
                raise ValueError(f"{name} has two fixers")
            FIXERS[name] = function
        return function

    return register


def plain_name(node: fx.Node) -> str:
    """Return the name of a target without module, overload or dunder."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def argument(node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
    """Return an argument by position or by any of its names."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def set_argument(node: fx.Node, index: int, value: Any, *names: str) -> None:
    """Replace an argument by position or by any of its names; add it under the first name where it was left out."""
    if len(node.args) > index:
        node.update_arg(index, value)
    else:
        node.update_kwarg(next((name for name in names if name in node.kwargs), names[0]), value)


def _new_sizes(ctx: Context, given: Sequence[Any], predicted: Shape) -> list[Any]:
    """Return sizes with those replaced that do not evaluate to the prediction."""
    if len(given) != len(predicted):
        raise CannotRewriteError(f"{len(given)} sizes are given for {len(predicted)} dims")
    return [g if ctx.value(g) in (-1, p) else p for g, p in zip(given, predicted, strict=True)]


def _fix_sizes(ctx: Context, node: fx.Node, first: int, predicted: Shape) -> None:
    """Fix sizes that start at argument `first`, spread out or in one sequence."""
    given = node.args[first:]
    packed = given[0] if len(given) == 1 else node.kwargs.get("size", node.kwargs.get("shape"))
    if len(given) > 1 or (len(given) == 1 and isinstance(ctx.value(packed), int)):
        node.args = (*node.args[:first], *_new_sizes(ctx, given, predicted))
    elif isinstance(packed, (tuple, list)):
        set_argument(node, first, _new_sizes(ctx, packed, predicted), "size", "shape")
    elif packed is not None and isinstance(ctx.value(packed), (tuple, list)) and tuple(ctx.value(packed)) != predicted:
        set_argument(node, first, list(predicted), "size", "shape")


@fixes("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_empty", "new_full", "broadcast_to")
def sizes_after_tensor(ctx: Context, node: fx.Node) -> None:
    """`x.view(*sizes)`, `torch.reshape(x, sizes)`."""
    if not any(isinstance(a, torch.dtype) for a in node.args):
        _fix_sizes(ctx, node, 1, ctx.shapes(node)[0])


@fixes("zeros", "ones", "empty", "rand", "randn", "full")
def sizes_alone(ctx: Context, node: fx.Node) -> None:
    """`torch.zeros(*sizes)`, `torch.full(sizes, value)`."""
    _fix_sizes(ctx, node, 0, ctx.shapes(node)[0])


@fixes("repeat", "tile")
def repeat(ctx: Context, node: fx.Node) -> None:
    """`x.repeat(*times)`: times of a dim of size one are its new size."""
    shape = tuple(ctx.value(node.args[0]).shape)
    predicted = ctx.shapes(node)[0]
    wide = (1,) * (len(predicted) - len(shape)) + shape
    _fix_sizes(ctx, node, 1, tuple(p // max(n, 1) for p, n in zip(predicted, wide, strict=True)))


@fixes("unflatten")
def unflatten(ctx: Context, node: fx.Node) -> None:
    """`x.unflatten(dim, sizes)`."""
    sizes = argument(node, 2, "sizes", "unflattened_size")
    predicted = ctx.shapes(node)[0]
    at = ctx.value(argument(node, 1, "dim")) % (len(predicted) - len(sizes) + 1)
    set_argument(node, 2, _new_sizes(ctx, sizes, predicted[at : at + len(sizes)]), "sizes")


@fixes("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(ctx: Context, node: fx.Node) -> None:
    """Any split along a labelled dim becomes a split with sizes."""
    x = node.args[0]
    dim = ctx.value(argument(node, 2, "dim", default=0))
    if ctx.kept(x, dim) is None:
        return
    sizes = [shape[dim] for shape in ctx.shapes(node)]
    if node.op == "call_method":
        node.target = "split"
    else:
        node.target = torch.split
    node.args, node.kwargs = (x, sizes, dim), {}


def renumbered(kept: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return where those of some dense positions that stay are now, for a dim with `kept` (rows, size).

    Raises:
        CannotRewriteError: rows keep different positions, and the answer depends on the row.
    """
    answers = {tuple((np.cumsum(row) - 1)[positions][row[positions]].tolist()) for row in kept}
    if len(answers) != 1:
        raise CannotRewriteError("rows keep different positions, and this index would differ from row to row")
    return np.array(answers.pop(), dtype=np.int64)


def as_index(positions: np.ndarray, like: Any = None) -> Any:
    """Return positions as a slice where they are a run or evenly spaced, else as a list."""
    if len(positions) == 0:
        return slice(0, 0)
    steps = np.diff(positions)
    if len(positions) == 1 or (steps > 0).all() and (steps == steps[0]).all():
        step = int(steps[0]) if len(steps) else 1
        return slice(int(positions[0]), int(positions[-1]) + 1, step if step > 1 else None)
    return positions.tolist()


@fixes("getitem", "setitem")
def getitem(ctx: Context, node: fx.Node) -> None:
    """`x[..]`: integers, slices and constant positions along labelled dims are renumbered."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not isinstance(ctx.value(x), torch.Tensor):
        return
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    ndim = len(ctx.dense_shape(x))
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    result, dim = [], 0
    for item in items:
        if item is None:
            result.append(item)
        elif item is Ellipsis:
            result.append(item)
            dim += ndim - used
        else:
            result.append(_new_item(ctx, x, dim, item))
            dim += 1
    node.update_arg(1, tuple(result) if isinstance(node.args[1], tuple) else result[0])


def _new_item(ctx: Context, x: fx.Node, dim: int, item: Any) -> Any:
    kept = ctx.kept(x, dim)
    if kept is None:
        return item
    size = kept.shape[1]
    if isinstance(item, slice):
        bounds = slice(*(ctx.dense(b) for b in (item.start, item.stop, item.step)))
        if bounds in (slice(None), slice(None, None, 1)):
            return item
        return as_index(renumbered(kept, np.arange(size)[bounds]))
    value = ctx.dense(item)
    if isinstance(value, int):
        return int(renumbered(kept, np.array([value % size]))[0])
    if value is None:
        return item
    positions = np.asarray(value)
    if positions.dtype == bool or positions.ndim != 1:
        raise CannotRewriteError("an index along a dim that shrinks is not a list of positions")
    return as_index(renumbered(kept, positions % size)) if len(positions) > 1 else renumbered(kept, positions % size).tolist()


@fixes("narrow")
def narrow(ctx: Context, node: fx.Node) -> None:
    """`x.narrow(dim, start, length)`."""
    x, dim = node.args[0], ctx.value(argument(node, 1, "dim"))
    kept = ctx.kept(x, dim)
    if kept is not None:
        start = ctx.dense(argument(node, 2, "start"))
        set_argument(node, 2, int(_before(kept, start)), "start")
        set_argument(node, 3, ctx.shapes(node)[0][dim], "length")


def _before(kept: np.ndarray, position: int) -> int:
    """Return how many positions before `position` stay; all rows must agree."""
    counts = np.unique(kept[:, :position].sum(axis=1))
    if len(counts) != 1:
        raise CannotRewriteError("rows keep different numbers of positions before a bound")
    return int(counts[0])


@fixes("select")
def select(ctx: Context, node: fx.Node) -> None:
    """`x.select(dim, index)`."""
    kept = ctx.kept(node.args[0], ctx.value(argument(node, 1, "dim")))
    if kept is not None:
        index = ctx.dense(argument(node, 2, "index")) % kept.shape[1]
        set_argument(node, 2, int(renumbered(kept, np.array([index]))[0]), "index")


@fixes("slice")
def slice_(ctx: Context, node: fx.Node) -> None:
    """`aten.slice(x, dim, start, end, step)` becomes `x[..]`."""
    dim = argument(node, 1, "dim", default=0)
    _as_getitem(ctx, node, dim, slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step")))


@fixes("index_select")
def index_select(ctx: Context, node: fx.Node) -> None:
    """`x.index_select(dim, positions)` becomes `x[..]`."""
    _as_getitem(ctx, node, ctx.value(argument(node, 1, "dim")), argument(node, 2, "index"))


@fixes("index")
def index(ctx: Context, node: fx.Node) -> None:
    """`aten.index(x, [None, positions])` becomes `x[..]`."""
    items = argument(node, 1, "indices")
    used = [d for d, i in enumerate(items) if i is not None]
    if len(used) == 1:
        _as_getitem(ctx, node, used[0], items[used[0]])


def _as_getitem(ctx: Context, node: fx.Node, dim: int, item: Any) -> None:
    x = node.args[0]
    dim %= len(ctx.dense_shape(x))
    if ctx.kept(x, dim) is None:
        return
    node.op, node.target = "call_function", operator.getitem
    node.args, node.kwargs = (x, (*[slice(None)] * dim, _new_item(ctx, x, dim, item))), {}


@fixes("roll")
def roll(ctx: Context, node: fx.Node) -> None:
    """`x.roll(shifts, dims)`: as many positions come round as stay among those that did."""
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims", "dim", default=())
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    fresh = []
    for shift, dim in zip(shifts, dims, strict=False):
        kept = ctx.kept(node.args[0], dim)
        size = 0 if kept is None else kept.shape[1]
        fresh.append(shift if kept is None else int(kept.sum(axis=1)[0]) - _before(kept, size - ctx.dense(shift) % size))
    if fresh:
        set_argument(node, 1, fresh, "shifts")
        set_argument(node, 2, dims, "dims")


@fixes("pad", "constant_pad_nd")
def pad(ctx: Context, node: fx.Node) -> None:
    """`F.pad(x, pad)`: along a labelled dim, the padding that stays."""
    x, given = node.args[0], list(argument(node, 1, "pad"))
    ndim = len(ctx.dense_shape(x))
    for i in range(len(given) // 2):
        dim = ndim - 1 - i
        out, source = ctx.kept(node, dim), ctx.kept(x, dim)
        if out is None and source is None:
            continue
        for side in (0, 1):
            amount = ctx.dense(given[2 * i + side])
            if amount:
                given[2 * i + side] = _kept_padding(out, source, amount, side)
    set_argument(node, 1, given, "pad")


def _kept_padding(out: np.ndarray | None, source: np.ndarray | None, amount: int, side: int) -> int:
    kept = out if amount > 0 else source
    if kept is None:
        return amount
    size, n = kept.shape[1], abs(amount)
    count = _before(kept, n) if side == 0 else int(kept.sum(axis=1)[0]) - _before(kept, size - n)
    return count if amount > 0 else -count


@fixes("group_norm", "native_group_norm")
def group_norm(ctx: Context, node: fx.Node) -> None:
    """`F.group_norm(x, num_groups, ...)`."""
    groups = ctx.dense(argument(node, 1, "num_groups"))
    set_argument(node, 1, ctx.rows(node.args[0], 1, groups), "num_groups")


@fixes("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(ctx: Context, node: fx.Node) -> None:
    """`F.channel_shuffle(x, groups)`."""
    set_argument(node, 1, ctx.rows(node.args[0], 1, ctx.dense(argument(node, 1, "groups"))), "groups")


@fixes("layer_norm", "rms_norm")
def layer_norm(ctx: Context, node: fx.Node) -> None:
    """`F.layer_norm(x, normalized_shape, ...)`."""
    given = ctx.value(argument(node, 1, "normalized_shape"))
    shape = ctx.value(node.args[0]).shape[-len(given) :]
    if tuple(given) != tuple(shape):
        set_argument(node, 1, list(shape), "normalized_shape")


@fixes("conv1d", "conv2d", "conv3d")
def convolution(ctx: Context, node: fx.Node) -> None:
    """`F.conv2d(x, weight, ..., groups)`."""
    groups = argument(node, 6, "groups", default=1)
    weight = ctx.value(argument(node, 1, "weight"))
    fresh = ctx.value(node.args[0]).shape[1 - weight.ndim] // weight.shape[1]
    if fresh != groups:
        set_argument(node, 6, fresh, "groups")


@fixes("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(ctx: Context, node: fx.Node) -> None:
    """`F.conv_transpose2d(x, weight, ..., groups)`."""
    groups = argument(node, 6, "groups", default=1)
    weight = ctx.value(argument(node, 1, "weight"))
    fresh = ctx.shapes(node)[0][1 - weight.ndim] // weight.shape[1]
    if fresh != groups:
        set_argument(node, 6, fresh, "groups")


@fixes("scaled_dot_product_attention")
def attention(ctx: Context, node: fx.Node) -> None:
    """`F.scaled_dot_product_attention(q, k, v, ..)`: the scale stays that of the dense head size."""
    if argument(node, 6, "scale") is None:
        node.update_kwarg("scale", float(ctx.dense_shape(node.args[0])[-1]) ** -0.5)
