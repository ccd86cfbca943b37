"""Positions that depend on data: nothing may go along the dim they are positions of, all other dims pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


def _side_by_side(op: Op, tensors: Iterable[torch.Tensor], dim: int, reason: str) -> Labels:
    """Tie tensors of the same rank dim by dim, but for `dim`, along which nothing may go, and for dims cut short."""
    parts = list(tensors)
    sizes = [min(t.shape[d] for t in parts) for d in range(parts[0].ndim)]
    cut = [d for d, n in enumerate(sizes) if d != dim and any(t.shape[d] != n for t in parts)]
    labels = [op.mix(op.fix(op.labels(t), [dim, *cut], reason), [dim]) for t in parts]
    shape = tuple(1 if d == dim else n for d, n in enumerate(sizes))
    result = labels[0]
    for other in labels[1:]:
        result, _ = algebra.broadcast(op.ledger, result, shape, other, shape)
    return result


@rule(aten.gather)
def gather(op: Op, x: torch.Tensor, dim: int, index: torch.Tensor, **kwargs: Any) -> Labels:
    """x: (.., n, ..), index: (.., k, ..) -> (.., k, ..); the other dims of both are tied."""
    dim = dim % x.ndim if x.ndim else 0
    return _side_by_side(op, [x, index], dim, "is indexed by data") if x.ndim else ()


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(op: Op, x: torch.Tensor, dim: int, index: torch.Tensor, source: Any, *args: Any, **kwargs: Any) -> Labels:
    """x: (.., n, ..), index and source: (.., k, ..), written to x at the positions named by index."""
    parts = [t for t in (x, index, source) if isinstance(t, torch.Tensor)]
    _side_by_side(op, parts, dim % x.ndim, "is written to at positions that depend on data")
    return op.labels(x)


@rule(aten.index_add, aten.index_copy)
def index_add(op: Op, x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> Labels:
    """x: (.., n, ..), index: (k,), source: (.., k, ..), added to x (or written over it) at the positions in index."""
    _side_by_side(op, [x, source], dim % x.ndim, "is written to at positions that depend on data")
    return op.labels(x)


@rule(aten.index_fill)
def index_fill(op: Op, x: torch.Tensor, dim: int, index: torch.Tensor, value: Any) -> Labels:
    """x: (.., n, ..), index: (k,), a value written to x at the positions in index."""
    _side_by_side(op, [x], dim % x.ndim, "is written to at positions that depend on data")
    return op.labels(x)


@rule(aten.index_put)
def index_put(
    op: Op, x: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, *args: Any
) -> Labels:
    """x: any shape, values written to it at positions, or where masks say so; its other dims are tied to values."""
    used: list[int] = []
    d = rank = 0
    for index in indices:
        if index is None:
            d += 1
            continue
        is_mask = index.dtype in (torch.bool, torch.uint8)
        op.fix(op.labels(index), range(index.ndim), "is an index")
        used += range(d, d + (index.ndim if is_mask else 1))
        d = used[-1] + 1
        rank = max(rank, 1 if is_mask else index.ndim)
    labels = op.mix(op.fix(op.labels(x), used, "is written to at positions that depend on data"), used)
    if used != list(range(used[0], used[-1] + 1)):
        op.freeze(x, values)
        return op.labels(x)
    first, last = used[0], used[-1]
    rest = algebra.drop(tuple(None if d in used else ids for d, ids in enumerate(labels)), used)
    for _ in range(rank):
        rest = algebra.insert(rest, first)
    shape = (*x.shape[:first], *[1] * rank, *x.shape[last + 1 :])
    behind = len(shape) - values.ndim
    written = op.fix(
        op.labels(values), range(max(first - behind, 0), max(first + rank - behind, 0)), "is written by data"
    )
    algebra.broadcast(op.ledger, rest, shape, written, tuple(values.shape))
    return op.labels(x)


@rule(aten.topk)
def topk(op: Op, x: torch.Tensor, k: int, dim: int = -1, *args: Any) -> list[Labels]:
    """x: (.., n, ..) -> the k largest along one dim, and their positions."""
    return [_side_by_side(op, [x], dim % x.ndim, "is ordered by its values")] * 2


@rule(aten.sort)
def sort(op: Op, x: torch.Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> list[Labels]:
    """x: (.., n, ..), ordered along one dim, and the positions its values came from."""
    return [_side_by_side(op, [x], kwargs.get("dim", dim) % x.ndim, "is ordered by its values")] * 2


@rule(aten.argsort)
def argsort(op: Op, x: torch.Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Labels:
    """x: (.., n, ..) -> the positions of its values in order along one dim."""
    return _side_by_side(op, [x], kwargs.get("dim", dim) % x.ndim, "is ordered by its values")


@rule(aten.tril, aten.triu)
def triangle(op: Op, x: torch.Tensor, diagonal: int = 0) -> Labels:
    """x: (.., n, m); what is kept depends on the position in the last two dims."""
    return op.fix(op.labels(x), [x.ndim - 2, x.ndim - 1])
