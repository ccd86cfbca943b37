"""Fourier transforms and complex numbers: channels pass, nothing along the transformed dims may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


@rule(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def transform(op: Op, x: torch.Tensor, dims: Sequence[int], *args: Any) -> Labels:
    """x: any shape; every frequency is made of all positions along `dims`."""
    dims = [d % x.ndim for d in dims]
    return op.mix(op.fix(op.labels(x), dims), dims)


@rule(aten.view_as_real)
def view_as_real(op: Op, x: torch.Tensor) -> Labels:
    """x: (..) complex -> (.., 2) real."""
    return algebra.insert(op.labels(x), x.ndim)


@rule(aten.view_as_complex)
def view_as_complex(op: Op, x: torch.Tensor) -> Labels:
    """x: (.., 2) real -> (..) complex."""
    last = [x.ndim - 1]
    return op.reduce(op.fix(op.labels(x), last), last)
