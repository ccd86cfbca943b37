"""Seconds of forward passes: networks take turns, so that whatever else the machine does disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError
from fxprune.tasks import evaluating
from fxprune.tracing import checked_inputs

WARM_UP = 3
"""Rounds that are not counted."""


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what tells seconds once the device is done.

    On one thread of the CPU that is the time this thread has computed: what else runs does not count.
    """
    if device.type == "cuda":

        def clock() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return clock
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def device_of(network: nn.Module) -> torch.device:
    """Return the device that a network is on: that of its first parameter or buffer."""
    tensors = [*network.parameters(), *network.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@torch.no_grad()
def take_turns(
    networks: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rounds: int,
    device: torch.device,
) -> np.ndarray:
    """Return (networks, rounds) seconds of a forward pass, of all networks in turn, each first as often as last.

    They run in eval mode; afterwards they are as they were.

    Args:
        networks: modules, or what runs one that is among them.
        args: positional inputs.
        kwargs: keyword inputs.
        rounds: how often each runs, after a warm-up.
        device: of the networks.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    clock = clock_of(device)
    seconds = np.empty((len(networks), rounds))
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, nn.Module):
                stack.enter_context(evaluating(network))
        for turn in range(-WARM_UP, rounds):
            for i in range(len(networks))[:: 1 if turn % 2 else -1]:
                fresh = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                start = clock()
                networks[i](*fresh[0], **fresh[1])
                if turn >= 0:
                    seconds[i, turn] = clock() - start
    return seconds


@dataclass(frozen=True, slots=True)
class MeasuredLatency:
    """Milliseconds of forward passes of two networks that took turns. Made by `measure_latency`.

    Attributes:
        before: (rounds,) of the first network.
        after: (rounds,) of the second, each right beside one of the first.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def share(self) -> float:
        """Median over the pairs of after / before."""
        return median(self._ratios())

    @property
    def change(self) -> float:
        """Median over the pairs of after / before - 1."""
        return self.share - 1

    def quartiles(self) -> dict[str, list[float]]:
        """Return first quartile, median and third quartile, in milliseconds, `before` and `after`, and of `share`."""
        return {
            "before": quantiles(self.before),
            "after": quantiles(self.after),
            "share": quantiles(self._ratios()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"pairs": len(self.before), "quartiles": self.quartiles(), "share": self.share}

    def __str__(self) -> str:
        low, middle, high = self.quartiles()["share"]
        return (
            f"{median(self.before):.2f} ms before, {median(self.after):.2f} ms after: {middle:.1%} "
            f"({low:.1%} .. {high:.1%}) of {len(self.before)} pairs"
        )

    def _ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.after, self.before, strict=True)]


def measure_latency(before: nn.Module, after: nn.Module, example_inputs: Any, *, rounds: int = 50) -> MeasuredLatency:
    """Measure forward passes of two networks, in eval mode and without gradients, taking turns after a warm-up.

    On one thread (`torch.set_num_threads(1)`) it is that thread's computing time, which other programs disturb least;
    else the time that passes. The networks stay as they are, even if `forward` writes to buffers.

    Args:
        before: such as the dense network.
        after: such as the slim network, on the same device.
        example_inputs: as for `compile`.
        rounds: how often each runs; at least 2.

    Raises:
        PlanError: too few rounds, or two devices.
        TraceError: the networks do not take the inputs.
    """
    if rounds < 2:
        raise PlanError(f"rounds={rounds!r} gives no spread. Pass 2 or more.")
    device, other = device_of(before), device_of(after)
    if device != other:
        raise PlanError(f"one network is on {device}, the other on {other}. Move both to one device.")
    args, kwargs = checked_inputs(before, example_inputs)
    seconds = take_turns([before, after], args, kwargs, rounds, device) * 1e3
    return MeasuredLatency(*(tuple(row) for row in seconds.tolist()))
