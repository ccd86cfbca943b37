"""Attention as one kernel: the memory of the ops that it stands for is only taken where it cannot be used."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fxprune.labelling import Labelling


class Attending(TorchFunctionMode):
    """Follow attention op by op, and note that torch has one kernel for it as long as queries and values are as wide.

    That kernel lays its result out with the heads next to their dims, so that merging them needs no copy.
    """

    def __init__(self, mode: Labelling) -> None:
        """Watch what runs under `mode`."""
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; its buffers, where it is attention, are there only if the kernel is not."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        buffers = self._mode.record.buffers
        first = len(buffers)
        out = func(*args, **kwargs)
        operands = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
        q, v = operands[0], operands[2]
        if out.ndim != 4 or _drops(args, kwargs):
            return out
        widths = self._mode.term(q, 3), self._mode.term(v, 3)
        out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        for buffer in buffers[first:-1]:
            buffer.unlike = widths
        return out


def _drops(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
