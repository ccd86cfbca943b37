"""Peak memory of a forward pass by two instruments: torch's own record of its allocator, and the operating system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def held(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Return the bytes of all parameters, buffers and inputs, shared ones once."""
    storages = {
        s._cdata: s.nbytes()
        for s in (t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *inputs))
    }  # fmt: skip
    return sum(storages.values())


def allocated(model: nn.Module, *inputs: Tensor) -> int:
    """Return the most bytes that torch's allocator had handed out at a time, with what a forward pass starts from."""
    with torch.no_grad():
        model(*inputs)  # what is made once does not count
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            model(*inputs)
    live = most = 0
    for event in profile.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return held(model, inputs) + most


def resident() -> int:
    """Return the resident bytes of this process, its peak forgotten. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak resident bytes since `resident` was last called. Linux only."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
