"""The search of PAGCP: visits to units in rounds, with a state that can be written down after each."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fxprune import sharing
from fxprune.allocating import allocate
from fxprune.errors import PlanError
from fxprune.paths import paths_in_any_order
from fxprune.predicting import Forecast, confirm
from fxprune.probing import Probe
from fxprune.problems import Problem
from fxprune.resuming import read_state, write_state
from fxprune.trimming import trim
from fxprune.units import Candidates, Units
from fxprune.visits import Found, State, Visit

if TYPE_CHECKING:
    from fxprune.tolerating import PAGCP

logger = logging.getLogger(__name__)

RATIOS = tuple(i / 20 for i in range(1, 20))
"""Which shares of a unit are tried."""
TRIAL = 0.3
"""Which share of each unit goes in the trial that orders them."""
BLOCK = 12
"""How many units the fast search confirms together."""


@dataclass(frozen=True, slots=True)
class Round:
    """What does not change within a round: what is left at its start, and the units in their order."""

    start: np.ndarray
    sequence: tuple[int, ...]
    lam: float
    forecast: Forecast | None


class Search:
    """Runs rounds until the budget is met."""

    def __init__(self, problem: Problem, method: PAGCP) -> None:
        """Measure the dense network.

        Args:
            problem: what is asked.
            method: the settings.
        """
        self.method = method
        self.coupling = problem.coupling
        self.bounds = problem.bounds
        limits = replace(problem.constraints, min_width=max(problem.constraints.min_width, 1))
        self.units = Units(self.coupling, limits, method.norm)
        self.dense = np.ones(self.coupling.num_channels, dtype=bool)
        paths = paths_in_any_order(self.coupling)
        allocate(self.coupling, paths, "uniform", limits, self.bounds)  # raises where nothing meets the bounds
        self.data = problem.data(method, moments=method.fast or method.compensate)
        self.probe = Probe(self.coupling, self.data, damping=method.damping, compensate=method.compensate)
        self.tasks = list(self.data.tasks or {})
        for task, loss in zip(self.tasks, self.probe.dense, strict=True):
            if not (math.isfinite(loss) and loss > 0):
                raise PlanError(
                    f"the loss of task {task!r} is {loss} on the calibration data; PAGCP compares losses by their "
                    "ratio. Return a loss that is finite and above 0, from batches that are not empty."
                )
        self.about = {
            "network": self.coupling.fingerprint,
            "method": repr(method),
            "budget": dict(self.bounds),
            "constraints": repr(problem.constraints),
            "tasks": self.tasks,
        }

    def run(self) -> Found:
        """Return what to keep."""
        state = self._resumed()
        while not state.done:
            state = self._round(state)
        found = Found(self._left(state), state.number + 1, state.evaluations, state.visits)
        logger.info("PAGCP: %d evaluations of the losses in %d rounds", found.evaluations, found.rounds)
        return found

    def _resumed(self) -> State:
        """Return where the search was when it was killed, or its start."""
        path = self.method.checkpoint
        known = None if path is None else sharing.from_first("the checkpoint", lambda: read_state(path, self.about))
        dense = tuple(map(float, self.probe.dense))
        if known is None:
            first, _ = self._tolerances(0)
            done = self.coupling.costs.within(self.dense, self.bounds)
            return State(0, (), dense, first, (), 1, (1.0,) * len(dense), done)
        if not np.allclose(known.pop("dense"), dense, rtol=1e-4):
            raise PlanError(
                f"the checkpoint {path} is of other weights or data: the dense network had other losses. Delete it, or "
                "pass another path."
            )
        known |= {name: tuple(known[name]) for name in ("gone", "base", "scale")}
        known["visits"] = tuple(Visit(**visit) for visit in known["visits"])
        return State(**known)

    def _noted(self, state: State) -> State:
        if self.method.checkpoint is not None and sharing.rank() == 0:
            dense = {"dense": [float(loss) for loss in self.probe.dense]}
            write_state(self.method.checkpoint, self.about, asdict(state) | dense)
        return state

    def _left(self, state: State) -> np.ndarray:
        keep = self.dense.copy()
        keep[list(state.gone)] = False
        return keep

    def _tolerances(self, number: int) -> tuple[float, float]:
        return self.method.tolerances(len(self.coupling.groups()), number)

    def _round(self, state: State) -> State:
        """Visit all units, and return the start of the next round, or the end."""
        start = self._left(state)
        _, lam = self._tolerances(state.number)
        forecast = None
        if self.method.fast:
            forecast = Forecast.of(
                self.coupling, self.data, start, damping=self.method.damping, compensate=self.method.compensate
            )
        this = Round(start, self._sequence(start, lam, forecast), lam, forecast)
        keep = start
        for visit in state.visits:
            keep = self._after(this, keep, visit)
        while len(state.visits) < len(this.sequence):
            block = this.sequence[len(state.visits) :][: BLOCK if forecast else 1]
            state = self._visit_block(this, state, keep, block) if forecast else self._visit(this, state, keep, *block)
            for visit in state.visits[-len(block) :]:
                keep = self._after(this, keep, visit)
            self._noted(state)
        return self._noted(self._ended(this, state))

    def _sequence(self, keep: np.ndarray, lam: float, forecast: Forecast | None) -> tuple[int, ...]:
        """Return the units by the multiply-accumulates that a trial saves: the most first if lam <= 1, else last."""
        saved = []
        for group in self.coupling.groups():
            unit = self._candidates(group.index, keep, forecast)
            saved.append(self._macs(keep) - self._macs(self.units.without(keep, unit.choices[: unit.steps(TRIAL)])))
        order = np.argsort(saved, kind="stable")
        return tuple(map(int, order[::-1] if lam <= 1 else order))

    def _candidates(self, index: int, keep: np.ndarray, forecast: Forecast | None) -> Candidates:
        group = self.coupling.groups()[index]
        return self.units.candidates(group, keep, None if forecast is None else forecast.choices(index, keep))

    def _macs(self, keep: np.ndarray) -> int:
        return self.coupling.costs(keep).asked_macs

    def _after(self, this: Round, keep: np.ndarray, visit: Visit) -> np.ndarray:
        """Return what is left of `keep` (channels,) when what a visit accepted goes."""
        unit = self._candidates(visit.group, keep, this.forecast)
        return self.units.without(keep, unit.choices[: visit.steps])

    def _visit(self, this: Round, state: State, keep: np.ndarray, index: int) -> State:
        """Raise a unit's ratio until a task's loss exceeds the tolerance."""
        unit = self._candidates(index, keep, this.forecast)
        base, losses = np.array(state.base), None
        ratio, steps, task, evaluations = 0.0, 0, None, state.evaluations
        for candidate in RATIOS:
            count = unit.steps(candidate)
            if count > steps:
                trial = self.units.without(keep, unit.choices[:count])
                if self.coupling.violation(trial):
                    break
                found, evaluations = self.probe.losses(trial), evaluations + 1
                worse = found / base
                if not (worse <= 1 + state.tolerance).all():  # NaN does not hold either
                    task = self.tasks[int(np.argmax(np.where(np.isnan(worse), np.inf, worse)))]
                    break
                losses, steps = found, count
            ratio = candidate if steps else 0.0
        if losses is None:
            visits = (*state.visits, Visit(index, 0.0, 0, 0.0, 0, task))
            return replace(state, visits=visits, evaluations=evaluations)
        saved = self._macs(keep) - self._macs(self.units.without(keep, unit.choices[:steps]))
        visit = Visit(index, ratio, steps, float(losses.sum() - base.sum()), saved, task)
        return replace(
            state,
            base=tuple(map(float, np.maximum(base, losses))),
            tolerance=state.tolerance * this.lam,
            visits=(*state.visits, visit),
            evaluations=evaluations,
        )

    def _visit_block(self, this: Round, state: State, keep: np.ndarray, block: Sequence[int]) -> State:
        """Guess the ratios of several units, and confirm them together."""
        assert this.forecast is not None
        units = [self._candidates(index, keep, this.forecast) for index in block]
        base = np.array(state.base)
        tolerances = state.tolerance * this.lam ** np.arange(len(units))

        def measure(steps: Sequence[int]) -> np.ndarray | None:
            trial = keep
            for unit, count in zip(units, steps, strict=True):
                trial = self.units.without(trial, unit.choices[:count])
            return None if self.coupling.violation(trial) else self.probe.losses(trial)

        told = [this.forecast.rises(unit.group, keep, base) for unit in units]
        found = confirm(units, told, base, tolerances, np.array(state.scale), RATIOS, measure)
        visits = []
        for unit, ratio, steps, rise in zip(units, found.ratios, found.steps, found.rises, strict=True):
            after = self.units.without(keep, unit.choices[:steps])
            visits.append(Visit(unit.group, ratio, steps, rise, self._macs(keep) - self._macs(after), None))
            keep = after
        return replace(
            state,
            base=tuple(map(float, np.maximum(base, found.losses))),
            tolerance=state.tolerance * this.lam ** sum(steps > 0 for steps in found.steps),
            visits=(*state.visits, *visits),
            evaluations=state.evaluations + found.evaluations,
            scale=tuple(map(float, found.scale)),
        )

    def _ended(self, this: Round, state: State) -> State:
        """Apply the visits that the filter keeps; go on with the next round, or trim to the budget."""
        accepted = [visit for visit in state.visits if visit.steps]
        count = max(int(len(this.sequence) * self.method.topk), 1)
        chosen = sorted(accepted, key=lambda visit: visit.price)[:count]
        keep, paths = this.start, {}
        for visit in accepted:
            if visit in chosen:
                paths[visit.group] = self._candidates(visit.group, keep, this.forecast)
                keep = self.units.without(keep, paths[visit.group].choices[: visit.steps])
        done = self.coupling.costs.within(keep, self.bounds)
        if done:
            keep = trim(self.units, self.bounds, this.start, [(paths[v.group], v.steps) for v in chosen])
        else:
            self._check_progress(state, keep, bool(chosen))
        gone = tuple(map(int, np.flatnonzero(~keep)))
        if done:
            return replace(state, gone=gone, done=True)
        first, _ = self._tolerances(state.number + 1)
        base = tuple(map(float, self.probe.losses(keep) if chosen else state.base))
        evaluations = state.evaluations + bool(chosen)
        return State(state.number + 1, gone, base, first, (), evaluations, state.scale)

    def _check_progress(self, state: State, keep: np.ndarray, progress: bool) -> None:
        """Check that another round can help.

        Raises:
            PlanError: it cannot: how far the search got, and what to raise.
        """
        slopes = self.method.rate_slope > 0 or self.method.tolerance_slope > 0
        if state.number + 1 < self.method.rounds and (progress or slopes):
            return
        costs, dense = self.coupling.costs(keep), self.coupling.costs(self.dense)
        lines = [
            f"{name}: at most {bound:,.0f} asked ({bound / getattr(dense, name):.1%} of the dense network), "
            f"{getattr(costs, name):,} ({getattr(costs, name) / getattr(dense, name):.1%}) reached"
            for name, bound in self.bounds.items()
        ]
        what = "`rounds`, `initial_rate` or `global_tolerance`" if slopes else "`rate_slope` or `tolerance_slope`"
        raise PlanError(
            f"{self.method} does not meet the budget within its tolerances: after round {state.number + 1} of at most "
            f"{self.method.rounds},\n  " + "\n  ".join(lines) + f"\nRaise {what}, or the budget."
        )
