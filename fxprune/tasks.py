"""Tasks: what each head of a network is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fxprune import sharing
from fxprune.errors import FxPruneError, PlanError
from fxprune.restoring import restored
from fxprune.subtasks import has_some, loss_on, part_of, renumbered, samples_where, targets_of
from fxprune.switching import Flowing
from fxprune.values import tensors_in

NO_BATCHES = "the calibration data has no batches. Pass a list or a DataLoader, not an exhausted iterator."
"""What is said where there is nothing to read."""


@dataclass(frozen=True, slots=True)
class Task:
    """One head's loss.

    Attributes:
        loss: `(outputs, batch) -> scalar tensor`, lower is better. `outputs` is what the network returns, `batch` is a
            calibration batch as it came.
        tolerance: how much the loss may get worse, relative (0.01 is one percent), right after the cut, on calibration
            batches that are held out; None for no bound.
        classes: the only classes that count, ascending; None for all. The loss is then asked for these alone, as if
            there were no others: it sees their rows of the outputs, the samples that are of one of them, and labels
            counted from 0. Positions of others, as in segmentation, are labelled -100, which `cross_entropy` ignores.
        slice_outputs: the slim network answers for these classes alone: row i of its output is class `classes[i]`.
        output: which output holds the classes, (b, classes, ..): its key, place or field; None where there is one.
        target: which entry of a batch's targets holds the labels; None where there is one. Labels are class numbers,
            an integer (b,) or (b, ..), or floating or bool (b, classes, ..), which classes a sample has.

    Example:
        >>> task = Task(lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]), classes=[2, 5])
        >>> labels = torch.tensor([2, 0, 5, 2])
        >>> task(torch.zeros(4, 10), (torch.zeros(4, 3), labels)) * 4 / 3  # log 2, over the three samples of 2 and 5
        tensor(0.6931)
    """

    loss: Callable[[Any, Any], torch.Tensor]
    tolerance: float | None = None
    classes: Sequence[int] | None = None
    slice_outputs: bool = False
    output: str | int | None = None
    target: str | int | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise PlanError(
                f"Task(loss={self.loss!r}) cannot be called. Pass a function `(outputs, batch) -> scalar tensor`."
            )
        self._check_classes()
        if self.tolerance is None:
            return
        if not isinstance(self.tolerance, (int, float)) or isinstance(self.tolerance, bool):
            raise PlanError(f"Task(tolerance={self.tolerance!r}) is no number. Pass a share such as 0.01, or None.")
        if not self.tolerance >= 0:
            raise PlanError(f"Task(tolerance={self.tolerance}) is negative or NaN. Pass a share such as 0.01, or None.")

    def __call__(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the loss: of the task's classes alone, where it has some.

        Args:
            outputs: what the network returns, for all classes or for these alone.
            batch: as it came, with all its samples and classes. Those left out count zero in the mean over the batch.
        """
        if self.classes is None:
            return self.loss(outputs, batch)
        return loss_on(self.loss, outputs, batch, self.classes, self.output, self.target)

    def _check_classes(self) -> None:
        if self.classes is None:
            if self.slice_outputs:
                raise PlanError("Task(slice_outputs=True) does not say which rows stay. Pass `classes=[...]`.")
            return
        classes = list(self.classes) if isinstance(self.classes, Iterable) else [None]
        numbers = [c for c in classes if isinstance(c, (int, np.integer)) and not isinstance(c, bool) and c >= 0]
        if not classes or len(numbers) < len(classes):
            raise PlanError(f"Task(classes={self.classes!r}) is not a list of class numbers. Pass `classes=[2, 5]`.")
        if any(a >= b for a, b in pairwise(numbers)):
            raise PlanError(
                f"Task(classes={classes}) is not ascending, and rows of outputs keep their order. Pass "
                f"`classes={sorted(set(numbers))}`."
            )
        object.__setattr__(self, "classes", tuple(int(c) for c in numbers))


def of_wanted_classes(batches: Iterable[Any], tasks: Mapping[str, Task] | None) -> Iterable[Any]:
    """Return batches without the samples that no task wants, labels as they came; the batches where all are wanted.

    Raises:
        PlanError: nothing is left.
    """
    if not tasks or any(task.classes is None for task in tasks.values()):
        return batches
    found = []
    for batch in batches:
        kinds = [renumbered(part_of(targets_of(batch), t.target, "target"), t.classes or ()) for t in tasks.values()]
        keep = torch.stack([has_some(labels) for labels in kinds]).any(0)
        if bool(keep.any()):
            found.append(samples_where(batch, keep))
    if not any(sharing.gather("samples of wanted classes", bool(found))):
        asked = {name: list(task.classes or ()) for name, task in tasks.items()}
        raise PlanError(f"no calibration sample is of the classes {asked}. Pass batches with samples of them.")
    return found


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Run a module in eval mode; afterwards it is as it was: its modes, and what `forward` writes to in it."""
    modes = {m: m.training for m in module.modules()}
    try:
        if any(modes.values()):
            module.eval()
        with restored(module):
            yield
    finally:
        for m, training in modes.items():
            if m.training != training:
                m.training = training


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword inputs of a batch.

    A batch is the inputs, or a pair `(inputs, targets)`; inputs are a tensor, a tuple of positional inputs or a dict of
    keyword inputs. Tensors in them ask for no gradient: they are data.
    """
    inputs = pytree.tree_map(_data, batch[0] if isinstance(batch, (tuple, list)) else batch)
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@contextmanager
def running_on(batch: Any) -> Iterator[None]:
    """Run a network on a batch.

    Raises:
        PlanError: it does not run, with its own words.
    """
    try:
        yield
    except (FxPruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in(inputs_of(batch)))
        raise PlanError(
            f"the network does not run on a calibration batch with inputs {found}: {type(error).__name__}: {error}. "
            "A batch is the inputs, or a pair `(inputs, targets)`; inputs are like the example inputs: a tensor, a "
            "tuple, or a dict of what forward takes by name and nothing else."
        ) from error


def _data(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def run_batch(module: torch.nn.Module, batch: Any, tasks: Mapping[str, Task]) -> dict[str, torch.Tensor]:
    """Run a batch and return each task's `loss(outputs, batch)`, the batch as it came.

    Gradients flow through all of the module, also through what it runs without: that a layer does not train says
    nothing of what its channels are worth.
    """
    args, kwargs = inputs_of(batch)
    with running_on(batch), Flowing() if torch.is_grad_enabled() else nullcontext():
        outputs = module(*args, **kwargs)
    losses = {}
    for name, task in tasks.items():
        loss = task(outputs, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise PlanError(
                f"the loss of task {name!r} returned {type(loss).__name__}, not a scalar tensor. Return `loss.mean()`."
            )
        losses[name] = loss.reshape(())
    return losses


def check_batches(batches: Any) -> None:
    """Check that data are batches, one after another.

    Raises:
        PlanError: they cannot be iterated, or are one batch alone: a tensor, a mapping, or tensors of several kinds.
    """
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise PlanError(f"the calibration is {batches!r}, which cannot be iterated. Pass a list of batches.")
    members = batches if isinstance(batches, (list, tuple)) else ()
    kinds = {(t.dtype, t.ndim) if isinstance(t, torch.Tensor) else None for t in members}
    if isinstance(batches, (torch.Tensor, Mapping)) or (None not in kinds and len(kinds) > 1):
        raise PlanError(
            "the calibration is a single batch, and batches were expected, one after another. Pass a list of batches, "
            "such as `[batch]`."
        )
