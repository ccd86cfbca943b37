"""Put back what a network writes to itself when it runs: counters, moving averages, caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from fxprune.cloning import modules_in, plain_tensors


class _Held(NamedTuple):
    """A buffer or tensor attribute of a module, and what is in it."""

    module: nn.Module
    name: str
    tensor: torch.Tensor | None
    value: torch.Tensor | None
    made_by: object

    @classmethod
    def of(cls, module: nn.Module, name: str, t: torch.Tensor | None) -> _Held:
        """Copy what is in a tensor."""
        if t is None:
            return cls(module, name, None, None, None)
        return cls(module, name, t, t.detach().clone() if t.layout is torch.strided else None, t.grad_fn)

    def put_back(self) -> None:
        """Let the module hold the same tensor again, with the same numbers in it and no history."""
        t = self.tensor
        if getattr(self.module, self.name, None) is not t:
            setattr(self.module, self.name, t)
        if t is None:
            return
        if t.grad_fn is not self.made_by:
            t.detach_()
        if self.value is not None and not (t.is_meta or torch.equal(t.detach(), self.value)):
            with torch.inference_mode(t.is_inference()), torch.no_grad():
                t.detach().copy_(self.value)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards all buffers and tensor attributes hold what they held: `forward` may write to them.

    In eval mode layers of torch.nn write to none, and are not looked at.
    """
    held = [
        _Held.of(m, name, t)
        for _, m in modules_in(module)
        if not _is_layer(m)
        for name, t in [*m._buffers.items(), *plain_tensors(m).items()]
    ]
    try:
        yield
    finally:
        for each in held:
            each.put_back()


def _is_layer(module: nn.Module) -> bool:
    kind = type(module)
    return kind is not nn.Module and kind.__module__.startswith("torch.nn.")
