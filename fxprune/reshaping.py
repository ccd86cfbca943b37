"""Views: how labels follow when dims are merged and split.

Both shapes are cut into the smallest blocks of equal product; inside a block, dims are merged into one and that one is
split again. Merging a row and a column dim gives ragged labels their row back, splitting makes rows that are balanced.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

from fxprune.atoms import Ledger
from fxprune.labels import Labels, Shape, align, blank, settle


def reshape(ledger: Ledger, labels: Labels, shape: Shape, new: Shape) -> Labels:
    """Follow a view from `shape` to `new`: merge and split the smallest blocks of dims of equal product."""
    if tuple(shape) == tuple(new):
        return labels
    if 0 in shape:
        return blank(len(new))
    solid = [d for d, n in enumerate(shape) if n > 1]
    work = [None if (ids := labels[d]) is None else ids.reshape([ids.shape[e] for e in solid]) for d in solid]
    sizes = [shape[d] for d in solid]
    target = [n for n in new if n > 1]
    at = 0
    for before, after in _blocks(sizes, target):
        if before != after:
            for _ in before[1:]:
                work, sizes = _merge(ledger, work, sizes, at)
            for n in after[:-1]:
                work, sizes = _split(ledger, work, sizes, at, n)
                at += 1
            at += 1
        else:
            at += len(after)
    return settle(ledger, _unsqueezed(work, new))


def _unsqueezed(work: list[np.ndarray | None], new: Shape) -> Labels:
    places = [d for d, n in enumerate(new) if n > 1]
    result: list[np.ndarray | None] = [None] * len(new)
    for d, ids in zip(places, work, strict=True):
        if ids is not None:
            sizes = [1] * len(new)
            for e, n in zip(places, ids.shape, strict=True):
                sizes[e] = n
            result[d] = ids.reshape(sizes)
    return tuple(result)


def _blocks(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes without ones into the shortest runs of equal product."""
    blocks, i, j = [], 0, 0
    while i < len(before):
        left, right = [before[i]], [after[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(left)) != (b := math.prod(right)):
            if a < b:
                left.append(before[i])
                i += 1
            else:
                right.append(after[j])
                j += 1
        blocks.append((left, right))
    return blocks


def _merge(
    ledger: Ledger, work: list[np.ndarray | None], sizes: list[int], at: int
) -> tuple[list[np.ndarray | None], list[int]]:
    """Merge dims `at` and `at + 1`."""
    n, m = sizes[at], sizes[at + 1]
    work = list(align(ledger, tuple(work), at, [at + 1]))
    outer, inner = work[at], work[at + 1]
    if outer is not None and inner is not None and inner.shape[at] > 1 and _implied(ledger, inner, at + 1, outer):
        owner = inner
    elif outer is None or inner is None:
        owner = inner if outer is None else outer
    else:
        owner = ledger.product(outer, inner)

    def fuse(ids: np.ndarray | None, full: bool = False) -> np.ndarray | None:
        if ids is None:
            return None
        full = full or ids.shape[at] > 1 or ids.shape[at + 1] > 1
        pair = (n, m) if full else (1, 1)
        wide = np.broadcast_to(ids, (*ids.shape[:at], *pair, *ids.shape[at + 2 :]))
        return wide.reshape(*ids.shape[:at], pair[0] * pair[1], *ids.shape[at + 2 :])

    merged = [fuse(ids) for ids in work[:at]] + [fuse(owner, full=True)] + [fuse(ids) for ids in work[at + 2 :]]
    return merged, [*sizes[:at], n * m, *sizes[at + 2 :]]


def _implied(ledger: Ledger, ids: np.ndarray, dim: int, owner: np.ndarray) -> bool:
    """Say whether a row stays, by `owner`, just where any of its columns `ids` does."""
    row = ledger.any_along(ids, dim)
    return bool((row == owner).all()) or ledger.is_row(row, owner)


def _split(
    ledger: Ledger, work: list[np.ndarray | None], sizes: list[int], at: int, n: int
) -> tuple[list[np.ndarray | None], list[int]]:
    """Split dim `at` into `n` rows."""
    m = sizes[at] // n

    def cut(ids: np.ndarray | None) -> np.ndarray | None:
        if ids is None:
            return None
        pair = (n, m) if ids.shape[at] > 1 else (1, 1)
        return ids.reshape(*ids.shape[:at], *pair, *ids.shape[at + 1 :])

    parts = [cut(ids) for ids in work]
    owner = parts[at]
    others = [None if ids is None else _squeezed(_squeezed(ids, at), at + 1) for ids in parts]
    rows, columns = (None, None) if owner is None else _rows_and_columns(ledger, owner, at)
    result = [*others[:at], rows, columns, *others[at + 1 :]]
    return result, [*sizes[:at], n, m, *sizes[at + 1 :]]


def _rows_and_columns(ledger: Ledger, ids: np.ndarray, at: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Find who owns dims `at` and `at + 1` of labels that vary over both."""
    first_column, first_row = ids.take([0], axis=at + 1), ids.take([0], axis=at)
    if (ids == first_column).all():
        return first_column, None
    if (ids == first_row).all():
        return None, first_row
    found = ledger.factors(ids)
    rows = [f for f in found if (f == f.take([0], axis=at + 1)).all()]
    columns = [f for f in found if (f == f.take([0], axis=at)).all() and not any(f is r for r in rows)]
    if len(rows) + len(columns) == len(found) and rows and columns:
        row, column = (reduce(ledger.product, factors) for factors in (rows, columns))
        return _compact(row, at, at + 1), _compact(column, at + 1, at)
    return ledger.any_along(ids, at + 1), ids


def _compact(ids: np.ndarray, dim: int, other: int) -> np.ndarray:
    """Let labels that belong to `dim` vary over no dim along which they are the same, and not over `other`."""
    ids = ids.take([0], axis=other)
    for d in range(ids.ndim):
        ids = ids if d == dim else _squeezed(ids, d)
    return ids


def _squeezed(ids: np.ndarray, dim: int) -> np.ndarray:
    """Drop `dim` from an array if it does not vary there (checked by value), else keep it."""
    first = ids.take([0], axis=dim)
    return first if ids.shape[dim] > 1 and (ids == first).all() else ids
