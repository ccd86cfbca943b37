"""Copy the structure of a module, with other tensors in it: much faster than `copy.deepcopy`, and no weight is copied."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_ATOMIC = {int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size}
_TABLES = {dict, set, OrderedDict}


def clone(module: nn.Module, tensors: Mapping[int, torch.Tensor]) -> Any:
    """Return a module of the same structure.

    Submodules, hook tables and attributes are new objects; classes and functions are shared.

    Args:
        module: any module; not touched.
        tensors: id of a parameter, buffer or tensor attribute -> what takes its place; others are shared.
    """
    return _clone(module, dict(tensors))


def _clone(module: nn.Module, memo: dict[int, Any]) -> Any:
    known = memo.get(id(module))
    if known is not None:
        return known
    kind = type(module)
    if _copies_itself(kind):
        return copy.deepcopy(module, memo)
    new = object.__new__(kind)
    memo[id(module)] = new
    state: dict[str, Any] = {}
    for key, value in vars(module).items():
        kind = type(value)
        if kind in _ATOMIC:
            state[key] = value
        elif kind in _TABLES and not value:
            state[key] = kind()
        elif key in ("_parameters", "_buffers"):
            state[key] = {k: None if t is None else memo.get(id(t), t) for k, t in value.items()}
        elif key == "_modules":
            state[key] = {k: None if m is None else _clone(m, memo) for k, m in value.items()}
        elif isinstance(value, torch.Tensor):
            state[key] = memo.get(id(value), value)
        elif kind in (tuple, list) and all(type(v) in _ATOMIC for v in value):
            state[key] = kind(value)
        else:
            state[key] = copy.deepcopy(value, memo)
    new.__dict__.update(state)
    return new


@functools.cache
def _copies_itself(kind: type[nn.Module]) -> bool:
    """Say whether a class has a way of its own to be copied (fx graphs, recurrent layers and their flat weights)."""
    home = next(c for c in kind.__mro__ if "__setstate__" in vars(c))
    plain = home is nn.Module or home is nn.modules.conv._ConvNd
    return hasattr(kind, "__deepcopy__") or not plain
