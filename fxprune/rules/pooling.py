"""Pooling, upsampling, patches and spatial padding: channels pass, nothing along the spatial dims may go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxprune import labels as algebra
from fxprune.labels import Labels
from fxprune.rules import Op, rule

aten = torch.ops.aten


def spatial(rank: int) -> Any:
    """Return the rule of an op over the last `rank` dims of its first operand."""

    def run(op: Op, x: torch.Tensor, *args: Any, **kwargs: Any) -> Labels | list[Labels]:
        """x: (.., *space) with `rank` spatial dims; each channel on its own."""
        space = range(x.ndim - rank, x.ndim)
        labels = op.mix(op.fix(op.labels(x), space), space)
        return labels if isinstance(op.out, torch.Tensor) else [labels] * len(op.out)

    return run


rule(
    aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d, aten.upsample_nearest1d,
    aten.upsample_linear1d, aten.reflection_pad1d, aten.replication_pad1d, aten._upsample_nearest_exact1d,
)(spatial(1))  # fmt: skip
rule(
    aten.max_pool2d_with_indices, aten.max_pool2d, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d, aten.fractional_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d,
    aten.reflection_pad2d, aten.replication_pad2d,
)(spatial(2))  # fmt: skip
rule(
    aten.max_pool3d_with_indices, aten.max_pool3d, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.adaptive_avg_pool3d,
    aten.adaptive_max_pool3d, aten.upsample_nearest3d, aten.upsample_trilinear3d, aten._upsample_nearest_exact3d,
    aten.reflection_pad3d, aten.replication_pad3d,
)(spatial(3))  # fmt: skip


@rule(aten.unfold)
def windows(op: Op, x: torch.Tensor, dim: int, size: int, step: int) -> Labels:
    """x: (.., n, ..) -> (.., windows, .., size): runs along one dim, laid out in a new last one."""
    dim %= x.ndim
    return algebra.insert(op.mix(op.fix(op.labels(x), [dim]), [dim]), x.ndim)


@rule(aten.im2col)
def im2col(op: Op, x: torch.Tensor, kernel: Sequence[int], *args: Any) -> Labels:
    """x: (b, c, h, w) -> (b, c * k * k, patches)."""
    b, c = x.shape[:2]
    labels = op.reduce(op.fix(op.labels(x), [2, 3]), [2, 3])
    for _ in range(2):
        labels = algebra.insert(labels, 2)
    patches = op.out.shape[2]
    return op.reshape(labels, (b, c, math.prod(kernel), patches), (b, op.out.shape[1], patches))


@rule(aten.col2im)
def col2im(op: Op, x: torch.Tensor, size: Sequence[int], kernel: Sequence[int], *args: Any) -> Labels:
    """x: (b, c * k * k, patches) -> (b, c, h, w); overlapping patches are added."""
    b, c = op.out.shape[:2]
    rows = op.reshape(op.labels(x), tuple(x.shape), (b, c, math.prod(kernel), x.shape[2]))
    labels = op.reduce(op.fix(rows, [2, 3]), [2, 3])
    return algebra.insert(algebra.insert(labels, 2), 2)


@rule(aten.grid_sampler_2d, aten.grid_sampler_3d)
def grid_sampler(op: Op, x: torch.Tensor, grid: torch.Tensor, *args: Any) -> Labels:
    """x: (b, c, *space), grid: (b, *places, rank) -> (b, c, *places). Channels pass; the first dims are tied."""
    places, space = range(1, grid.ndim), range(2, x.ndim)
    wide = op.reduce(op.fix(op.labels(grid), places), places)
    for d in places:
        wide = algebra.insert(wide, d)
    labels = op.mix(op.fix(op.labels(x), space), space)
    both, _ = algebra.broadcast(op.ledger, labels, tuple(x.shape), wide, (len(grid), *[1] * len(places)))
    return (*both[:2], *algebra.blank(len(space)))
