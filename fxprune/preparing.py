"""A request but for its budgets, with what it is measured on: what sweeps and sensitivities do first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.calibrations import Calibration
from fxprune.choosing import Chooser
from fxprune.constraining import Constraints, constrain
from fxprune.coupling import Coupling
from fxprune.methods import AnyMethod, PathMethod, SearchMethod
from fxprune.problems import agreed, gathered
from fxprune.restricting import Restriction, restrict
from fxprune.tasks import Task


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its data read.

    Attributes:
        coupling: the network: without classes that no task wants, and what the constraints keep is frozen in it.
        restriction: what went with the classes; None where all are wanted.
        chooser: has the removal paths, and chooses for any bounds.
        known: what was gathered, or batches and tasks alone; None where no data were given.
        batches: to measure losses on: those held out, or all; None where there are none.
    """

    coupling: Coupling
    restriction: Restriction | None
    chooser: Chooser
    known: Calibration | None
    batches: Iterable[Any] | None


def prepare(
    coupling: Coupling,
    method: AnyMethod,
    data: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
    constraints: Constraints,
) -> Prepared:
    """Read the data of a request, once.

    Args:
        coupling: the network.
        method: ranks or chooses.
        data: batches that can be read again, or what `calibrate` has gathered.
        tasks: name -> Task.
        constraints: limits on widths.

    Raises:
        PlanError: the method lacks its data, or rows of classes cannot go.
    """
    if isinstance(data, Calibration):
        data = agreed(coupling, data, tasks)
        tasks = data.tasks
    restriction = restrict(coupling, tasks, data)
    if restriction is not None:
        coupling, data = restriction.part, restriction.cut(data)
    bound = constrain(coupling, constraints)
    reads = isinstance(method, (PathMethod, SearchMethod))
    known = None
    if isinstance(data, Calibration) or (data is not None and reads):
        known = gathered(coupling, method, data, tasks)
    elif data is not None:
        known = Calibration.of_batches(coupling, data, tasks)
    chooser = Chooser(bound, method, constraints, known if reads else data, tasks)
    return Prepared(bound, restriction, chooser, known, None if known is None else known.held_out or known.batches)
