"""Tasks: what each head of a network is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.errors import PlanError


@dataclass(frozen=True, slots=True)
class Task:
    """One head's loss.

    Attributes:
        loss: `(outputs, batch) -> scalar tensor`, lower is better. `outputs` is what the network returns, `batch` is a
            calibration batch as it came.
        tolerance: how much the loss may get worse, relative (0.01 is one percent), right after the cut, on calibration
            batches that are held out; None for no bound.
    """

    loss: Callable[[Any, Any], torch.Tensor]
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise PlanError(
                f"Task(loss={self.loss!r}) cannot be called. Pass a function `(outputs, batch) -> scalar tensor`."
            )
        if self.tolerance is None:
            return
        if not isinstance(self.tolerance, (int, float)) or isinstance(self.tolerance, bool):
            raise PlanError(f"Task(tolerance={self.tolerance!r}) is no number. Pass a share such as 0.01, or None.")
        if not self.tolerance >= 0:
            raise PlanError(f"Task(tolerance={self.tolerance}) is negative or NaN. Pass a share such as 0.01, or None.")


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Run a module in eval mode; afterwards every module in it is in the mode it was in."""
    modes = {m: m.training for m in module.modules()}
    try:
        if any(modes.values()):
            module.eval()
        yield
    finally:
        for m, training in modes.items():
            if m.training != training:
                m.training = training


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword inputs of a batch.

    A batch is the inputs, or a pair `(inputs, targets)`; inputs are a tensor, a tuple of positional inputs or a dict of
    keyword inputs.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def run_batch(module: torch.nn.Module, batch: Any, tasks: Mapping[str, Task]) -> dict[str, torch.Tensor]:
    """Run a batch and return each task's `loss(outputs, batch)`, the batch as it came."""
    args, kwargs = inputs_of(batch)
    outputs = module(*args, **kwargs)
    losses = {}
    for name, task in tasks.items():
        loss = task.loss(outputs, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise PlanError(
                f"the loss of task {name!r} returned {type(loss).__name__}, not a scalar tensor. Return `loss.mean()`."
            )
        losses[name] = loss.reshape(())
    return losses
