"""PAGCP: units one after another, each as far as the worst task tolerates, in rounds until the budget is met."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError
from fxprune.problems import Problem
from fxprune.visiting import Search
from fxprune.visits import Found


@dataclass(frozen=True, slots=True)
class PAGCP:
    """Prune unit after unit, each until the worst task's loss has risen by a tolerance that is scheduled over units.

    A unit is a group. Its channels go in the order of the norm of the weights that make them (for several layers: the
    mean of each, summed), computed again on what is left. Units are visited in the order of the multiply-accumulates
    that a trial of 30 % saves. Ratios 0.05, 0.10, .. 0.95 of a unit are tried until `max_t loss_t / base_t` exceeds
    1 + tolerance; the last that held is applied, the base rises to its losses, and the next unit meets the tolerance
    times lam, where `prod_i (1 + initial_rate * lam^i) = global_tolerance` over all units. Units are visited from the
    most savings to the least if lam <= 1, else the other way round, so that the largest meets the largest tolerance.
    Then only the share `topk` of the units with the least rise of the loss per multiply-accumulate is pruned.

    The paper stops by tolerance, a plan by its budget: rounds go on, each with higher tolerances and relative to the
    losses of the network so far, until the budget is met. Of the last round, the units with the least rise per
    multiply-accumulate go first until it is met, and what is saved beyond is given back, the dearest unit first.

    The losses are those of the calibration batches, in eval mode, of the network without the removed channels (set to
    zero where that is the same): pass a part of the training data that was held out, never test data.

    The authors' code differs in three ways that are mistakes: a unit for which no ratio violates the tolerance is never
    applied, and is recorded at 0.90 (here: 0.95, applied); the data of the test steer the search; a ratio that takes
    less than a channel counts as accepted, and lowers the tolerance (here: it is passed over). Candidates that take the
    same channels are measured once.

    With `fast`, channels go in the order of `Joint`'s paths, whose errors say which ratio of each unit will hold. A
    block of twelve units is then confirmed together, with at most three measurements, against the product of its
    tolerances: a bound on the product is what the schedule promises, but a unit's own tolerance is not checked.

    Attributes:
        initial_rate: tolerance of the first unit, p0.
        global_tolerance: by which factor losses may rise over all units of a round, Tglob. The authors' is for some 60
            units; with few, a smaller one keeps lam near 1.
        topk: which share of the units is pruned in a round.
        rounds: how many rounds there are at most.
        rate_slope: what each round adds to `initial_rate`.
        tolerance_slope: what each round adds to `global_tolerance`.
        norm: 1 for absolute values of weights, 2 for their squares.
        compensate: the weights that stay are corrected, in the search and by `compile`; as published they are not.
        fast: measure about ten times less often, after one pass that gathers moments (not counted as a measurement).
        damping: of the correction and of `fast`; as of `Joint`.
        checkpoint: a file that holds where the search is, written after every unit, by the first rank. Started again,
            with as many ranks or others, the search goes on, and ends as it would have.

    Raises:
        PlanError: a setting that makes no sense.

    Source: Ye, Zhang, Chen, Fan, Wang: Performance-Aware Global Channel Pruning for Multitask CNNs (TPAMI 2023),
    section 3, and the authors' code, whose defaults these are (slopes: theirs are 0).
    """

    initial_rate: float = 0.06
    global_tolerance: float = 6.0
    topk: float = 0.8
    rounds: int = 20
    rate_slope: float = 0.02
    tolerance_slope: float = 1.0
    norm: int = 1
    compensate: bool = False
    fast: bool = False
    damping: float = DAMPING
    checkpoint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        checks = {
            "initial_rate": (self.initial_rate > 0, "a positive share such as 0.06"),
            "global_tolerance": (
                math.isfinite(self.global_tolerance) and self.global_tolerance > 1 + self.initial_rate,
                f"a factor above 1 + initial_rate = {1 + self.initial_rate:g}",
            ),
            "topk": (0 < self.topk <= 1, "a share such as 0.8"),
            "rounds": (self.rounds >= 1, "1 or more"),
            "rate_slope": (self.rate_slope >= 0, "0 or more"),
            "tolerance_slope": (self.tolerance_slope >= 0, "0 or more"),
            "norm": (self.norm in (1, 2), "1 or 2"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise PlanError(f"PAGCP({name}={getattr(self, name)!r}) makes no sense. Pass {wanted}.")

    def choose(self, problem: Problem) -> np.ndarray:
        """Return (channels,) bool, what to keep."""
        return self.search(problem).keep

    def search(self, problem: Problem) -> Found:
        """Return what to keep, and how it was found: the visited units, and how often losses were measured.

        Raises:
            PlanError: data or tasks are missing, a loss is not positive, the budget cannot be met with these settings,
                or the checkpoint is of another search.
        """
        return Search(problem, self).run()

    def tolerances(self, units: int, number: int = 0) -> tuple[float, float]:
        """Return the first unit's tolerance in a round, and by which factor, lam, it changes from unit to unit.

        Args:
            units: how many units there are.
            number: of the round, from 0.
        """
        first = self.initial_rate + self.rate_slope * number
        total = max(self.global_tolerance + self.tolerance_slope * number, 1 + first)
        return first, decay(first, total, units)


def decay(first: float, total: float, units: int) -> float:
    """Return lam such that prod over i < units of (1 + first * lam^i) is `total`, by bisection.

    Args:
        first: the first tolerance, above 0.
        total: the product, at least 1 + first.
        units: how many factors; with one, lam has no effect, and is 1.

    Source: PAGCP, section 3. For 60 units, 0.06 and 6 give 0.9738.
    """
    if units < 2:
        return 1.0
    powers = np.arange(units)
    low, high = 0.0, ((total - 1) / first) ** (1 / (units - 1))  # there, the last factor alone is the total
    for _ in range(100):
        middle = (low + high) / 2
        if np.log1p(first * middle**powers).sum() < math.log(total):
            low = middle
        else:
            high = middle
    return high
