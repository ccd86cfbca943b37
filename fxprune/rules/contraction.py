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
    shape = tuple(op.out.shape)
    return algebra.broadcast(op.ledger, matmul(op, x, w), shape, op.labels(bias), tuple(bias.shape))[0]


@rule(aten.mv)
def mv(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (n, k), w: (k,) -> (n,)."""
    return op.contract(op.labels(x), tuple(x.shape), op.labels(w), tuple(w.shape), [1])


@rule(aten.dot)
def dot(op: Op, x: torch.Tensor, w: torch.Tensor) -> Labels:
    """x: (k,), w: (k,) -> ()."""
    return op.contract(op.labels(x), tuple(x.shape), op.labels(w), tuple(w.shape), [0])


@rule(aten.embedding)
def embedding(op: Op, weight: torch.Tensor, indices: torch.Tensor, *args: object) -> Labels:
    """weight: (entries, d), indices: any shape -> (*indices, d). Entries stay: which are read depends on the data."""
    labels = op.fix(op.labels(weight), [0], "is a table indexed by data")
    row = algebra.drop((None, labels[1]), [0])
    for _ in range(indices.ndim):
        row = algebra.insert(row, 0)
    return row


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
    space = range(2, x.ndim)
    if op.host.pristine(weight):
        op.host.name(weight, _kernel(op, weight, groups))
    inputs = op.reduce(op.fix(op.labels(x), space), space)
    kernel = op.reduce(op.fix(op.labels(weight), space), space)
    batch, c_in = x.shape[:2]
    c_out = op.out.shape[1]
    each = math.prod(weight.shape[2:]) * math.prod((x if transposed else op.out).shape[2:])
    rows = op.reshape(inputs, (batch, c_in), (batch, groups, 1, c_in // groups))
    first, second = (c_in, c_out) if transposed else (c_out, c_in)
    cut = op.reshape(kernel, (first, second // groups), (groups, first // groups, second // groups))
    if transposed:
        cut = algebra.move(cut, [0, 2, 1])
    cut = algebra.insert(cut, 0)
    shapes = (batch, groups, 1, c_in // groups), (1, groups, c_out // groups, c_in // groups)
    result = op.contract(rows, shapes[0], cut, shapes[1], [3], each)
    result = op.reshape(result, (batch, groups, c_out // groups), (batch, c_out))
    if bias is not None:
        result = algebra.broadcast(op.ledger, result, (batch, c_out), op.labels(bias), (c_out,))[0]
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
