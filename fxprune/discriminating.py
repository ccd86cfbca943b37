"""CATRO: keep the channels that tell classes apart, by trace ratio in each group and greedily over all groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.allocating import Allocation, allocate, steps_of_all
from fxprune.calibrations import Calibration
from fxprune.criteria.trace_ratio import TraceRatio, trace_ratio_of
from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError
from fxprune.growing import Growth
from fxprune.paths import path_by_score, paths_in_any_order
from fxprune.problems import Problem
from fxprune.scattering import scatter
from fxprune.tasks import Task


@dataclass(frozen=True, slots=True)
class CATRO:
    """Keep the channels whose features separate the classes of a few labelled samples.

    Stage one, inside a group and for a given width: the channels with the greatest trace ratio, sum of between-class
    scatter / sum of within-class scatter (see `fxprune.criteria.trace_ratio.TraceRatio`). Stage two, over all groups:
    from the least widths that the constraints allow, grow the group that brings most for its cost until the budget is
    used up. What a set of channels is worth is a monotone submodular function of it: the sum over groups, by what they
    cost, of 1 - (1 - x)^2, where x is the share of the group's between-class scatter that is kept.

    A few samples of each class do, forward only: `calibration` is batches `(inputs, targets)`. Which targets are
    labels, and which classes count, is said by the tasks (`Task(loss, target=..., classes=[...])`), whose losses are
    not asked for; without tasks the targets are the labels.

    The paper has no public code. Certain, from its abstract, are class information from a few samples, the joint impact
    of channels, and a two-stage greedy for a submodular function. Stage one is that of trace-ratio selection, which the
    name refers to; the function of stage two, and costs in it, are a reconstruction.

    Attributes:
        compensate: `compile` corrects the weights that stay, as for `Joint`; as published they are not.
        damping: of that correction.

    Source: Hu, Che, Liu, Li, Tang, Zhang, Wang: CATRO: Channel pruning via class-aware trace ratio optimization (TNNLS
    2023).
    """

    compensate: bool = False
    damping: float = DAMPING

    def choose(self, problem: Problem) -> np.ndarray:
        """Return (channels,) bool, what to keep.

        Raises:
            PlanError: no batches, no labels, or the bounds cannot be met.
        """
        coupling, constraints, bounds = problem.coupling, problem.constraints, problem.bounds
        paths = paths_in_any_order(coupling)
        allocate(coupling, paths, "uniform", constraints, bounds)  # raises where nothing meets the bounds
        batches, tasks = _data(problem)
        found = scatter(coupling, batches, tasks)
        criteria = [trace_ratio_of(coupling, group, found) for group in coupling.groups()]
        total = np.array([c.between.sum() for c in criteria])

        def grown(scores: list[np.ndarray], most: Mapping[int, int] | None) -> tuple[np.ndarray, Growth]:
            allocation, worth = _allocation(problem, criteria, scores)
            growth = Growth(allocation, worth, total, bounds, most)
            return growth.run(), growth

        _, growth = grown([np.where(c.held, np.inf, c.between) for c in criteria], None)
        allocation, taken = growth.allocation, growth.taken
        most = {int(g): int((~taken[allocation.group == g]).sum()) for g in np.unique(allocation.group)}
        keep = allocation.keep(taken)
        ratios = [
            c.select(int(keep[group.choices].sum()) // sum(group.takes)).ratio
            for c, group in zip(criteria, coupling.groups(), strict=True)
        ]
        keep, _ = grown([c.scores(ratio) for c, ratio in zip(criteria, ratios, strict=True)], most)
        return keep


def _allocation(
    problem: Problem, criteria: list[TraceRatio], scores: list[np.ndarray]
) -> tuple[Allocation, np.ndarray]:
    """Return the steps of all groups, the lowest score first, and (steps,) the between-class scatter of each."""
    coupling = problem.coupling
    paths = []
    worth = np.zeros(coupling.num_channels)
    for group, criterion, score in zip(coupling.groups(), criteria, scores, strict=True):
        choices = group.choices
        ranked = np.zeros(coupling.num_channels)
        ranked[choices] = score
        worth[choices] = criterion.between
        path = path_by_score(group, ranked)
        paths.append(type(path)(path.group, path.choices, worth[path.choices].sum(axis=1)[:, None], path.takes))
    allocation = steps_of_all(coupling, paths, "uniform", problem.constraints)
    return allocation, allocation.errors


def _data(problem: Problem) -> tuple[Iterable[Any], Mapping[str, Task] | None]:
    given, tasks = problem.calibration, problem.tasks
    if isinstance(given, Calibration):
        given, tasks = given.batches, tasks or given.tasks
    if given is None:
        raise PlanError(
            "CATRO needs labelled batches: pass `calibration=[(inputs, labels), ...]`, or use `methods.Magnitude()`."
        )
    return given, tasks
