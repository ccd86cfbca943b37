"""What PAGCP's fast search expects of each ratio before it measures, and how it confirms several units together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.calibrations import Calibration
from fxprune.coupling import Coupling
from fxprune.criteria.joint import joint_paths
from fxprune.paths import RemovalPath
from fxprune.units import Candidates

TRIES = 3
"""How often a block is measured at most."""
ENOUGH = 0.7
"""A block that has used this share of its tolerance is not tried further."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The removal paths of all groups, with the rise of each task's loss along them.

    Attributes:
        paths: of every group; errors are relative to the loss of the dense network.
        dense: (tasks,) that loss.
    """

    paths: tuple[RemovalPath, ...]
    dense: np.ndarray

    @staticmethod
    def of(
        coupling: Coupling, calibration: Calibration, keep: np.ndarray, *, damping: float, compensate: bool
    ) -> Forecast:
        """Forecast at the widths of `keep` (channels,), from moments alone.

        Source: see `fxprune.criteria.joint`.
        """
        paths = joint_paths(coupling, calibration, keep=keep, damping=damping, compensate=compensate)
        return Forecast(tuple(paths), np.array(list(calibration.losses.values())))

    def choices(self, group: int, keep: np.ndarray) -> np.ndarray:
        """Return (steps, choices per step), what is left of a group's path in `keep` (channels,)."""
        return self.paths[group].without(~keep).choices

    def rises(self, group: int, keep: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Return (steps + 1, tasks), by which share of `base` (tasks,) each loss is expected to rise."""
        errors = self.paths[group].without(~keep).errors * (self.dense / base)
        return np.concatenate([np.zeros((1, errors.shape[1])), np.cumsum(errors, axis=0)])


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What holds of a block of units.

    Attributes:
        ratios: (units,) of each; 0 where it stays.
        steps: (units,) how many steps that takes.
        rises: (units,) by how much the sum of all losses rose, shared out as it was expected.
        losses: (tasks,) measured; the base where nothing held.
        scale: (tasks,) how many times what was expected the losses rose.
        evaluations: how often losses were measured.
    """

    ratios: list[float]
    steps: list[int]
    rises: list[float]
    losses: np.ndarray
    scale: np.ndarray
    evaluations: int


def confirm(
    units: Sequence[Candidates],
    told: Sequence[np.ndarray],
    base: np.ndarray,
    tolerances: np.ndarray,
    scale: np.ndarray,
    ratios: Sequence[float],
    measure: Callable[[Sequence[int]], np.ndarray | None],
) -> Confirmed:
    """Find how far several units can go together, by bisection on how far the forecast is trusted.

    Each unit goes to the largest ratio whose expected rise is within `trust` times its tolerance, for every task. All
    together hold if no loss exceeds the base times the product of (1 + tolerance).

    Args:
        units: of the block.
        told: of each, (steps + 1, tasks) expected relative rises.
        base: (tasks,) losses to compare with.
        tolerances: (units,) each unit's.
        scale: (tasks,) how many times what was expected losses have risen so far.
        ratios: ascending.
        measure: (units,) steps -> (tasks,) losses, or None if they are not allowed.
    """
    allowed = float(np.prod(1 + tolerances)) - 1
    best = Confirmed([0.0] * len(units), [0] * len(units), [0.0] * len(units), base, scale, 0)
    expected, learned = [rise * scale for rise in told], scale

    def guess(trust: float) -> tuple[list[float], list[int]]:
        found = [(0.0, 0)] * len(units)
        for i, unit in enumerate(units):
            for ratio in ratios:
                count = unit.steps(ratio)
                if count and ratio < cap and (expected[i][count] <= trust * tolerances[i]).all():
                    found[i] = ratio, count
        return [ratio for ratio, _ in found], [count for _, count in found]

    trust, low, high, evaluations, cap = 1.0, 0.0, np.inf, 0, np.inf
    tried: set[tuple[int, ...]] = {(0,) * len(units)}
    for _ in range(TRIES):
        marks, steps = guess(trust)
        for _ in range(40):
            if any(steps) or trust >= high / 2:
                break
            trust *= 2  # nothing is expected to hold: try the least
            marks, steps = guess(trust)
        if tuple(steps) in tried:
            break
        tried.add(tuple(steps))
        losses = measure(steps)
        while losses is None and any(steps):  # they are not allowed: all a ratio less
            cap = max(marks)
            marks, steps = guess(trust)
            losses = measure(steps)
        if losses is None:
            break
        evaluations += 1
        rises = losses / base - 1
        parts = np.stack([e[count] for e, count in zip(expected, steps, strict=True)])
        worst, total = rises.max(), np.maximum(parts.sum(0), 1e-12)
        if np.isfinite(rises).all():
            learned = scale * np.clip(np.maximum(rises, 0.1 * total) / total, 1 / 8, 8)
        if worst <= allowed:
            shares = (parts * base).sum(1)
            rise = float(losses.sum() - base.sum()) * shares / max(float(shares.sum()), 1e-30)
            best = Confirmed(marks, steps, rise.tolist(), losses, scale, evaluations)
            low = trust
            if worst >= ENOUGH * allowed or all(e.steps(ratios[-1]) == s for e, s in zip(units, steps, strict=True)):
                break
            further = trust * min(max(allowed / max(worst, 1e-12), 1.2), 8)
            trust = further if further < high else (low * high) ** 0.5
        else:
            high = trust
            nearer = trust * max(min(allowed / worst, 0.8), 1 / 8) if np.isfinite(worst) else trust / 8
            trust = nearer if nearer > low else (low * high) ** 0.5
    return replace(best, scale=learned, evaluations=evaluations)
