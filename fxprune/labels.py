"""The channel algebra: what each tensor position is called, and the verbs that every rule is written in.

`Labels` has one entry per dim of a tensor: None where nothing along that dim can go, else an int64 array with the
tensor's number of dims whose size is that of the tensor on the dim it belongs to, and 1 or the tensor's size on the
others. An array that varies over another dim too is *ragged*: head dims differ from head to head, the inputs of a
grouped convolution from group to group. A position of a tensor stays if the labels of all its dims stay there.

Verbs: `fix` (nothing along this dim may go), `align` (the same positions in every row), `broadcast` (tie two
operands), `reduce` (a dim disappears), `concatenate`; `reshape` is in `reshaping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce as fold

import numpy as np

from fxprune.atoms import FIXED, Ledger

Labels = tuple[np.ndarray | None, ...]
Shape = tuple[int, ...]
Extent = tuple[np.ndarray, int]
"""Labels together with the dim they belong to: what the size of that dim is counted from."""


def blank(ndim: int) -> Labels:
    """Return labels of a tensor along whose dims nothing can go."""
    return (None,) * ndim


def along(ids: np.ndarray, dim: int, ndim: int) -> np.ndarray:
    """Place 1-D labels along `dim` of a tensor with `ndim` dims."""
    return ids.reshape([-1 if d == dim else 1 for d in range(ndim)])


def issue(ledger: Ledger, shape: Shape) -> Labels:
    """Return fresh labels for every dim longer than one."""
    return tuple(along(ledger.fresh((n,)), d, len(shape)) if n > 1 else None for d, n in enumerate(shape))


def extents(labels: Labels) -> tuple[Extent, ...]:
    """Return the labelled dims."""
    return tuple((ids, d) for d, ids in enumerate(labels) if ids is not None)


def rag(ids: np.ndarray | None, dim: int) -> frozenset[int]:
    """Return the dims other than `dim` over which the labels of `dim` vary."""
    if ids is None or ids.size == ids.shape[dim]:
        return frozenset()
    return frozenset(d for d, n in enumerate(ids.shape) if d != dim and n > 1)


def fix(ledger: Ledger, labels: Labels, dim: int, reason: str) -> Labels:
    """Say that nothing along `dim` may go; where rows differ, a row goes as a whole or not at all."""
    ids = labels[dim]
    if ids is None:
        return labels
    if rag(ids, dim):
        ledger.tie(ids, ledger.any_along(ids, dim))
    else:
        ledger.freeze(ids, reason)
    return (*labels[:dim], None, *labels[dim + 1 :])


def align(ledger: Ledger, labels: Labels, dim: int, over: Iterable[int]) -> Labels:
    """Let the labels of `dim` no longer vary over the dims `over`: the same columns in every row."""
    ids = labels[dim]
    if ids is None:
        return labels
    for d in sorted(over):
        if d == dim or ids.shape[d] == 1:
            continue
        row = labels[d]
        if row is None:
            column = ids.take([0], axis=d)
            ledger.tie(ids, column)
        else:
            row = _speaking(ledger, row, ids, dim)
            known = _known_columns(ledger, ids, row, d)
            column = (
                ledger.fresh(tuple(1 if e == d else n for e, n in enumerate(ids.shape))) if known is None else known
            )
            ledger.mark(column[ledger.is_constant(ids).any(axis=d, keepdims=True)])
            ledger.tie(ids, ledger.product(row, column))
        ids = column
    return (*labels[:dim], ids, *labels[dim + 1 :])


def _known_columns(ledger: Ledger, ids: np.ndarray, row: np.ndarray, dim: int) -> np.ndarray | None:
    """Return the columns of `ids` when its atoms are crossings of `row` with columns that do not vary over `dim`."""
    parents = ledger.parents(ids)
    if parents is None:
        return None
    for mine, other in (parents, parents[::-1]):
        if (mine == row).all():
            first = other.take([0], axis=dim)
            return first if (other == first).all() else None
    return None


def broadcast(ledger: Ledger, x: Labels, x_shape: Shape, y: Labels, y_shape: Shape) -> tuple[Labels, Shape]:
    """Tie two operands dim by dim, as a pointwise op does. Returns the result's labels and shape."""
    ndim = max(len(x_shape), len(y_shape))
    x, x_shape = _widened(x, x_shape, ndim)
    y, y_shape = _widened(y, y_shape, ndim)
    for d in range(ndim):
        if x_shape[d] == 1 or y_shape[d] == 1:
            continue
        if x[d] is None or y[d] is None:
            x = fix(ledger, x, d, "is combined with a dim whose size cannot change")
            y = fix(ledger, y, d, "is combined with a dim whose size cannot change")
            continue
        x_rag, y_rag = rag(x[d], d), rag(y[d], d)
        x = align(ledger, x, d, x_rag - y_rag)
        y = align(ledger, y, d, y_rag - x_rag)
        a, b = x[d], y[d]
        if a is not None and b is not None:
            ledger.tie(a, b)
            x = (*x[:d], ledger.chosen(a, b, constant=False), *x[d + 1 :])
    shape = tuple(np.broadcast_shapes(x_shape, y_shape))
    return tuple(y[d] if x_shape[d] == 1 else x[d] for d in range(ndim)), shape


def _widened(labels: Labels, shape: Shape, ndim: int) -> tuple[Labels, Shape]:
    extra = ndim - len(shape)
    if not extra:
        return labels, shape
    ones = (1,) * extra
    return (None,) * extra + tuple(
        None if ids is None else ids.reshape(ones + ids.shape) for ids in labels
    ), ones + tuple(shape)


def mix(ledger: Ledger, labels: Labels, dims: Iterable[int]) -> Labels:
    """Say that values are mixed along `dims`: the labels of all other dims may not vary there."""
    dims = set(dims)
    for d in range(len(labels)):
        if d not in dims:
            labels = align(ledger, labels, d, dims)
    return labels


def reduce(ledger: Ledger, labels: Labels, dims: Iterable[int], keepdim: bool = False) -> Labels:
    """Let `dims` disappear (or keep them with size 1), as a sum does."""
    dims = set(dims)
    labels = mix(ledger, labels, dims)
    if keepdim:
        return tuple(None if d in dims else ids for d, ids in enumerate(labels))
    return drop(labels, dims)


def move(labels: Labels, order: Sequence[int]) -> Labels:
    """Permute the dims."""
    return tuple(None if (ids := labels[d]) is None else ids.transpose(order) for d in order)


def insert(labels: Labels, dim: int) -> Labels:
    """Add a dim of size one before `dim`."""
    at = (*[slice(None)] * dim, None)
    moved = tuple([None if ids is None else ids[at] for ids in labels])
    return (*moved[:dim], None, *moved[dim:])


def drop(labels: Labels, dims: Iterable[int]) -> Labels:
    """Remove dims of size one."""
    dims = set(dims)
    return tuple(None if ids is None else ids.squeeze(tuple(dims)) for d, ids in enumerate(labels) if d not in dims)


def pick(ledger: Ledger, labels: Labels, dim: int, positions: np.ndarray) -> Labels:
    """Keep the given positions of `dim`, in the given order."""
    picked = [ids if ids is None or ids.shape[dim] == 1 else ids.take(positions, axis=dim) for ids in labels]
    alone = picked[dim]
    if len(positions) == 1 and alone is not None:
        whole = labels[dim]
        if whole is not None and rag(whole, dim):
            ledger.tie(alone, ledger.any_along(whole, dim))
        else:
            ledger.freeze(alone, "is selected by its position")
        picked[dim] = None
    return settle(ledger, tuple(picked))


def concatenate(ledger: Ledger, parts: Sequence[tuple[Labels, Shape]], dim: int) -> Labels:
    """Join tensors along `dim`; their other dims are tied as in a pointwise op."""
    rows = [list(labels) for labels, _ in parts]
    lengths = [shape[dim] for _, shape in parts]
    result = [None if d == dim else _joined(ledger, rows, d, dim, lengths) for d in range(len(rows[0]))]
    if any(labels[dim] is not None for labels in rows):
        result[dim] = _end_to_end(ledger, rows, dim, dim, lengths)
    return settle(ledger, tuple(result))


def _joined(
    ledger: Ledger, rows: list[list[np.ndarray | None]], d: int, dim: int, lengths: list[int]
) -> np.ndarray | None:
    """Return the labels of `d` after parts were joined along another dim."""
    if all(labels[d] is None for labels in rows):
        return None
    if any(labels[d] is None for labels in rows):
        for labels in rows:
            fix(ledger, tuple(labels), d, "is concatenated with a dim whose size cannot change")
        return None
    if any(dim in rag(labels[d], d) for labels in rows):
        return _end_to_end(ledger, rows, d, dim, lengths)
    columns = _alike(ledger, rows, d, dim)
    result = columns[0]
    for other in columns[1:]:
        ledger.tie(result, other)
        result = ledger.chosen(result, other, constant=True)
    return result


def _end_to_end(
    ledger: Ledger, rows: list[list[np.ndarray | None]], d: int, dim: int, lengths: list[int]
) -> np.ndarray:
    """Lay the labels that the parts have on `d` end to end along `dim`."""
    columns = _alike(ledger, rows, d, dim)
    outer = np.broadcast_shapes(*[tuple(1 if e == dim else n for e, n in enumerate(ids.shape)) for ids in columns])
    wide = [
        np.broadcast_to(ids, [n if e == dim else m for e, m in enumerate(outer)])
        for ids, n in zip(columns, lengths, strict=True)
    ]
    return np.concatenate(wide, axis=dim)


def _alike(ledger: Ledger, rows: list[list[np.ndarray | None]], d: int, dim: int) -> list[np.ndarray]:
    """Return the labels of `d` in every part, aligned so that all vary over the same dims (`dim` apart)."""
    rags = [rag(labels[d], d) - {dim} for labels in rows if labels[d] is not None]
    common = frozenset.intersection(*rags)
    columns = []
    for labels in rows:
        ids = align(ledger, tuple(labels), d, rag(labels[d], d) - {dim} - common)[d]
        columns.append(np.full((1,) * len(labels), FIXED, dtype=np.int64) if ids is None else ids)
    return columns


def settle(ledger: Ledger, labels: Labels) -> Labels:
    """Record, for every ragged dim, that its rows are balanced and which labels say whether a row stays."""
    for d, ids in enumerate(labels):
        rows = rag(ids, d)
        if ids is None or not rows:
            continue
        row = ledger.any_along(ids, d)
        owners = [owner for h in sorted(rows) if (owner := labels[h]) is not None]
        cover = next((o for h in sorted(rows) if (o := labels[h]) is not None and rag(o, h) == rows - {h}), None)
        if cover is None:
            cover = np.array(FIXED)
            for owner in owners:
                cover = ledger.product(cover, owner)
        ledger.tie_row(row, _speaking(ledger, cover, ids, d))
    return labels


def _speaking(ledger: Ledger, cover: np.ndarray, ids: np.ndarray, dim: int) -> np.ndarray:
    """Return, of the crossings `cover`, those factors that speak of the rows of `ids`: that only differ where rows do.

    Heads and tokens that are merged repeat the columns of a head for every token, and a head stays without a token.
    """
    factors = ledger.factors(cover)
    if len(factors) == 1 or cover.shape[dim] > 1:
        return cover
    shape = np.broadcast_shapes(ids.shape, cover.shape)
    rows = np.moveaxis(np.broadcast_to(ids, shape), dim, -1)
    _, first, row = np.unique(rows.reshape(-1, shape[dim]), axis=0, return_index=True, return_inverse=True)
    source = first[row.ravel()]
    places = [1 if d == dim else n for d, n in enumerate(shape)]

    def speaks(factor: np.ndarray) -> bool:
        wide = np.broadcast_to(factor, places).ravel()
        return np.array_equal(wide[source], wide)

    found = [factor for factor in factors if speaks(factor)]
    return fold(ledger.product, found) if 0 < len(found) < len(factors) else cover
