"""Ops that make tensors. One filled with a single value can be cut anywhere: its channels follow their partners."""

from __future__ import annotations

from typing import Any

import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty,
)  # fmt: skip
def homogeneous(op: Op, *args: Any, **kwargs: Any) -> Labels:
    """Any shape, every position alike: fresh labels."""
    shape = op.out.shape
    return tuple(algebra.along(op.host.constant((n,)), d, len(shape)) if n > 1 else None for d, n in enumerate(shape))


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like)
def like(op: Op, x: torch.Tensor, *args: Any, **kwargs: Any) -> Labels:
    """x: any shape; the result is cut where `x` is."""
    return op.as_constant(op.labels(x))


@rule(aten.arange, aten.linspace, aten.scalar_tensor, aten.eye)
def positional(op: Op, *args: Any, **kwargs: Any) -> Labels:
    """Any shape, every position different: nothing may go."""
    return algebra.blank(op.out.ndim)
