"""Pointwise ops: the operands' labels are tied dim by dim."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


def tensors_of(*values: Any) -> list[torch.Tensor]:
    """Return the tensors among arguments."""
    return [v for v in values if isinstance(v, torch.Tensor)]


@rule(
    aten.add,  # stands for every op tagged pointwise; the others lack the tag
    aten.hardswish,
    aten._prelu_kernel,
    aten.prelu,
    aten.log_sigmoid_forward,
    aten.copy,
    aten.bernoulli,
    aten.dropout,
    aten.rrelu,
    aten.rsub,
    aten.floor_divide,
    aten.polar,
    aten.complex,
)
def pointwise(op: Op, *args: Any, **kwargs: Any) -> Labels | list[Labels]:
    """All operands broadcast. An in-place op keeps the labels of what it writes to."""
    operands = tensors_of(*args, *kwargs.values())
    labels = op.broadcast(*operands) if operands else ()
    if op.out is args[0]:
        return op.labels(args[0])
    if not isinstance(op.out, torch.Tensor):
        return [labels] * len(op.out)
    always_there = op.out.dtype == torch.bool or op.func.overloadpacket is aten.nan_to_num
    return op.as_constant(labels) if always_there else labels


@rule(aten.fill, aten.zero, aten.uniform, aten.normal, aten.exponential)
def overwrite(op: Op, x: torch.Tensor, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape. Whatever was there, every position is written alike."""
    return op.labels(x)


@rule(aten.native_dropout)
def native_dropout(op: Op, x: torch.Tensor, *args: Any) -> list[Labels]:
    """x: any shape. The result and its mask."""
    return [op.labels(x)] * 2


@rule(aten.glu)
def glu(op: Op, x: torch.Tensor, dim: int = -1) -> Labels:
    """x: (.., 2n, ..). The first half is gated by the second."""
    dim %= x.ndim
    half = x.shape[dim] // 2
    value = op.pick(op.labels(x), dim, np.arange(half))
    gate = op.pick(op.labels(x), dim, np.arange(half, 2 * half))
    shape = tuple(op.out.shape)
    return algebra.broadcast(op.ledger, value, shape, gate, shape)[0]
