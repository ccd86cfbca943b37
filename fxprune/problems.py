"""What a method that searches by itself is asked: a network, bounds, and the data it may look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fxprune.assuming import assume
from fxprune.calibrating import OUTPUTS, calibrate, split
from fxprune.calibrations import Calibration
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.tasks import Task


@dataclass(frozen=True, slots=True)
class Choice:
    """What a method that searches by itself may return, where it has trained the network as well.

    Attributes:
        keep: (channels,) bool, what to keep.
        weights: parameters and buffers after training, of the dense shapes; `compile` takes them over.
    """

    keep: np.ndarray
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Problem:
    """What `plan` asks of a method that chooses by itself.

    Attributes:
        coupling: the network; what the constraints keep is frozen in it.
        bounds: resource -> the most it may cost, absolute.
        constraints: limits on widths.
        calibration: batches, or what was gathered on them; None if none were given.
        tasks: name -> Task; None if none were given.
    """

    coupling: Coupling
    bounds: Mapping[str, float]
    constraints: Constraints
    calibration: Iterable[Any] | Calibration | None = None
    tasks: Mapping[str, Task] | None = None

    def data(self, method: object, *, moments: bool = False, losses: bool = True) -> Calibration:
        """Return batches and tasks to measure losses on, as a calibration; without moments unless they are wanted.

        Args:
            method: who asks, for the message.
            moments: what was gathered at every layer is wanted too.
            losses: tasks are needed; without it, the batches will do.

        Raises:
            PlanError: there are no batches or no tasks, or a calibration is of others.
        """
        name = type(method).__name__
        given = self.calibration
        if given is None:
            raise PlanError(
                f"{name} needs calibration batches: pass `calibration=[(inputs, targets), ...]`, or use "
                "`methods.Magnitude()`."
            )
        if losses and not (self.tasks or (given.tasks if isinstance(given, Calibration) else None)):
            raise PlanError(f"{name} needs tasks: pass `tasks={{'name': fxprune.Task(loss)}}`.")
        if not isinstance(given, Calibration):
            batches = list(given) if isinstance(given, Iterator) else given
            if moments:
                return gathered(self.coupling, method, batches, self.tasks)
            return Calibration.of_batches(self.coupling, batches, self.tasks)
        if given.batches is None:
            raise PlanError(
                f"{name} measures on batches, and a calibration that was loaded has none. Pass "
                "`calibration=[(inputs, targets), ...]`, or `dataclasses.replace(calibration, batches=batches)`."
            )
        known = agreed(self.coupling, given, self.tasks)
        if moments and losses and list(known.losses) != list(known.tasks or {}):
            raise PlanError(
                f"{name} has tasks {list(known.tasks or {})}, and the calibration is of {list(known.losses)}. "
                "Calibrate with the same tasks, or pass batches."
            )
        return known


def agreed(coupling: Coupling, calibration: Calibration, tasks: Mapping[str, Task] | None) -> Calibration:
    """Return a calibration with the tasks that count: those that are given, else its own.

    Losses and tolerances may be others than those it was gathered with; names and classes may not.

    Raises:
        PlanError: they are, or the calibration is of another network.
    """
    calibration.check_network(coupling)
    known, given = calibration.tasks or {}, tasks or calibration.tasks
    names = list(calibration.losses or known)
    if not given:
        return calibration
    if names and set(given) != set(names):
        before = "without tasks" if names == [OUTPUTS] else f"with the tasks {names}"
        raise PlanError(
            f"the calibration was gathered {before}, and the tasks are {list(given)}. Calibrate with the same tasks, "
            "or pass batches."
        )
    for name, task in known.items():
        if name in given and task.classes != given[name].classes:
            raise PlanError(
                f"the calibration was gathered for {_classes(task)} of task {name!r}, and the task is of "
                f"{_classes(given[name])}. Calibrate with the same tasks, or pass batches."
            )
    return replace(calibration, tasks={name: given[name] for name in names or given})


def _classes(task: Task) -> str:
    return "all classes" if task.classes is None else f"the classes {list(task.classes)}"


def gathered(
    coupling: Coupling,
    method: object,
    calibration: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
) -> Calibration:
    """Return what a method reads: a calibration as it is given, or gathered from batches, or assumed without data.

    Where tasks have tolerances, some batches are held out.

    Raises:
        PlanError: tasks without batches.
    """
    if isinstance(calibration, Calibration):
        return calibration
    if calibration is None and not tasks:
        return assume(coupling)
    batches = needed(method, calibration)
    by_class = getattr(method, "within", 1.0) != 1.0
    if all(task.tolerance is None for task in (tasks or {}).values()):
        return calibrate(coupling, batches, tasks, by_class=by_class)
    used, held_out = split(batches)
    return replace(calibrate(coupling, used, tasks, by_class=by_class), held_out=held_out)


def needed(method: object, calibration: Iterable[Any] | None) -> Iterable[Any]:
    """Return the batches.

    Raises:
        PlanError: there are none.
    """
    if calibration is None:
        raise PlanError(
            f"{method} needs calibration batches: pass `calibration=loader`, and `tasks={{'name': fxprune.Task(loss)}}`"
            " for the losses that count, or use `Magnitude()`."
        )
    return calibration
