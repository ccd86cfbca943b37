"""How much each task feels it when one group alone shrinks: what a method expects, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from fxprune import agreeing, notebooks, sharing
from fxprune.calibrations import Calibration
from fxprune.choosing import probe_of
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.errors import PlanError, check_kind
from fxprune.grouping import Group
from fxprune.methods import AnyMethod, SearchMethod, default_method
from fxprune.paths import RemovalPath
from fxprune.planning import check_settings
from fxprune.plans import frozen
from fxprune.preparing import prepare
from fxprune.probing import rises_alone
from fxprune.tasks import Task

SHARES = (0.25, 0.5, 0.75)
"""Which shares of a group go when it is measured."""
SAMPLES = 256
"""How many samples losses are measured on, if there are so many."""
WHOLE, ERROR = "outputs", "error"
"""What stands for tasks where there are none, and where a method does not tell them apart."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What it costs to shrink one group alone.

    Attributes:
        name: the first parameter of the group.
        kind: as of the group.
        widths: (steps + 1,) descending; the first is the dense width.
        errors: (steps + 1, columns) what the method expects at each width, from 0 on.
    """

    name: str
    kind: str
    widths: np.ndarray
    errors: np.ndarray

    @property
    def width(self) -> int:
        """Of the dense network."""
        return int(self.widths[0])

    def at(self, width: int) -> np.ndarray:
        """Return (columns,) what the method expects at a width, between two steps in proportion."""
        return np.array([np.interp(width, self.widths[::-1], column[::-1]) for column in self.errors.T])


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What it costs each task when one group alone shrinks. Made by `sensitivity`; prints as a table, a row per group.

    Attributes:
        curves: what the method expects at every width, group by group in graph order.
        columns: what the method tells errors of: the tasks, or "error" where it tells one number.
        comparable: whether these errors are in one unit for all groups.
        tasks: of which losses were measured; "outputs" where there are no tasks, for the squared change of the outputs
            relative to their size; none where there was nothing to measure on.
        shares: which shares of a group went.
        rises: (groups, shares, tasks) relative rise of the loss, less what follows from its slope in the outputs, which
            is noise. NaN where a group cannot lose that share.
        method: how channels are ranked.
    """

    curves: tuple[Curve, ...]
    columns: tuple[str, ...]
    comparable: bool
    tasks: tuple[str, ...]
    shares: tuple[float, ...]
    rises: np.ndarray
    method: str

    def __len__(self) -> int:
        return len(self.curves)

    def __iter__(self) -> Iterator[Curve]:
        return iter(self.curves)

    def __getitem__(self, group: int) -> Curve:
        return self.curves[group]

    def __str__(self) -> str:
        headers = ["group", "first site", "width"]
        headers += [f"{task} -{share:.0%}" for task in self.tasks for share in self.shares]
        rows = [
            [i, curve.name, curve.width, *(_percent(rise) for rise in self.rises[i].T.ravel())]
            for i, curve in enumerate(self.curves)
        ]
        return tabulate(rows, headers, colalign=("right", "left", *["right"] * (len(headers) - 2)))

    def _repr_html_(self) -> str:
        return notebooks.sensitivity_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; None for what was not measured."""
        rises = [[[None if np.isnan(rise) else rise for rise in row] for row in rows] for rows in self.rises.tolist()]
        return {
            "method": self.method,
            "tasks": list(self.tasks),
            "shares": list(self.shares),
            "columns": list(self.columns),
            "groups": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "widths": c.widths.tolist(),
                    "errors": c.errors.tolist(),
                    "rises": rises[i],
                }
                for i, c in enumerate(self.curves)
            ],
        }


def _percent(rise: float) -> str:
    return "" if np.isnan(rise) else f"{rise:.2%}"


@torch.inference_mode(False)
@sharing.together("sensitivity")
def sensitivity(
    coupling: Coupling,
    *,
    method: AnyMethod | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    tasks: Mapping[str, Task] | None = None,
    constraints: Constraints | None = None,
    shares: Sequence[float] = SHARES,
    samples: int = SAMPLES,
) -> Sensitivity:
    """Shrink each group alone, and tell what that costs each task: what the method expects, and what is measured.

    Channels go in the order of the method, and where it corrects the weights that stay, they are corrected. Several
    ranks share the work as they do in `plan`.

    Args:
        coupling: from `couple`.
        method: as of `plan`, but not one that searches by itself.
        calibration: as of `plan`; losses are measured on its batches, on those held out where tasks have tolerances.
            Without it, nothing is measured.
        tasks: as of `plan`.
        constraints: as of `plan`.
        shares: which shares of a group's channels go, between 0 and 1.
        samples: how many samples losses are measured on, at most: the first ones.

    Raises:
        PlanError: the method has no removal paths, lacks its data, or a share is not between 0 and 1.

    Example:
        >>> found = fxprune.sensitivity(coupling, calibration=batches, tasks=tasks)  # doctest: +SKIP
        >>> fxprune.draw_sensitivity(found, "sensitivity.png")  # doctest: +SKIP
    """
    check_kind(coupling, Coupling)
    check_settings(method, calibration, tasks, constraints)
    method, constraints = method or default_method(calibration), constraints or Constraints()
    if isinstance(method, SearchMethod):
        raise PlanError(
            f"{type(method).__name__} searches by itself and has no removal paths. Pass `method=methods.Joint()` or "
            "`methods.Magnitude()`."
        )
    if not all(0 < share < 1 for share in shares):
        raise PlanError(f"shares={list(shares)!r} are not all between 0 and 1. Pass some, such as `[0.25, 0.5]`.")
    agreeing.check_same_request(tasks, method=method, constraints=constraints, shares=list(shares), samples=samples)
    agreeing.check_network(coupling)
    data = list(calibration) if isinstance(calibration, Iterator) else calibration
    ready = prepare(coupling, method, data, tasks, constraints)
    paths, known, batches = ready.chooser.paths, ready.known, ready.batches
    groups = ready.coupling.groups()
    curves = tuple(_curve(groups[path.group], path) for path in paths)
    measured: tuple[str, ...] = ()
    rises = np.empty((len(paths), len(shares), 0))
    if known is not None and batches is not None:
        probe = probe_of(ready.coupling, method, known, batches, samples)
        rises = rises_alone(probe, paths, shares)
        measured = tuple(known.tasks or (WHOLE,))
    names = tuple(known.losses) if known is not None else ()
    columns = names if len(names) > 1 and all(len(names) == curve.errors.shape[1] for curve in curves) else (ERROR,)
    optimal = method.scope == "optimal"
    return Sensitivity(curves, columns, optimal, measured, tuple(shares), frozen(rises), repr(method))


def _curve(group: Group, path: RemovalPath) -> Curve:
    steps = np.arange(len(path.choices) + 1)
    errors = np.concatenate([np.zeros((1, path.errors.shape[1])), np.cumsum(path.errors, axis=0)])
    return Curve(group.name, group.kind, frozen(group.width - sum(path.takes) * steps), frozen(errors))
