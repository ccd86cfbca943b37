"""A sweep: plans for many budgets from one calibration, and what each costs every task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from fxprune import agreeing, notebooks, sharing
from fxprune.budgets import Budget
from fxprune.calibrations import Calibration
from fxprune.choosing import probe_of
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.errors import PlanError, check_kind
from fxprune.methods import AnyMethod, default_method
from fxprune.planning import check_request, counted, plan_of
from fxprune.plans import Plan
from fxprune.preparing import prepare
from fxprune.probing import Probe
from fxprune.tasks import Task


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of a sweep.

    Attributes:
        plan: what stays.
        rises: task -> relative rise of its loss, right after the cut and, where the method does so, with the weights
            corrected; empty where there was nothing to measure on.
    """

    plan: Plan
    rises: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The curve of budgets. Made by `sweep`; prints as a table, one row per budget.

    Attributes:
        points: at least one, in the order the budgets were given.
    """

    points: tuple[Point, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __getitem__(self, index: int) -> Point:
        return self.points[index]

    def __str__(self) -> str:
        tasks = list(self.points[0].rises)
        names = list(self.points[0].plan.costs.before.to_dict())
        rows = [
            [*(f"{p.plan.costs.share(name):.1%}" for name in names), *(f"{p.rises[t]:+.1%}" for t in tasks)]
            for p in self.points
        ]
        return tabulate(rows, [*names, *(f"{task} loss" for task in tasks)], colalign=["right"] * len(rows[0]))

    def _repr_html_(self) -> str:
        return notebooks.sweep_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        points = [
            {
                "budget": dict(p.plan.budget),
                "costs": {"before": p.plan.costs.before.to_dict(), "after": p.plan.costs.after.to_dict()},
                "rises": dict(p.rises),
            }
            for p in self.points
        ]
        return {"points": points}


@torch.inference_mode(False)
@sharing.together("sweep")
def sweep(
    coupling: Coupling,
    budgets: Iterable[Budget],
    *,
    method: AnyMethod | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    tasks: Mapping[str, Task] | None = None,
    constraints: Constraints | None = None,
) -> Sweep:
    """Plan for many budgets; the data are read once. Several ranks share the work as they do in `plan`.

    Args:
        coupling: from `couple`.
        budgets: such as `[Budget(macs=m) for m in (0.7, 0.5, 0.3)]`.
        method: as of `plan`.
        calibration: as of `plan`; losses are measured on its batches, on those held out where tasks have tolerances.
        tasks: as of `plan`.
        constraints: as of `plan`.

    Raises:
        PlanError: no budget, or one that cannot be met; see `plan`.
    """
    check_kind(coupling, Coupling)
    asked = [] if isinstance(budgets, Budget) else list(budgets)
    if not asked:
        found = "one budget, not several" if isinstance(budgets, Budget) else "no budgets"
        raise PlanError(f"sweep() was given {found}. Pass a list, such as `[fxprune.Budget(macs=0.5)]`.")
    for budget in asked:
        check_request(budget, method, calibration, tasks, constraints)
    method, constraints = method or default_method(calibration), constraints or Constraints()
    data = list(calibration) if isinstance(calibration, Iterator) else calibration
    agreeing.check_same_request(tasks, method=method, budgets=asked, constraints=constraints)
    agreeing.check_network(coupling)
    coupling = counted(coupling, *asked)
    dense = coupling.costs.dense
    ready = prepare(coupling, method, data, tasks, constraints)
    restriction, known = ready.restriction, ready.known
    probe = None if known is None or ready.batches is None else probe_of(ready.coupling, method, known, ready.batches)
    points = []
    for budget in asked:
        keep = ready.chooser.keep(budget.bounds(dense))
        plan = agreeing.check_plan(plan_of(ready.coupling, keep, method=repr(method), budget=budget.to_dict()))
        rises = {} if probe is None else _rises(probe, keep, known)
        points.append(Point(plan if restriction is None else restriction.widened(plan), rises))
    return Sweep(tuple(points))


def _rises(probe: Probe, keep: np.ndarray, known: Calibration | None) -> dict[str, float]:
    """Return the relative rise of each task's loss; without tasks, the change of the outputs."""
    losses = probe.losses(keep)
    if known is None or not known.tasks:
        return {"outputs": float(losses[0])}
    rises = (losses - probe.dense) / np.maximum(np.abs(probe.dense), 1e-12)
    return dict(zip(known.tasks, rises.tolist(), strict=True))
