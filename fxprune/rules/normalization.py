"""Statistics: normalisation, softmax and reductions. Over a labelled dim they are taken over the kept channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


def dims_of(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Return the dims a reduction names, counted from zero; all of them where it names none."""
    if dim is None or (not isinstance(dim, int) and not dim):
        return list(range(ndim))
    return [d % ndim for d in ([dim] if isinstance(dim, int) else dim)] if ndim else []


@rule(aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm, aten._batch_norm_with_update)
def batch_norm(
    op: Op, x: torch.Tensor, weight: Any, bias: Any, mean: Any = None, var: Any = None, *args: Any
) -> list[Labels]:
    """x: (b, c, *space); weight, bias, mean, var: (c,). Per channel; in training, statistics over all other dims."""
    params = [p for p in (weight, bias, mean, var) if isinstance(p, torch.Tensor)]
    training = bool(args) and args[0] is True
    labels = op.mix(op.labels(x), [d for d in range(x.ndim) if d != 1]) if training else op.labels(x)
    labels = op.per_channel(labels, x.shape, params, at=[1])
    return [labels, *[algebra.blank(extra.ndim) for extra in op.out[1:]]]


@rule(aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update)
def batch_norm_eval(op: Op, x: torch.Tensor, *args: Any) -> list[Labels]:
    """x: (b, c, *space); weight, bias, mean, var: (c,). Per channel, with running statistics."""
    return batch_norm(op, x, *args)


@rule(aten.native_layer_norm)
def layer_norm(op: Op, x: torch.Tensor, normalized: Sequence[int], weight: Any, bias: Any, eps: float) -> list[Labels]:
    """x: (.., *normalized); weight, bias: (*normalized,)."""
    at = range(x.ndim - len(normalized), x.ndim)
    labels = op.mix(op.labels(x), at)
    labels = op.per_channel(labels, x.shape, [weight, bias], at=list(at))
    return [labels, *[algebra.blank(extra.ndim) for extra in op.out[1:]]]


@rule(aten.native_group_norm)
def group_norm(
    op: Op, x: torch.Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[Labels]:
    """x: (n, c, *space); weight, bias: (c,). Statistics over space and each of `groups` rows of channels."""
    labels = op.mix(op.labels(x), range(2, x.ndim))
    cut = (n, groups, c // groups, *x.shape[2:])
    rows = op.mix(op.reshape(labels, tuple(x.shape), cut), range(2, x.ndim + 1))
    labels = op.per_channel(op.reshape(rows, cut, tuple(x.shape)), x.shape, [weight, bias], at=[1])
    return [labels, *[algebra.blank(extra.ndim) for extra in op.out[1:]]]


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax, aten.softmax, aten.log_softmax)
def softmax(op: Op, x: torch.Tensor, dim: int, *args: Any, **kwargs: Any) -> Labels:
    """x: (.., n, ..), normalised along one dim."""
    return op.mix(op.labels(x), [dim % x.ndim])


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.prod, aten.any, aten.all, aten.logsumexp, aten.var, aten.std,
    aten.count_nonzero,
)  # fmt: skip
def reduction(op: Op, x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape; some or all dims disappear."""
    dims = dims_of(dim if not isinstance(dim, bool) else None, x.ndim)
    return op.reduce(op.labels(x), dims, keepdim=op.out.ndim == x.ndim)


@rule(aten.linalg_vector_norm, aten.norm)
def vector_norm(op: Op, x: torch.Tensor, order: float = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape; the norm over some or all dims."""
    return op.reduce(op.labels(x), dims_of(dim, x.ndim), keepdim=op.out.ndim == x.ndim)


@rule(aten._weight_norm_interface)
def weight_norm(op: Op, v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> list[Labels]:
    """v: a weight, g: of size one but along `dim`: g * v / |v|, the norm over all other dims; and that norm."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    directions = op.mix(op.labels(v), others)
    labels, _ = algebra.broadcast(op.ledger, directions, tuple(v.shape), op.labels(g), tuple(g.shape))
    return [labels, op.reduce(labels, others, keepdim=True)]


@rule(aten.var_mean, aten.std_mean)
def var_mean(op: Op, x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> list[Labels]:
    """x: any shape; both statistics over some or all dims."""
    labels = op.reduce(op.labels(x), dims_of(dim, x.ndim), keepdim=op.out[0].ndim == x.ndim)
    return [labels, labels]


@rule(aten.argmax, aten.argmin)
def argmax(op: Op, x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Labels:
    """x: any shape. The position is the result, so no position may go."""
    dims = dims_of(dim, x.ndim)
    return op.reduce(op.fix(op.labels(x), dims), dims, keepdim=op.out.ndim == x.ndim)


@rule(aten.max, aten.min)
def max_(op: Op, x: torch.Tensor, other: Any = None, *args: Any, **kwargs: Any) -> Any:
    """x: any shape. Of two tensors: pointwise; of all: a scalar; along a dim: with positions, which may be read."""
    if isinstance(other, torch.Tensor):
        return op.broadcast(x, other)
    dims = dims_of(other, x.ndim)
    if other is None:
        return op.reduce(op.labels(x), dims)
    alone = f"runs along a dim whose positions are read; `a{op.func.overloadpacket.__name__}` finds the values alone"
    op.fix_if_read(op.out[1], op.labels(x), dims, alone)
    labels = op.reduce(op.labels(x), dims, keepdim=op.out[0].ndim == x.ndim)
    return [labels, labels]


@rule(aten.median)
def median(op: Op, x: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """x: any shape. Of all: a scalar; along a dim: with positions, so none may go."""
    dims = dims_of(dim, x.ndim)
    if dim is None:
        return op.reduce(op.labels(x), dims)
    labels = op.reduce(op.fix(op.labels(x), dims), dims, keepdim=op.out[0].ndim == x.ndim)
    return [labels, labels]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp)
def cumulative(op: Op, x: torch.Tensor, dim: int, **kwargs: Any) -> Labels:
    """x: (.., n, ..); each position holds all before it, so none may go."""
    labels = op.fix(op.labels(x), [dim % x.ndim])
    return op.mix(labels, [dim % x.ndim])
