"""Movement ops: values change place and nothing else, so labels do the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fxprune import labels as algebra
from fxprune.atoms import FIXED
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


@rule(
    aten.alias,
    aten.detach,
    aten.clone,
    aten.contiguous,
    aten._to_copy,
    aten.lift_fresh,
    aten.lift,
    aten.lift_fresh_copy,
    aten._conj,
    aten._neg_view,
)
def same(op: Op, x: torch.Tensor, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape. The same values in the same places."""
    return op.labels(x)


@rule(aten.as_strided)
def as_strided(op: Op, x: torch.Tensor, size: Sequence[int], *args: Any) -> Labels:
    """x: any shape. Only a change of memory format is understood: the sizes stay."""
    if tuple(size) == tuple(x.shape):
        return op.labels(x)
    return op.freeze(x)


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def view(op: Op, x: torch.Tensor, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape, read row by row into another shape of the same number of elements."""
    return op.reshape(op.labels(x), tuple(x.shape), tuple(op.out.shape))


@rule(aten.permute)
def permute(op: Op, x: torch.Tensor, dims: Sequence[int]) -> Labels:
    """x: any shape."""
    return algebra.move(op.labels(x), [d % x.ndim for d in dims])


@rule(aten.transpose)
def transpose(op: Op, x: torch.Tensor, a: int, b: int) -> Labels:
    """x: any shape; two dims change place."""
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return algebra.move(op.labels(x), order)


@rule(aten.t)
def t(op: Op, x: torch.Tensor) -> Labels:
    """x: (n, m) or (n,)."""
    return algebra.move(op.labels(x), range(x.ndim)[::-1])


@rule(aten.unsqueeze)
def unsqueeze(op: Op, x: torch.Tensor, dim: int) -> Labels:
    """x: any shape; a dim of size one is added."""
    return algebra.insert(op.labels(x), dim % (x.ndim + 1))


@rule(aten.squeeze)
def squeeze(op: Op, x: torch.Tensor, dim: int | Sequence[int] | None = None) -> Labels:
    """x: any shape; dims of size one are removed."""
    if not x.ndim:
        return ()
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return algebra.drop(op.labels(x), [d % x.ndim for d in dims if x.shape[d] == 1])


@rule(aten.slice)
def slice_(
    op: Op, x: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Labels:
    """x: (.., n, ..); positions start, start + step, .. below end of one dim."""
    positions = np.arange(x.shape[dim])[slice(start, end, step)]
    return op.pick(op.labels(x), dim % x.ndim, positions)


@rule(aten.select)
def select(op: Op, x: torch.Tensor, dim: int, index: int) -> Labels:
    """x: (.., n, ..); one position of one dim, which disappears."""
    dim %= x.ndim
    picked = op.pick(op.labels(x), dim, np.array([index % x.shape[dim]]))
    return algebra.drop(picked, [dim])


@rule(
    aten.split,
    aten.split_with_sizes,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
    aten.split_copy,
    aten.chunk,
    aten.unsafe_chunk,
)
def split(op: Op, x: torch.Tensor, sizes: Any, dim: int = 0) -> list[Labels]:
    """x: (.., n, ..) cut into runs along one dim."""
    ends = np.cumsum([0] + [part.shape[dim] for part in op.out])
    return [op.pick(op.labels(x), dim % x.ndim, np.arange(a, b)) for a, b in pairwise(ends)]


@rule(aten.unbind)
def unbind(op: Op, x: torch.Tensor, dim: int = 0) -> list[Labels]:
    """x: (.., n, ..) cut into its n positions along one dim, which disappears."""
    return [select(op, x, dim, i) for i in range(x.shape[dim])]


@rule(aten.flip)
def flip(op: Op, x: torch.Tensor, dims: Sequence[int]) -> Labels:
    """x: any shape; the order of some dims is reversed."""
    labels = op.labels(x)
    for d in dims:
        labels = op.pick(labels, d % x.ndim, np.arange(x.shape[d])[::-1])
    return labels


@rule(aten.rot90)
def rot90(op: Op, x: torch.Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Labels:
    """x: any shape; two dims are turned, and with them the positions of both: none may go."""
    turned = [d % x.ndim for d in dims]
    return op.mix(op.fix(op.labels(x), turned), turned)


@rule(aten.roll)
def roll(op: Op, x: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Labels:
    """x: any shape; positions move round along some dims."""
    if not dims:
        return op.freeze(x)
    labels = op.labels(x)
    for shift, d in zip(shifts, dims, strict=True):
        labels = op.pick(labels, d % x.ndim, np.roll(np.arange(x.shape[d]), shift))
    return labels


@rule(aten.index_select)
def index_select(op: Op, x: torch.Tensor, dim: int, index: torch.Tensor) -> Labels:
    """x: (.., n, ..), index: (k,). Known positions are picked; unknown ones fix the dim."""
    positions = op.host.value(index)
    dim = dim % max(x.ndim, 1)
    if positions is None:
        return op.fix(op.labels(x), [dim], "is indexed by positions that are not constant")
    return op.pick(op.labels(x), dim, positions.numpy().reshape(-1) % x.shape[dim])


@rule(aten.index)
def index(op: Op, x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Labels:
    """x: any shape; one dim indexed by a constant tensor of positions is picked, any other indexing fixes its dims."""
    used = [d for d, i in enumerate(indices) if i is not None]
    labels = op.labels(x)
    positions = op.host.value(only) if len(used) == 1 and (only := indices[used[0]]) is not None else None
    if positions is None or positions.dtype == torch.bool:
        return _indexed_unknown(op, x, labels, indices, used)
    dim = used[0]
    picked = op.pick(labels, dim, positions.numpy().reshape(-1) % x.shape[dim])
    flat = (*x.shape[:dim], positions.numel(), *x.shape[dim + 1 :])
    return op.reshape(picked, flat, tuple(op.out.shape))


def _indexed_unknown(
    op: Op, x: torch.Tensor, labels: Labels, indices: Sequence[torch.Tensor | None], used: list[int]
) -> Labels:
    labels = op.fix(labels, used, "is indexed by positions that are not constant")
    labels = op.mix(labels, used)
    if used != list(range(used[0], used[-1] + 1)):
        return op.freeze(x)
    rank = max(t.ndim for t in indices if t is not None)
    rest = algebra.drop(tuple(None if d in used else ids for d, ids in enumerate(labels)), used)
    for _ in range(rank):
        rest = algebra.insert(rest, used[0])
    return rest if len(rest) == op.out.ndim else op.freeze(x)


@rule(aten.expand)
def expand(op: Op, x: torch.Tensor, size: Sequence[int], **kwargs: Any) -> Labels:
    """x: any shape; dims of size one are repeated, and every copy may go on its own."""
    labels = op.labels(x)
    for _ in range(op.out.ndim - x.ndim):
        labels = algebra.insert(labels, 0)
    shape = (1,) * (op.out.ndim - x.ndim) + tuple(x.shape)
    return tuple(
        algebra.along(op.host.constant((n,)), d, op.out.ndim) if shape[d] == 1 < n else labels[d]
        for d, n in enumerate(op.out.shape)
    )


@rule(aten.repeat)
def repeat(op: Op, x: torch.Tensor, repeats: Sequence[int]) -> Labels:
    """x: any shape, tiled; the copies of a position live and die together."""
    labels = op.labels(x)
    for _ in range(len(repeats) - x.ndim):
        labels = algebra.insert(labels, 0)
    for d, k in enumerate(repeats):
        n = op.out.shape[d] // k if k else 0
        if k > 1 and n > 1:
            labels = op.pick(labels, d, np.tile(np.arange(n), k))
        elif k > 1:
            labels = (*labels[:d], algebra.along(op.host.constant((k,)), d, len(repeats)), *labels[d + 1 :])
    return labels


@rule(aten.cat)
def cat(op: Op, tensors: Sequence[torch.Tensor], dim: int = 0) -> Labels:
    """tensors: equal shapes but for `dim`, along which they are laid end to end."""
    parts = [(op.labels(x), tuple(x.shape)) for x in tensors if x.numel()]
    return algebra.concatenate(op.ledger, parts, dim % op.out.ndim)


@rule(aten.stack)
def stack(op: Op, tensors: Sequence[torch.Tensor], dim: int = 0) -> Labels:
    """tensors: equal shapes, laid side by side along a new dim."""
    dim %= op.out.ndim
    one = (*op.out.shape[:dim], 1, *op.out.shape[dim + 1 :])
    return algebra.concatenate(op.ledger, [(algebra.insert(op.labels(x), dim), one) for x in tensors], dim)


@rule(aten.constant_pad_nd)
def constant_pad_nd(op: Op, x: torch.Tensor, pad: Sequence[int], value: float = 0) -> Labels:
    """x: any shape; the padding of a labelled dim is made of channels of its own, that follow their partners."""
    labels = op.labels(x)
    for i in range(len(pad) // 2):
        d = x.ndim - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        if not (before or after):
            continue
        n = x.shape[d]
        positions = np.arange(-before, n + after)
        inside = (positions >= 0) & (positions < n)
        mine = labels[d]
        wide = [_padded(op, ids, d, positions, inside, own=False) for ids in labels]
        if mine is not None or n == 1:
            wide[d] = _padded(op, mine, d, positions, inside, own=True, ndim=x.ndim)
        labels = algebra.settle(op.ledger, tuple(wide))
    return labels


def _padded(
    op: Op, ids: np.ndarray | None, dim: int, positions: np.ndarray, inside: np.ndarray, own: bool, ndim: int = 0
) -> np.ndarray | None:
    """Return labels over a padded dim: fresh ones where `own`, else those of the nearest position."""
    if ids is None and not own:
        return None
    if ids is None:
        ids = np.full((1,) * ndim, FIXED, dtype=np.int64)
    if ids.shape[dim] == 1 and not own:
        return ids
    picked = ids.take(np.clip(positions, 0, ids.shape[dim] - 1), axis=dim)
    if own:
        outside = algebra.along(~inside, dim, ids.ndim)
        fresh = algebra.along(op.host.constant((len(positions),)), dim, ids.ndim)
        picked = np.where(outside, fresh, picked)
    return picked


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(op: Op, x: torch.Tensor, groups: int) -> Labels:
    """x: (b, c, *space), its channels read as (groups, c / groups) and written as (c / groups, groups)."""
    b, c, *space = x.shape
    rows = op.reshape(op.labels(x), tuple(x.shape), (b, groups, c // groups, *space))
    swapped = algebra.move(rows, [0, 2, 1, *range(3, x.ndim + 1)])
    return op.reshape(swapped, (b, c // groups, groups, *space), tuple(x.shape))


@rule(aten.pixel_shuffle)
def pixel_shuffle(op: Op, x: torch.Tensor, factor: int) -> Labels:
    """x: (.., c * r * r, h, w) -> (.., c, h * r, w * r)."""
    *lead, c, h, w = x.shape
    k = len(lead)
    labels = op.reshape(op.labels(x), tuple(x.shape), (*lead, c // factor**2, factor, factor, h, w))
    labels = op.fix(labels, [k + 1, k + 2])
    order = [*range(k), k, k + 3, k + 1, k + 4, k + 2]
    shape = (*lead, c // factor**2, h, factor, w, factor)
    return op.reshape(algebra.move(labels, order), shape, tuple(op.out.shape))


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(op: Op, x: torch.Tensor, factor: int) -> Labels:
    """x: (.., c, h * r, w * r) -> (.., c * r * r, h, w)."""
    *lead, c, h, w = x.shape
    k = len(lead)
    labels = op.fix(op.labels(x), [k + 1, k + 2])
    labels = op.reshape(labels, tuple(x.shape), (*lead, c, h // factor, factor, w // factor, factor))
    order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
    shape = (*lead, c, factor, factor, h // factor, w // factor)
    return op.reshape(algebra.move(labels, order), shape, tuple(op.out.shape))
