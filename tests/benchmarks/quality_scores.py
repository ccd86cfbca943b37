"""From rows to means and spreads over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
STAGES = {"cut": "right after pruning", "refreshed": "after BN refresh", "tuned": "after fine-tuning"}
LEAST_NOISE = 0.5  # points: what the size of a test set leaves open


@dataclass(frozen=True, slots=True)
class Cell:
    """Points over seeds.

    Attributes:
        mean: over seeds.
        spread: standard deviation over seeds; None of one seed.
    """

    mean: float
    spread: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.spread is None else f"{self.mean:.1f} \N{PLUS-MINUS SIGN} {self.spread:.1f}"


Measure = Callable[[Sequence[Row], str, float, str], Cell | None]


def points(scores: dict[str, float]) -> float:
    """Return the mean of all tasks' metrics in percent; a metric below 0, or NaN, counts as 0."""
    return 100 * statistics.mean(score if score > 0 else 0.0 for score in scores.values())


def over_seeds(values: Sequence[float]) -> Cell | None:
    """Return the mean and spread of some values, None of none."""
    if not values:
        return None
    return Cell(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def cell(rows: Sequence[Row], method: str, budget: float, stage: str, task: str | None = None) -> Cell | None:
    """Return the points of a method at a budget, of one task or the mean of all; None where there are none."""
    found = [r[stage] for r in rows if r["method"] == method and r["budget"] == budget and stage in r]
    return over_seeds([points(scores) if task is None else 100 * scores[task] for scores in found])


def weakest(rows: Sequence[Row], method: str, budget: float, stage: str) -> Cell | None:
    """Return what is left of the metric of the task that suffers most, in percent of the dense network's."""
    dense = {r["seed"]: r["cut"] for r in rows if r["method"] == "dense"}
    found = [r for r in rows if r["method"] == method and r["budget"] == budget and stage in r and r["seed"] in dense]
    return over_seeds([_least_left(r[stage], dense[r["seed"]]) for r in found])


def _least_left(scores: dict[str, float], dense: dict[str, float]) -> float:
    """Return the least share of a metric that is left, in percent, of the tasks that the dense network can do."""
    return min((points({task: scores[task] / whole}) for task, whole in dense.items() if whole > 0), default=0.0)


def best(
    rows: Sequence[Row], prefix: str, budget: float, stage: str, measure: Measure = cell
) -> tuple[str, Cell] | None:
    """Return the method whose name begins with a prefix that has the highest mean, and that."""
    methods = dict.fromkeys(r["method"] for r in rows if r["method"].startswith(prefix))
    found = [(method, c) for method in methods if (c := measure(rows, method, budget, stage)) is not None]
    return max(found, key=lambda pair: pair[1].mean, default=None)


def noise(a: Cell, b: Cell) -> float:
    """Return the difference of two means that says nothing: their spreads in quadrature, and at least half a point."""
    return max(((a.spread or 0.0) ** 2 + (b.spread or 0.0) ** 2) ** 0.5, LEAST_NOISE)


def verdict(a: Cell, b: Cell) -> str:
    """Say whether a wins over b, loses, or is within noise."""
    difference = a.mean - b.mean
    return "even" if abs(difference) <= noise(a, b) else "win" if difference > 0 else "loss"
