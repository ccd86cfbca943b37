"""Positions written into a graph: slices, indices, pads and rolls along a labelled dim.

They are always re-derived from the positions that stay, never only where a shape differs: a wrong slice can have the
right size.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxprune.lengths import indexed
from fxprune.literals import CannotRewriteError, Context, argument, as_before, fixes, set_argument


def renumbered(kept: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return where those of some dense positions that stay are now, for a dim with `kept` (rows, size).

    Raises:
        CannotRewriteError: rows keep different positions, and the answer depends on the row.
    """
    answers = {tuple((np.cumsum(row) - 1)[positions][row[positions]].tolist()) for row in kept}
    if len(answers) != 1:
        raise CannotRewriteError("rows keep different positions, and this index would differ from row to row")
    return np.array(answers.pop(), dtype=np.int64)


def as_index(positions: np.ndarray) -> Any:
    """Return positions as a slice where they are a run or evenly spaced, else as a list."""
    if len(positions) == 0:
        return slice(0, 0)
    steps = np.diff(positions)
    if len(positions) == 1 or ((steps > 0).all() and (steps == steps[0]).all()):
        step = int(steps[0]) if len(steps) else 1
        return slice(int(positions[0]), int(positions[-1]) + 1, step if step > 1 else None)
    return positions.tolist()


@fixes("getitem", "setitem")
def getitem(ctx: Context, node: fx.Node) -> None:
    """`x[..]`: integers, slices and constant positions along labelled dims are renumbered."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not isinstance(ctx.value(x), torch.Tensor):
        return
    items = indexed(node.args[1], len(ctx.dense_shape(x)))
    result = tuple(item if dim is None else _new_item(ctx, node, dim, item) for dim, item in items)
    node.update_arg(1, result if isinstance(node.args[1], tuple) else result[0])


def _new_item(ctx: Context, node: fx.Node, dim: int, item: Any) -> Any:
    kept = ctx.kept(node.args[0], dim)
    if kept is None or kept.all():
        return map_aggregate(item, lambda number: as_before(ctx, node, number))
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
    return (
        as_index(renumbered(kept, positions % size))
        if len(positions) > 1
        else renumbered(kept, positions % size).tolist()
    )


@fixes("narrow")
def narrow(ctx: Context, node: fx.Node) -> None:
    """`x.narrow(dim, start, length)`."""
    x, dim = node.args[0], ctx.value(argument(node, 1, "dim"))
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    kept = ctx.kept(x, dim)
    if kept is None or kept.all():
        start, length = as_before(ctx, node, start), as_before(ctx, node, length)
    else:
        start, length = _before(kept, ctx.dense(start)), ctx.shapes(node)[0][dim]
    set_argument(node, 2, start, "start")
    set_argument(node, 3, length, "length")


def _before(kept: np.ndarray, position: int) -> int:
    """Return how many positions before `position` stay; all rows must agree."""
    counts = np.unique(kept[:, :position].sum(axis=1))
    if len(counts) != 1:
        raise CannotRewriteError("rows keep different numbers of positions before a bound")
    return int(counts[0])


@fixes("select")
def select(ctx: Context, node: fx.Node) -> None:
    """`x.select(dim, index)`."""
    dim, index = ctx.value(argument(node, 1, "dim")), argument(node, 2, "index")
    set_argument(node, 2, _new_item(ctx, node, dim, index), "index")


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
    node.args, node.kwargs = (x, (*[slice(None)] * dim, _new_item(ctx, node, dim, item))), {}


@fixes("roll")
def roll(ctx: Context, node: fx.Node) -> None:
    """`x.roll(shifts, dims)`: as many positions come round as stay among those that did."""
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims", "dim", default=())
    shifts, dims = ([v] if isinstance(v, (int, fx.Node)) else list(v) for v in (shifts, dims))
    fresh = [_kept_shift(ctx, node, shift, dim) for shift, dim in zip(shifts, dims, strict=False)]
    if fresh:
        set_argument(node, 1, fresh, "shifts")
        set_argument(node, 2, dims, "dims")


def _kept_shift(ctx: Context, node: fx.Node, shift: Any, dim: Any) -> Any:
    kept = ctx.kept(node.args[0], dim)
    if kept is None or kept.all():
        return as_before(ctx, node, shift)
    size = kept.shape[1]
    return int(kept.sum(axis=1)[0]) - _before(kept, size - ctx.dense(shift) % size)


@fixes("pad", "constant_pad_nd")
def pad(ctx: Context, node: fx.Node) -> None:
    """`F.pad(x, pad)`: along a labelled dim, the padding that stays."""
    x, given = node.args[0], list(argument(node, 1, "pad"))
    ndim = len(ctx.dense_shape(x))
    for i in range(len(given) // 2):
        dim = ndim - 1 - i
        whole = ctx.stays(node, dim) and ctx.stays(x, dim)
        for side in (0, 1):
            amount = given[2 * i + side]
            given[2 * i + side] = as_before(ctx, node, amount) if whole else _kept_padding(ctx, node, dim, amount, side)
    set_argument(node, 1, given, "pad")


def _kept_padding(ctx: Context, node: fx.Node, dim: int, given: Any, side: int) -> int:
    amount = ctx.dense(given)
    kept = ctx.kept(node if amount > 0 else node.args[0], dim)
    if kept is None or not amount:
        return amount
    size, n = kept.shape[1], abs(amount)
    count = _before(kept, n) if side == 0 else int(kept.sum(axis=1)[0]) - _before(kept, size - n)
    return count if amount > 0 else -count
