"""What common ops return on the meta device, told by a formula: many of torch's own kernels there are slow Python.

A formula is asked only for floating tensors of one dtype, some of them on the meta device. It returns None where the
call is an unusual one, or one that would raise: then the kernel is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.registering import registering

aten = torch.ops.aten

_META = torch.device("meta")

Formula = Callable[..., Any]
FORMULAS: dict[Any, Formula] = {}

POINTWISE = {
    aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_, aten.relu, aten.relu_,
    aten.sigmoid, aten.sigmoid_, aten.tanh, aten.gelu, aten.silu, aten.silu_, aten.hardswish, aten.hardswish_,
    aten.hardsigmoid, aten.hardsigmoid_, aten.hardtanh, aten.hardtanh_, aten.leaky_relu, aten.leaky_relu_,
    aten.elu, aten.elu_, aten.sqrt, aten.rsqrt, aten.exp, aten.neg, aten.addcmul, aten.erf, aten.softplus, aten.mish,
}  # fmt: skip
"""Ops whose result, for floating operands of one dtype, has that dtype and the broadcast shape."""


def told(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an op returns for tensors without data, or None where only its kernel tells."""
    formula = _formula(func)
    if formula is None or not _alike(args) or not _plain(kwargs):
        return None
    return formula(*args, **kwargs)


@functools.cache
def _formula(func: Any) -> Formula | None:
    found = FORMULAS.get(func)
    if found is None and func.overloadpacket in POINTWISE:
        return _in_place if func._schema.is_mutable else _pointwise
    return found


def _alike(args: Any) -> bool:
    """Say whether all tensors are floating and of one dtype, and some on the meta device, and no number is complex."""
    dtype, some_meta = None, False
    for a in args[0] if type(args[0]) is list else args:  # a loop: this is asked for every call
        if isinstance(a, torch.Tensor):
            if dtype is None:
                dtype = a.dtype
                if not dtype.is_floating_point:
                    return False
            elif a.dtype is not dtype:
                return False
            some_meta = some_meta or a.is_meta
        elif type(a) is complex:
            return False
    return some_meta


def _plain(kwargs: Any) -> bool:
    return all(isinstance(value, (int, float, str)) for value in kwargs.values()) if kwargs else True


def _of(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=x.dtype, device=_META)


def tells(*overloads: Any) -> Callable[[Formula], Formula]:
    """Register the formula of these overloads."""
    return registering(FORMULAS, overloads, "formulas")


def _pointwise(*args: Any, **kwargs: Any) -> torch.Tensor:
    first, shape = args[0], args[0].shape
    for t in args[1:]:
        if isinstance(t, torch.Tensor) and t.shape != shape:
            shape = np.broadcast_shapes(shape, t.shape)
    whole = next((t for t in args if isinstance(t, torch.Tensor) and t.shape == shape), first)
    return _of(first, shape) if whole.is_contiguous() or whole.shape != shape else torch.empty_like(whole)


def _in_place(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    fits = all(t.shape == args[0].shape for t in tensors)
    return args[0] if fits or np.broadcast_shapes(*[t.shape for t in tensors]) == args[0].shape else None


@tells(aten.convolution.default)
def _convolution(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> torch.Tensor | None:
    rank = w.ndim - 2
    stride, padding, dilation, extra = (
        list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation, extra)
    )
    channels = w.shape[0] // groups if transposed else w.shape[1]
    out = w.shape[1] * groups if transposed else w.shape[0]
    if x.ndim != w.ndim or x.shape[1] != channels * groups or (b is not None and b.shape != (out,)):
        return None
    space = []
    for i in range(rank):
        n, reach = x.shape[2 + i], dilation[i] * (w.shape[2 + i] - 1)
        if transposed:
            space.append((n - 1) * stride[i] - 2 * padding[i] + reach + extra[i] + 1)
        else:
            space.append((n + 2 * padding[i] - reach - 1) // stride[i] + 1)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty((x.shape[0], out, *space), dtype=x.dtype, device=_META, memory_format=torch.channels_last)
    return _of(x, (x.shape[0], out, *space))


@tells(aten.native_batch_norm.default)
def _batch_norm(x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, *args: Any) -> Any:
    size = x.shape[1:2]
    if any(p is not None and p.shape != size for p in (w, b, mean, var)):
        return None
    statistics = size if training else (0,)
    same = _of(x, x.shape) if x.is_contiguous() else torch.empty_like(x)
    return same, _of(x, statistics), _of(x, statistics)


@tells(aten.native_layer_norm.default)
def _layer_norm(x: Any, normalized: Sequence[int], w: Any, b: Any, eps: float) -> Any:
    sizes = tuple(normalized)
    lead = x.ndim - len(sizes)
    if x.shape[lead:] != sizes or any(p is not None and p.shape != sizes for p in (w, b)):
        return None
    statistics = (*x.shape[:lead], *[1] * len(sizes))
    return _of(x, x.shape), _of(x, statistics), _of(x, statistics)


@tells(aten._softmax.default, aten._safe_softmax.default)
def _softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor | None:
    return _of(x, x.shape) if -x.ndim <= dim < x.ndim and not dtype else None


@tells(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction)
def _reduced(x: torch.Tensor, dims: Any = None, keepdim: bool = False, correction: Any = None) -> torch.Tensor | None:
    gone = {d % x.ndim for d in dims or ()} if x.ndim else set()
    if not gone or len(gone) != len(dims) or min(dims) < -x.ndim or max(dims) >= x.ndim:
        return None
    return _of(x, [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone])


@tells(aten.cat.default)
def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    first = tensors[0]
    shape = list(first.shape)
    if not -len(shape) <= dim < len(shape) or any(t.ndim != len(shape) for t in tensors):
        return None
    dim %= len(shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    rest = [*first.shape[:dim], *first.shape[dim + 1 :]]
    usual = all([*t.shape[:dim], *t.shape[dim + 1 :]] == rest and t.is_contiguous() for t in tensors)
    return _of(first, shape) if usual else None


@tells(aten.linalg_vector_norm.default)
def _vector_norm(x: torch.Tensor, order: float = 2, dims: Any = None, keepdim: bool = False) -> torch.Tensor | None:
    return _reduced(x, dims, keepdim)


@tells(aten.mm.default)
def _mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    usual = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[0]
    return _of(x, (x.shape[0], w.shape[1])) if usual else None


@tells(aten.bmm.default)
def _bmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    usual = x.ndim == w.ndim == 3 and x.shape[0] == w.shape[0] and x.shape[2] == w.shape[1]
    return _of(x, (*x.shape[:2], w.shape[2])) if usual else None


@tells(aten.linear.default)
def _linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    usual = w.ndim == 2 and x.ndim and x.shape[-1] == w.shape[1] and (bias is None or bias.shape == w.shape[:1])
    return _of(x, (*x.shape[:-1], w.shape[0])) if usual else None


@tells(aten.addmm.default)
def _addmm(bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, **scales: float) -> torch.Tensor | None:
    return _mm(x, w) if w.ndim == 2 and bias.shape == w.shape[1:] else None


@tells(aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default, aten.upsample_nearest2d.default)
def _upsampled(x: torch.Tensor, size: Sequence[int], *args: Any) -> torch.Tensor | None:
    return _of(x, (*x.shape[:2], *size)) if x.ndim == 4 and x.is_contiguous() else None


def _pooled(
    x: torch.Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[int] | None:
    """Return the shape that windows over the last two dims of (b, c, h, w) leave; None where none fits."""
    kernel, stride, padding, dilation = (
        list(v) * (2 if len(v) == 1 else 1) for v in (kernel, stride or kernel, padding, dilation)
    )
    if x.ndim != 4 or not x.is_contiguous():
        return None
    shape = [*x.shape[:2]]
    for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        left = n + 2 * p - d * (k - 1) - 1
        count = (left + (s - 1) * ceil_mode) // s + 1
        if left < 0 or 2 * p > k:
            return None
        shape.append(count - (ceil_mode and (count - 1) * s >= n + p))  # the last one starts inside
    return shape


@tells(aten.avg_pool2d.default)
def _average_pooled(
    x: torch.Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), ceil_mode: bool = False, *args: Any
) -> torch.Tensor | None:
    shape = _pooled(x, kernel, stride, padding, (1,), ceil_mode)
    return None if shape is None else _of(x, shape)


@tells(aten.max_pool2d_with_indices.default)
def _max_pooled(
    x: torch.Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,), ceil_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor] | None:
    shape = _pooled(x, kernel, stride, padding, dilation, ceil_mode)
    return None if shape is None else (_of(x, shape), torch.empty(shape, dtype=torch.int64, device=_META))
