"""Follow a small module of the user's, such as a batch norm with its activation, without the dispatcher.

Its forward is run on a tensor without data, and each function that it calls is looked up in the table of `calling`.
Where there is one that is not in the table, or asks for a value, nothing is said, and the module has to be run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.calling import Call, call_of_torch_function, is_hooked
from fxprune.cloning import clone, modules_in
from fxprune.telling import told

_ASKED = {torch._assert, torch.Tensor.dim, torch.Tensor.size}
_ASKED |= {getattr(torch.Tensor, name).__get__ for name in ("ndim", "shape", "dtype")}
"""What a tensor with data answers as one without."""

Made = tuple[Call, Any]
"""A call, and what it returned."""


class _UnknownCallError(Exception):
    """A function was called that is not in the table."""


class _Follower(TorchFunctionMode):
    """Notes the ATen calls that functions make, and returns what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []
        self.lost = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            return func(*args, **(kwargs or {}))
        call = None if self.lost else call_of_torch_function(func, args, kwargs or {})
        out = None if call is None else told(*call, {})
        if call is None or out is None:
            self.lost = True  # forward may catch what is raised here
            raise _UnknownCallError
        self.made.append((call, out))
        return out if isinstance(out, torch.Tensor) else out[0]


def follow(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[Made]] | None:
    """Return what a module returns for a tensor on the meta device, and the ATen calls that it makes to get there.

    Args:
        module: with its own parameters, which are not read; not touched.
        x: what goes in.

    Returns:
        The result, and the calls in order; None where only running the module tells.
    """
    if any(is_hooked(m) for _, m in modules_in(module)):
        return None
    follower = _Follower()
    try:
        with follower:
            result = clone(module)(x)
    except Exception:
        return None  # running it tells what is wrong, if anything is
    if follower.lost or not follower.made or not isinstance(result, torch.Tensor):
        return None
    return result, follower.made
