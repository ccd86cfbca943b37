"""What stays, for any bounds: methods, allocators and tolerances at work together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.allocating import allocate
from fxprune.branches import costs_of
from fxprune.calibrating import split
from fxprune.calibrations import Calibration
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.guarding import Guard
from fxprune.methods import AnyMethod, Method, PathMethod, SearchMethod, corrects, damping_of
from fxprune.paths import RemovalPath, paths_by_score
from fxprune.probing import Probe
from fxprune.problems import Choice, Problem, gathered, needed
from fxprune.tasks import Task


class Chooser:
    """A request but for its budget: what does not depend on that is done once."""

    def __init__(
        self,
        coupling: Coupling,
        method: AnyMethod,
        constraints: Constraints,
        calibration: Iterable[Any] | Calibration | None,
        tasks: Mapping[str, Task] | None,
    ) -> None:
        """Gather what the method reads.

        Args:
            coupling: the network; what the constraints keep is frozen in it.
            method: ranks or chooses.
            constraints: limits on widths.
            calibration: batches, or what was gathered on them; None if none were given.
            tasks: name -> Task; None if none were given.

        Raises:
            PlanError: the method lacks its data.
        """
        self.coupling = coupling
        self._method = method
        self._constraints = constraints
        self._tasks = tasks
        self._data = calibration
        self._paths: Sequence[RemovalPath] = ()
        self._search: Callable[[Mapping[str, float]], np.ndarray | Choice] | None = None
        found: Calibration | None = None
        if isinstance(method, PathMethod):
            found = self._data = gathered(coupling, method, calibration, tasks)
            self._paths = method.paths(coupling, found, None)
        elif isinstance(calibration, Calibration):
            found = calibration
        elif any(task.tolerance is not None for task in (tasks or {}).values()):
            used, held_out = split(needed(method, calibration))
            found = Calibration.of_batches(coupling, used, tasks, held_out)
            self._data = used
        if not isinstance(method, (PathMethod, SearchMethod)):
            if isinstance(self._data, Calibration):
                self._data, tasks = _batches_of(method, self._data), tasks or self._data.tasks
            self._paths = paths_by_score(coupling, _scores(coupling, method, self._data, tasks))
        self._weights: dict[bytes, Mapping[str, torch.Tensor]] = {}
        self._guard = None if found is None else _guard(coupling, method, found)

    @property
    def paths(self) -> Sequence[RemovalPath]:
        """The removal path of every group; none of a method that searches by itself."""
        return self._paths

    def keep(self, bounds: Mapping[str, float], *, closest: bool = False) -> np.ndarray:
        """Return what stays, (channels,), within bounds and tolerances.

        Args:
            bounds: resource -> the most it may cost, absolute.
            closest: where not both can be met, what comes closest within the tolerances.

        Raises:
            PlanError: the bounds cannot be met, or not within the tolerances.
        """
        if self._guard is None:
            return self._choose(bounds, np.ones(1))
        return self._guard.choose(self._choose, self.coupling.costs, bounds, closest=closest)

    def weights(self, keep: np.ndarray) -> Mapping[str, torch.Tensor] | None:
        """Return the weights that the method has trained for a choice; None where it has trained none."""
        return self._weights.get(keep.tobytes())

    def _choose(self, bounds: Mapping[str, float], weights: np.ndarray) -> np.ndarray:
        method, constraints = self._method, self._constraints
        if isinstance(method, SearchMethod):
            found = self._searched(bounds)
            keep = _checked(method, found.keep if isinstance(found, Choice) else found, self.coupling, bounds)
            if isinstance(found, Choice):
                self._weights[keep.tobytes()] = found.weights
            return keep
        paths = self._paths
        if isinstance(method, PathMethod):
            assert isinstance(self._data, Calibration)
            for _ in range(method.rounds - 1):
                keep = allocate(self.coupling, [p.weighed(weights) for p in paths], method.scope, constraints, bounds)
                paths = method.paths(self.coupling, self._data, keep)
        return allocate(self.coupling, [p.weighed(weights) for p in paths], method.scope, constraints, bounds)

    def _searched(self, bounds: Mapping[str, float]) -> np.ndarray | Choice:
        """Ask a method that searches by itself; one that can go on from what it was asked before does so."""
        method = self._method
        assert isinstance(method, SearchMethod)
        problem = Problem(self.coupling, bounds, self._constraints, self._data, self._tasks)
        start = getattr(method, "start", None)
        if self._search is None and start is not None:
            self._search = start(problem)
        return method.choose(problem) if self._search is None else self._search(bounds)


def _batches_of(method: Method, calibration: Calibration) -> Iterable[Any]:
    """Return the batches of a calibration, for a method that reads nothing else."""
    if calibration.batches is None:
        raise PlanError(
            f"{method} reads batches, and a calibration that was loaded has none. Pass a list of batches or a "
            "DataLoader."
        )
    return calibration.batches


def _guard(coupling: Coupling, method: AnyMethod, found: Calibration) -> Guard | None:
    """Return what checks the tolerances of tasks; None where there are none."""
    limits = {name: task.tolerance for name, task in (found.tasks or {}).items()}
    if all(limit is None for limit in limits.values()):
        return None
    if not found.held_out:
        raise PlanError(
            "tolerances are checked on data that are held out, and this calibration has none. Pass batches as "
            "`calibration=`, or `dataclasses.replace(calibration, held_out=other_batches)`."
        )
    return Guard(probe_of(coupling, method, found, found.held_out), limits)


def probe_of(
    coupling: Coupling,
    method: AnyMethod,
    calibration: Calibration,
    batches: Iterable[Any],
    samples: int | None = None,
) -> Probe:
    """Return what measures a method's choices on some batches: with the weights corrected, where the method does so.

    Args:
        coupling: of the network.
        method: whose choices are measured.
        calibration: what was gathered.
        batches: to measure on.
        samples: how many of them, at most; None for all.
    """
    damping, compensate = damping_of(method), corrects(method)
    return Probe(coupling, calibration, samples=samples, damping=damping, compensate=compensate, batches=batches)


def _checked(method: SearchMethod, found: Any, coupling: Coupling, bounds: Mapping[str, float]) -> np.ndarray:
    """Return what a method keeps, checked."""
    keep = np.asarray(found)
    if keep.shape != (coupling.num_channels,) or keep.dtype != np.bool_:
        raise PlanError(
            f"{method} returned {keep.dtype} of shape {keep.shape}, expected bool of shape ({coupling.num_channels},). "
            "Return for each channel whether it stays."
        )
    costs = costs_of(coupling, keep)
    for name, bound in bounds.items():
        if getattr(costs, name) > bound:
            raise PlanError(
                f"{method} returned channels that cost {getattr(costs, name):,} {name}, at most {bound:,.0f} were "
                "asked. Stop at `problem.bounds`."
            )
    return keep


def _scores(
    coupling: Coupling, method: Method, calibration: Iterable[Any] | None, tasks: Mapping[str, Task] | None
) -> np.ndarray:
    """Return a method's (channels,) scores, checked."""
    score = np.asarray(method.scores(coupling, calibration, tasks), dtype=np.float64)
    if score.shape != (coupling.num_channels,):
        raise PlanError(
            f"{method} returned scores of shape {score.shape}, expected ({coupling.num_channels},). Return one number "
            "for each channel."
        )
    wrong = np.flatnonzero(~np.isfinite(score))
    if len(wrong):
        raise PlanError(
            f"{method} returned {len(wrong)} of {len(score)} scores that are not finite: {score[wrong[0]]} for channel "
            f"{wrong[0]}. Return finite numbers; check the weights, and the losses where the method uses them."
        )
    return score
