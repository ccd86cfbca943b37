"""Layers and batch norms as function modes see them: graphs of torch.export call ATen, others torch's own functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

aten = torch.ops.aten

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_EPS = 1e-5  # of `torch.nn.functional.batch_norm`, where it is not told
_SAME_ARGUMENTS = {
    aten.linear.default: F.linear,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.conv3d.default: torch.conv3d,
    aten.conv1d.padding: torch.conv1d,
    aten.conv2d.padding: torch.conv2d,
    aten.conv3d.padding: torch.conv3d,
}
_BATCH_NORM_OF_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


def as_function(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[Any, Any, dict[str, Any]]:
    """Return the call of an ATen op as that of torch's function for it; another call is returned as it is.

    A batch norm has all arguments by name then, however it was called, and always an `eps`.
    """
    kwargs = dict(kwargs or {})
    if func is F.batch_norm or func is aten.batch_norm.default:
        names = _BATCH_NORM if func is F.batch_norm else _BATCH_NORM_OF_ATEN
        given = {"eps": _EPS} | dict(zip(names, args, strict=False)) | kwargs
        return F.batch_norm, (), {name: given[name] for name in _BATCH_NORM if name in given}
    return _SAME_ARGUMENTS.get(func, func), args, kwargs
