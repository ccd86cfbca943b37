"""The meta device: what shapes ops return, told without a kernel where that is easy.

Also keeps on the meta device what forward sends elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.telling import told


def meta_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, strides and class (parameter or not) on the meta device."""
    twin = torch.empty_like(value, device="meta", requires_grad=False)
    return torch.nn.Parameter(twin, requires_grad=False) if isinstance(value, torch.nn.Parameter) else twin


_aten = torch.ops.aten
UNDEFINED = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.randint, _aten.randperm}
"""Ops whose integers are not the same at every call."""


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


class Kernels:
    """Runs ops on meta tensors, and remembers what they returned for tensors of the same shapes."""

    def __init__(self) -> None:
        self._returned: dict[Any, tuple[bool, list[tuple[torch.Size, torch.dtype]]]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on meta tensors, or tell or remember what it returns for tensors of these shapes."""
        found = told(func, args, kwargs)
        if found is not None:
            return found
        if kwargs:
            return func(*args, **kwargs)
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


class OnMeta(TorchDispatchMode):
    """Keep on the meta device what forward sends elsewhere."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would wrap each call, to keep torch.compile away, which never comes here

    def __init__(self) -> None:
        super().__init__()
        self._kernels = Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on the meta device."""
        return self._kernels.run(func, args, on_meta(func, kwargs or {}))
