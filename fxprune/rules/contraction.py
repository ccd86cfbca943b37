"""Contractions: a dim of one operand is tied to a dim of the other and summed away; the free dims are handed on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


def matmul(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (.., n, k), w: (.., k, m) -> (.., n, m)."""
    op.host.pair(x, w, x.ndim - 1)
    wide_x = algebra.insert(op.labels(x), x.ndim)
    wide_w = algebra.insert(op.labels(w), w.ndim - 2)
    return op.contract(wide_x, (*x.shape, 1), wide_w, (*w.shape[:-2], 1, *w.shape[-2:]), [x.ndim - 1])


@rule(aten.mm, aten.bmm)
def mm(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (.., n, k), w: (.., k, m) -> (.., n, m)."""
    return matmul(op, x, w)


@rule(aten.addmm, aten.baddbmm)
def addmm(op: Op, bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, **kwargs: float) -> Labels:
    """bias: (m,) or broadcast, x: (.., n, k), w: (.., k, m) -> (.., n, m)."""
    labels, shape = matmul(op, x, w), tuple(op.out.shape)
    if bias.ndim == 1 and len(bias) == shape[-1]:
        return op.per_channel(labels, shape, [bias], at=[len(shape) - 1])
    return algebra.broadcast(op.ledger, labels, shape, op.labels(bias), tuple(bias.shape))[0]


@rule(aten.linear)
def linear(op: Op, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Labels:
    """x: (.., k), weight: (m, k) -> (.., m)."""
    labels, shape = op.labels(x), tuple(op.out.shape)
    last = x.ndim - 1
    if op.host.pristine(weight) and all(ids is None for ids in labels[:last]):
        result = _first_linear(op, labels[last], x, weight)
    else:
        lead, (m, k) = math.prod(x.shape[:last]), weight.shape
        flat = algebra.insert(op.reshape(labels, tuple(x.shape), (lead, k)), 1)
        result = op.contract(flat, (lead, 1, k), algebra.insert(op.labels(weight), 0), (1, m, k), [2])
        result = op.reshape(result, (lead, m), shape)
    return result if bias is None else op.per_channel(result, shape, [bias], at=[last])


def _first_linear(op: Op, channels: np.ndarray | None, x: torch.Tensor, weight: torch.Tensor) -> Labels:
    """Contract the last dim with a weight met for the first time, where no other dim is labelled."""
    m, k = weight.shape
    fresh = op.ledger.fresh((m,)) if m > 1 else None
    if channels is None and k > 1:
        channels = op.ledger.fresh((k,))
        op.ledger.freeze(channels, "is combined with a dim whose size cannot change")
    ins, outs = (None if ids is None else ids.ravel() for ids in (channels, fresh))
    op.host.name(weight, tuple(None if ids is None else algebra.along(ids, d, 2) for d, ids in enumerate((outs, ins))))
    fixed = math.prod(x.shape[:-1]) * (k if ins is None else 1) * (m if outs is None else 1)
    op.host.count(fixed, tuple((ids, 0) for ids in (ins, outs) if ids is not None))
    return (*algebra.blank(x.ndim - 1), None if outs is None else algebra.along(outs, x.ndim - 1, x.ndim))


@rule(aten.mv)
def mv(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (n, k), w: (k,) -> (n,)."""
    return op.contract(op.labels(x), tuple(x.shape), op.labels(w), tuple(w.shape), [1])


@rule(aten.dot, aten.vdot)
def dot(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (k,), w: (k,) -> ()."""
    return op.contract(op.labels(x), tuple(x.shape), op.labels(w), tuple(w.shape), [0])


@rule(aten._cdist_forward)
def cdist(op: Op, x: torch.Tensor, y: torch.Tensor, *args: object) -> Labels:
    """x: (.., n, k), y: (.., m, k) -> (.., n, m): a norm of the differences along k."""
    wide_x, wide_y = algebra.insert(op.labels(x), x.ndim - 1), algebra.insert(op.labels(y), y.ndim - 2)
    shapes = (*x.shape[:-1], 1, x.shape[-1]), (*y.shape[:-2], 1, *y.shape[-2:])
    return op.contract(wide_x, shapes[0], wide_y, shapes[1], [x.ndim])


@rule(aten._trilinear)
def trilinear(
    op: Op,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    expand_x: Sequence[int],
    expand_w: Sequence[int],
    expand_y: Sequence[int],
    summed: Sequence[int],
    *args: object,
) -> Labels:
    """x: (b, i), w: (o, i, j), y: (b, j) -> (b, o): each gets dims of size one, then all are multiplied and summed."""
    wide: list[tuple[Labels, tuple[int, ...]]] = []
    for tensor, dims in ((x, expand_x), (w, expand_w), (y, expand_y)):
        labels, shape = op.labels(tensor), tuple(tensor.shape)
        for d in dims:
            labels, shape = algebra.insert(labels, d), (*shape[:d], 1, *shape[d:])
        wide.append((labels, shape))
    (first, first_shape), (second, second_shape), (third, third_shape) = wide
    both, both_shape = algebra.broadcast(op.ledger, first, first_shape, second, second_shape)
    return op.contract(both, both_shape, third, third_shape, summed)


@rule(aten.embedding)
def embedding(op: Op, weight: torch.Tensor, indices: torch.Tensor, *args: object) -> Labels:
    """weight: (entries, d), indices: any shape -> (*indices, d). Entries stay: which are read depends on the data."""
    labels = op.fix(op.labels(weight), [0], "is a table indexed by data")
    row = algebra.drop((None, labels[1]), [0])
    for _ in range(indices.ndim):
        row = algebra.insert(row, 0)
    return row


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(op: Op, weight: torch.Tensor, indices: torch.Tensor, *args: object) -> list[Labels]:
    """weight: (entries, d), indices: (n,) -> (bags, d), and numbers about the bags. Entries stay, as of `embedding`."""
    return [embedding(op, weight, indices), *[algebra.blank(extra.ndim) for extra in op.out[1:]]]


@rule(aten.convolution, aten._convolution, aten.cudnn_convolution)
def convolution(
    op: Op,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *args: object,
) -> Labels:
    """x: (b, c_in, *space), weight: (c_out, c_in / g, *kernel) -> (b, c_out, *space).

    Transposed: weight is (c_in, c_out / g, *kernel). Either way the channels are cut into g rows and every row is
    contracted on its own.
    """
    batch, channels, *space = op.labels(x)
    usual = batch is None and all(ids is None for ids in space) and not algebra.rag(channels, 1)
    each = math.prod(weight.shape[2:]) * math.prod((x if transposed else op.out).shape[2:])
    if usual and groups == 1 and op.host.pristine(weight):
        labels = _first_use(op, x, weight, transposed, each)
    elif usual and channels is not None and groups == x.shape[1] == op.out.shape[1] and op.host.pristine(weight):
        op.host.name(weight, (channels.reshape(-1, *[1] * (weight.ndim - 1)), *algebra.blank(weight.ndim - 1)))
        op.host.count(x.shape[0] * each, ((channels, 1),))
        labels = op.labels(x)
    else:
        labels = _by_groups(op, x, weight, transposed, groups, each)
    return labels if bias is None else op.per_channel(labels, op.out.shape, [bias], at=[1])


def _first_use(op: Op, x: torch.Tensor, weight: torch.Tensor, transposed: bool, each: int) -> Labels:
    """Contract with a weight met for the first time: its inputs are the channels that come in, its outputs are new."""
    channels = op.labels(x)[1]
    c_in, c_out = x.shape[1], op.out.shape[1]
    fresh = algebra.along(op.ledger.fresh((c_out,)), 1, x.ndim) if c_out > 1 else None
    if channels is None and c_in > 1:
        channels = algebra.along(op.ledger.fresh((c_in,)), 1, x.ndim)
        op.ledger.freeze(channels, "reads a dim whose size cannot change")
    place = (1, 0) if not transposed else (0, 1)
    dims: list[np.ndarray | None] = [None] * weight.ndim
    for d, ids in zip(place, (channels, fresh), strict=True):
        dims[d] = None if ids is None else algebra.along(ids.ravel(), d, weight.ndim)
    op.host.name(weight, tuple(dims))
    fixed = x.shape[0] * each * (c_in if channels is None else 1) * (c_out if fresh is None else 1)
    op.host.count(fixed, tuple((ids, 1) for ids in (channels, fresh) if ids is not None))
    return (None, fresh, *algebra.blank(x.ndim - 2))


def _by_groups(op: Op, x: torch.Tensor, weight: torch.Tensor, transposed: bool, groups: int, each: int) -> Labels:
    """Cut the channels into g rows and contract every row on its own."""
    if op.host.pristine(weight):
        op.host.name(weight, _kernel(op, weight, groups))
    space = range(2, x.ndim)
    inputs = op.reduce(op.fix(op.labels(x), space), space)
    kernel = op.reduce(op.fix(op.labels(weight), space), space)
    batch, c_in = x.shape[:2]
    c_out = op.out.shape[1]
    rows = op.reshape(inputs, (batch, c_in), (batch, groups, 1, c_in // groups))
    first, second = (c_in, c_out) if transposed else (c_out, c_in)
    cut = op.reshape(kernel, (first, second // groups), (groups, first // groups, second // groups))
    if transposed:
        cut = algebra.move(cut, [0, 2, 1])
    shapes = (batch, groups, 1, c_in // groups), (1, groups, c_out // groups, c_in // groups)
    result = op.contract(rows, shapes[0], algebra.insert(cut, 0), shapes[1], [3], each)
    result = op.reshape(result, (batch, groups, c_out // groups), (batch, c_out))
    for d in space:
        result = algebra.insert(result, d)
    return result


def _kernel(op: Op, weight: torch.Tensor, groups: int) -> Labels:
    """Label the two channel dims of a convolution's weight: the second may differ from group to group."""
    rows, width = weight.shape[:2]
    first = algebra.along(op.ledger.fresh((rows,)), 0, weight.ndim) if rows > 1 else None
    second = None
    if width > 1 and groups == 1:
        second = algebra.along(op.ledger.fresh((width,)), 1, weight.ndim)
    elif width > 1:
        ids = np.repeat(op.ledger.fresh((groups, width)), rows // groups, axis=0)
        second = ids.reshape(rows, width, *[1] * (weight.ndim - 2))
    return (first, second, *algebra.blank(weight.ndim - 2))
