"""Tolerances: no task may get worse by more than it is allowed to, measured on data that planning has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fxprune.costs import CostModel
from fxprune.errors import PlanError
from fxprune.probing import Probe

TRIES = 4
"""How often tasks are weighed anew at one budget."""
HALVINGS = 7
"""How often the budget between the dense network and what was asked is halved."""

Choose = Callable[[Mapping[str, float], np.ndarray], np.ndarray]
"""(bounds, (tasks,) weights of their errors) -> (channels,) what stays."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A choice, and how much worse it makes each task.

    Attributes:
        keep: (channels,).
        worse: (tasks,) relative rise of the loss.
        excess: by how much the worst task is over its tolerance, as a share of the loss; at most 0 if all hold.
    """

    keep: np.ndarray
    worse: np.ndarray
    excess: float


class Guard:
    """Looks for a choice within all tolerances."""

    def __init__(self, probe: Probe, tolerances: Mapping[str, float | None]) -> None:
        """Judge by the losses that `probe` measures; `tolerances`: task -> relative rise allowed, None for any."""
        self._probe = probe
        self._names = list(tolerances)
        self._limits = np.array([np.inf if t is None else t for t in tolerances.values()])

    def judge(self, keep: np.ndarray) -> Judged:
        """Measure a choice."""
        dense = self._probe.dense
        worse = (self._probe.losses(keep) - dense) / np.maximum(np.abs(dense), 1e-12)
        return Judged(keep, worse, float((worse - self._limits).max()))

    def choose(self, choose: Choose, costs: CostModel, bounds: Mapping[str, float], *, closest: bool) -> np.ndarray:
        """Return a choice within the bounds and all tolerances.

        Args:
            choose: plans for bounds and weights of tasks.
            costs: of the network.
            bounds: resource -> the most it may cost.
            closest: where both cannot be met, return the cheapest choice found within the tolerances.

        Raises:
            PlanError: both cannot be met: which task, how far, and what can be had.
        """
        best = self._at(choose, bounds)
        if best.excess <= 0:
            return best.keep
        dense = costs.dense.to_dict()
        inside: Judged | None = None
        low, high = 0.0, 1.0  # share of the way from the dense network to the bounds
        for _ in range(HALVINGS):
            share = (low + high) / 2
            found = self._at(choose, {name: dense[name] + share * (bounds[name] - dense[name]) for name in bounds})
            if found.excess <= 0:
                low, inside = share, found
            else:
                high = share
        if closest:
            return np.ones_like(best.keep) if inside is None else inside.keep
        worst = int(np.argmax(best.worse - self._limits))
        left = dense if inside is None else costs(inside.keep).to_dict()
        shares = ", ".join(f"{name} {left[name] / dense[name]:.1%}" for name in bounds)
        asked = ", ".join(f"{name} {bound / dense[name]:.1%}" for name, bound in bounds.items())
        raise PlanError(
            f"budget and tolerances conflict: at {asked}, the loss of task {self._names[worst]!r} rises by "
            f"{best.worse[worst]:.1%}, and its tolerance is {self._limits[worst]:.1%}. Within all tolerances, {shares} "
            'is what was found. Ask for that, loosen the tolerance, or pass `on_conflict="closest"` to get it.'
        )

    def _at(self, choose: Choose, bounds: Mapping[str, float]) -> Judged:
        """Return the choice at some bounds whose worst task is best, of several weightings of the tasks."""
        weights = np.ones(len(self._names))
        best: Judged | None = None
        for _ in range(TRIES):
            found = self.judge(choose(bounds, weights))
            if best is None or found.excess < best.excess:
                best = found
            if found.excess <= 0 or len(self._names) == 1:
                break
            finite = np.isfinite(self._limits)
            ratio = np.where(finite, np.maximum(found.worse, 0) / np.maximum(self._limits, 1e-3), 0.0)
            weights = weights * np.clip(ratio / max(ratio.max(), 1e-12), 0.1, 1)
            weights /= weights.max()
        assert best is not None
        return best
