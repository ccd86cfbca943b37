"""The meta device: what shapes ops return, told without a kernel where that is easy.

Also keeps on the meta device what forward sends elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def meta_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, strides and class (parameter or not) on the meta device."""
    twin = torch.empty_like(value, device="meta", requires_grad=False)
    return torch.nn.Parameter(twin, requires_grad=False) if isinstance(value, torch.nn.Parameter) else twin


_aten = torch.ops.aten
UNDEFINED = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.randint, _aten.randperm}
"""Ops whose integers are not the same at every call."""
_FLOAT_POINTWISE = {
    _aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.mul, _aten.mul_, _aten.div, _aten.div_, _aten.relu, _aten.relu_,
    _aten.sigmoid, _aten.sigmoid_, _aten.tanh, _aten.gelu, _aten.silu, _aten.silu_, _aten.hardswish, _aten.hardswish_,
    _aten.hardsigmoid, _aten.hardsigmoid_, _aten.hardtanh, _aten.hardtanh_, _aten.leaky_relu, _aten.leaky_relu_,
    _aten.elu, _aten.elu_, _aten.sqrt, _aten.rsqrt, _aten.exp, _aten.neg,
}  # fmt: skip
"""Ops whose result, for floating operands of one dtype, has that dtype and the broadcast shape: no kernel is asked."""


def _pointwise(func: Any, args: Any) -> Any:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    first = tensors[0]
    if any(t.dtype != first.dtype for t in tensors[1:]) or not first.is_floating_point():
        return func(*args)
    shape = first.shape
    if any(t.shape != shape for t in tensors[1:]):
        shape = torch.Size(np.broadcast_shapes(*[t.shape for t in tensors]))
    if func._schema.is_mutable:
        return first if shape == first.shape else func(*args)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _convolution(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> torch.Tensor:
    rank = w.ndim - 2
    stride, padding, dilation, extra = (
        list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation, extra)
    )
    channels = w.shape[0] // groups if transposed else w.shape[1]
    if x.ndim != w.ndim or x.shape[1] != channels * groups:
        return torch.ops.aten.convolution.default(x, w, b, stride, padding, dilation, transposed, extra, groups)
    space = []
    for i in range(rank):
        n, reach = x.shape[2 + i], dilation[i] * (w.shape[2 + i] - 1)
        if transposed:
            space.append((n - 1) * stride[i] - 2 * padding[i] + reach + extra[i] + 1)
        else:
            space.append((n + 2 * padding[i] - reach - 1) // stride[i] + 1)
    out = w.shape[1] * groups if transposed else w.shape[0]
    return torch.empty((x.shape[0], out, *space), dtype=x.dtype, device="meta")


def _batch_norm(x: torch.Tensor, training: bool) -> tuple[torch.Tensor, ...]:
    same = torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else torch.empty_like(x)
    size = x.shape[1] if training else 0
    return same, *(torch.empty(size, dtype=x.dtype, device="meta") for _ in range(2))


def _mean(x: torch.Tensor, dims: Any, keepdim: bool = False) -> torch.Tensor:
    gone = {d % x.ndim for d in dims or ()}
    if not gone or len(gone) != len(dims) or min(dims) < -x.ndim or max(dims) >= x.ndim or not x.is_floating_point():
        return torch.ops.aten.mean.dim(x, dims, keepdim)
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _addmm(bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    usual = (
        x.ndim == w.ndim == 2
        and x.shape[1] == w.shape[0]
        and bias.shape == w.shape[1:]
        and bias.dtype == x.dtype == w.dtype
    )
    return (
        torch.empty((x.shape[0], w.shape[1]), dtype=x.dtype, device="meta")
        if usual
        else torch.ops.aten.addmm.default(bias, x, w)
    )


@functools.cache
def returns_fresh(func: Any) -> bool:
    """Say whether an op computes new tensors and touches none of its arguments."""
    schema = func._schema
    return (
        func is not _aten._unsafe_view.default  # a view, whatever its schema says
        and not schema.is_mutable
        and bool(schema.returns)
        and all(r.alias_info is None and str(r.type) == "Tensor" for r in schema.returns)
        and all(a.alias_info is None for a in schema.arguments)
    )


def _call_key(func: Any, args: Any) -> Any:
    """Describe a call by what its result's shape depends on; None where that cannot be told cheaply."""
    key: list[Any] = [func]
    for a in args:
        if isinstance(a, torch.Tensor):
            key += [a.shape, a.dtype]
        elif isinstance(a, (int, float, bool, type(None))):
            key.append(a)
        elif isinstance(a, (list, tuple)) and all(type(v) in (int, bool) for v in a):
            key.append(tuple(a))
        else:
            return None
    if any(isinstance(a, torch.Tensor) and not a.is_contiguous() for a in args):
        return None
    return tuple(key)


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Say whether an op makes tensors out of none, on a device that it is told."""
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def on_meta(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let an op that is told a device, or makes tensors, use the meta device."""
    if kwargs.get("device") is not None or _makes_tensors(func):
        return {**kwargs, "device": "meta"}
    return kwargs


class OnMeta(TorchDispatchMode):
    """Keep on the meta device what forward sends elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on the meta device."""
        return func(*args, **on_meta(func, kwargs or {}))


class Kernels:
    """Runs ops on meta tensors, and remembers what they returned for tensors of the same shapes."""

    def __init__(self) -> None:
        self._returned: dict[Any, tuple[bool, list[tuple[torch.Size, torch.dtype]]]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on meta tensors, or remember what it returned for tensors of these shapes."""
        if kwargs:
            return func(*args, **kwargs)
        if func.overloadpacket in _FLOAT_POINTWISE:
            return _pointwise(func, args)
        if func is _aten.native_batch_norm.default:
            return _batch_norm(args[0], args[5])
        if func is _aten.mean.dim:
            return _mean(*args)
        if func is _aten.addmm.default:
            return _addmm(*args)
        if func is _aten.convolution.default:
            return _convolution(*args)
        key = _call_key(func, args) if returns_fresh(func) else None
        if key is None:
            return func(*args)
        known = self._returned.get(key)
        if known is None:
            out = func(*args)
            if type(out) is torch.Tensor:
                self._returned[key] = (False, [(out.shape, out.dtype)])
            elif all(type(t) is torch.Tensor for t in out):
                self._returned[key] = (True, [(t.shape, t.dtype) for t in out])
            return out
        several, described = known
        made = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in described]
        return tuple(made) if several else made[0]
