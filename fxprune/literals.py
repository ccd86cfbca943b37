"""Sizes written into a graph: re-derived from the predicted shapes and from the positions that stay.

One fixer per fx target, by its plain name: `x.view`, `torch.Tensor.view` and `aten.view` are one. Sizes of views and
the like change only where what they evaluate to differs from the prediction, so that batch and spatial sizes stay
dynamic. Slices, pads and indices are in `positions`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxprune.labels import Shape
from fxprune.registering import registering


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

    def follows(self, arg: Any) -> bool:
        """Say whether a number follows the size of the input: whether a dim without labels has a part in it."""
        ...

    def insert(self, at: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a node in front of another, and return it."""
        ...

    def shapes(self, node: fx.Node) -> list[Shape]:
        """Return the predicted shapes of what a node returns."""
        ...

    def dense_shape(self, node: Any) -> Shape:
        """Return the dense shape of the tensor that a node returns."""
        ...

    def kept(self, node: Any, dim: int) -> np.ndarray | None:
        """Return (rows, size) bool: what stays along a dim, in every row that stays; None where it is unlabelled."""
        ...

    def stays(self, node: Any, dim: int) -> bool:
        """Say whether nothing goes along a dim, labelled or not."""
        ...

    def rows(self, node: Any, dim: int, count: int) -> int:
        """Return how many of `count` equal rows of a dim stay."""
        ...


Fixer = Callable[[Context, fx.Node], None]
FIXERS: dict[str, Fixer] = {}


def fixes(*names: str) -> Callable[[Fixer], Fixer]:
    """Register a fixer for targets of these plain names."""
    return registering(FIXERS, names, "fixers")


def plain_name(node: fx.Node) -> str:
    """Return the name of a target without module, overload or dunder."""
    target = node.target
    if isinstance(target, str):
        return target[2:-2] if target.startswith("__") and target.endswith("__") else target
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


def _new_sizes(ctx: Context, node: fx.Node, given: Sequence[Any], predicted: Shape) -> list[Any]:
    """Return sizes with those replaced that do not evaluate to the prediction."""
    if len(given) != len(predicted):
        raise CannotRewriteError(f"{len(given)} sizes are given for {len(predicted)} dims")
    return [g if ctx.value(g) == -1 else scaled(ctx, node, g, p) for g, p in zip(given, predicted, strict=True)]


def scaled(ctx: Context, node: fx.Node, size: Any, predicted: int) -> Any:
    """Return a size that is as predicted: `batch * heads` stays a multiple of the batch."""
    value = ctx.value(size)
    if value == predicted:
        return size
    if not value or not ctx.follows(size):
        return predicted
    shared = math.gcd(value, predicted)
    if predicted != shared:
        size = ctx.insert(node, operator.mul, size, predicted // shared)
    return size if value == shared else ctx.insert(node, operator.floordiv, size, value // shared)


def as_before(ctx: Context, node: fx.Node, number: Any) -> Any:
    """Return a number as it is in the dense network, as an expression where it follows the input."""
    if not isinstance(number, fx.Node) or isinstance(ctx.value(number), torch.Tensor):
        return number
    dense = ctx.dense(number)
    if ctx.value(number) == dense or dense is None:
        return number
    found = _computed_before(ctx, node, number, dense) if ctx.follows(number) else dense
    return found if ctx.value(found) == dense else dense


def _computed_before(ctx: Context, node: fx.Node, number: fx.Node, dense: Any) -> Any:
    """Compute a number again, of dense sizes where those shrink that it is computed from."""
    if isinstance(dense, tuple):
        pairs = enumerate(zip(ctx.value(number), dense, strict=True))
        return tuple(ctx.insert(node, operator.getitem, number, i) if now == n else n for i, (now, n) in pairs)
    if number.op != "call_function" or number.kwargs:
        return dense
    args = map_aggregate(number.args, lambda a: as_before(ctx, node, a))
    return ctx.insert(node, number.target, *args)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]


def _fix_sizes(ctx: Context, node: fx.Node, first: int, predicted: Shape) -> None:
    """Fix sizes that start at argument `first`, spread out or in one sequence."""
    given = node.args[first:]
    packed = given[0] if given else node.kwargs.get("size", node.kwargs.get("shape"))
    if isinstance(ctx.value(packed), int):
        node.args = (*node.args[:first], *_new_sizes(ctx, node, given, predicted))
    elif isinstance(packed, (tuple, list)):
        set_argument(node, first, _new_sizes(ctx, node, packed, predicted), "size", "shape")
    elif packed is not None and isinstance(ctx.value(packed), (tuple, list)) and tuple(ctx.value(packed)) != predicted:
        items = [ctx.insert(node, operator.getitem, packed, i) for i in range(len(ctx.value(packed)))]
        set_argument(node, first, _new_sizes(ctx, node, items, predicted), "size", "shape")


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
    """`x.repeat(*times)`: times of a dim of size one are its new size; `tile` may leave leading dims out."""
    shape = tuple(ctx.value(node.args[0]).shape)
    predicted = ctx.shapes(node)[0]
    wide = (1,) * (len(predicted) - len(shape)) + shape
    times = [p // max(n, 1) for p, n in zip(predicted, wide, strict=True)]
    given = ctx.value(argument(node, 1, "dims", "repeats"))
    count = len(given) if isinstance(given, (tuple, list)) else len(node.args) - 1
    _fix_sizes(ctx, node, 1, tuple(times[len(times) - count :]))


@fixes("repeat_interleave")
def repeat_interleave(ctx: Context, node: fx.Node) -> None:
    """`x.repeat_interleave(times, dim)`: where copies went one by one, as many times as are left."""
    times, dim = argument(node, 1, "repeats"), ctx.value(argument(node, 2, "dim"))
    if isinstance(ctx.value(times), int) and dim is not None:
        before, after = ctx.value(node.args[0]).shape[dim], ctx.shapes(node)[0][dim]
        if ctx.value(times) * before != after:
            set_argument(node, 1, scaled(ctx, node, times, after // max(before, 1)), "repeats")


@fixes("unflatten")
def unflatten(ctx: Context, node: fx.Node) -> None:
    """`x.unflatten(dim, sizes)`."""
    sizes = argument(node, 2, "sizes", "unflattened_size")
    predicted = ctx.shapes(node)[0]
    at = ctx.value(argument(node, 1, "dim")) % (len(predicted) - len(sizes) + 1)
    set_argument(node, 2, _new_sizes(ctx, node, sizes, predicted[at : at + len(sizes)]), "sizes")


@fixes("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(ctx: Context, node: fx.Node) -> None:
    """Any split along a labelled dim becomes a split with sizes."""
    x = node.args[0]
    dim = ctx.value(argument(node, 2, "dim", default=0))
    if ctx.stays(x, dim):
        names = "split_size_or_sections", "split_size", "split_sizes", "chunks", "indices_or_sections", "indices"
        given = argument(node, 1, *names)
        set_argument(node, 1, map_aggregate(given, lambda size: as_before(ctx, node, size)), *names)
        return
    sizes = [shape[dim] for shape in ctx.shapes(node)]
    if node.op == "call_method":
        node.target = "split"
    else:
        node.target = torch.split
    node.args, node.kwargs = (x, sizes, dim), {}


@fixes("group_norm", "native_group_norm")
def group_norm(ctx: Context, node: fx.Node) -> None:
    """`F.group_norm(x, num_groups, ...)`."""
    groups = argument(node, 1, "num_groups")
    set_argument(node, 1, scaled(ctx, node, groups, ctx.rows(node.args[0], 1, ctx.dense(groups))), "num_groups")


@fixes("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(ctx: Context, node: fx.Node) -> None:
    """`F.channel_shuffle(x, groups)`."""
    groups = argument(node, 1, "groups")
    set_argument(node, 1, scaled(ctx, node, groups, ctx.rows(node.args[0], 1, ctx.dense(groups))), "groups")


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
    weight = ctx.value(argument(node, 1, "weight"))
    _set_groups(ctx, node, ctx.value(node.args[0]).shape[1 - weight.ndim] // weight.shape[1])


@fixes("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(ctx: Context, node: fx.Node) -> None:
    """`F.conv_transpose2d(x, weight, ..., groups)`."""
    weight = ctx.value(argument(node, 1, "weight"))
    _set_groups(ctx, node, ctx.shapes(node)[0][1 - weight.ndim] // weight.shape[1])


def _set_groups(ctx: Context, node: fx.Node, predicted: int) -> None:
    groups = argument(node, 6, "groups", default=1)
    if ctx.value(groups) != predicted:
        set_argument(node, 6, scaled(ctx, node, groups, predicted), "groups")


@fixes("scaled_dot_product_attention")
def attention(ctx: Context, node: fx.Node) -> None:
    """`F.scaled_dot_product_attention(q, k, v, ..)`: the scale stays that of the dense head size."""
    if argument(node, 6, "scale") is None:
        node.update_kwarg("scale", float(ctx.dense_shape(node.args[0])[-1]) ** -0.5)
