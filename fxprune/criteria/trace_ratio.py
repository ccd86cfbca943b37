"""Trace ratio: the channels of a group in whose features classes are farthest apart, for how far each is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.coupling import Coupling
from fxprune.criteria.magnitude import magnitude
from fxprune.grouping import Group
from fxprune.scattering import Scatter

FLOOR = 1e-6
"""What is added to each within-class scatter, as a share of the mean total scatter: one sample of a class has none."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The channels that stay: `kept` (n,) bool, and their `ratio` of between-class to within-class scatter."""

    kept: np.ndarray
    ratio: float


@dataclass(frozen=True, slots=True)
class TraceRatio:
    """Which channels of a group to keep: those with the greatest ratio of traces, sum of `between` / sum of `within`.

    max over selections V (0/1, one column per channel) of tr(V' S_b V) / tr(V' S_w V). With such selections only the
    diagonals of the scatter matrices count: channels meet through the common ratio alone, and of two equal ones both
    are kept. The best ratio falls with the number of channels kept, so it cannot say how many each group should keep.

    Attributes:
        between: (n,) between-class scatter of each choice.
        within: (n,) within-class scatter.
        cells: positions (0 to n - 1) of choices of which equal shares stay, as of `Group.cells`.
        takes: how many of each cell one step takes.
        held: (n,) bool, which stay in any case.

    Source: Nie, Xiang, Jia, Zhang, Yan: Trace ratio criterion for feature selection (AAAI 2008), which CATRO (Hu et
    al., TNNLS 2023) applies to channels. That CATRO uses the sums over a map's coordinates is a reconstruction.
    """

    between: np.ndarray
    within: np.ndarray
    cells: Sequence[np.ndarray]
    takes: Sequence[int]
    held: np.ndarray

    def scores(self, ratio: float) -> np.ndarray:
        """Return (n,) between - ratio * within: the highest stay; infinite where one stays in any case."""
        return np.where(self.held, np.inf, self.between - ratio * self.within)

    def select(self, steps: int) -> Selection:
        """Return the best choices, when `steps` steps' worth of every cell stay.

        The ratio of the best sum of scores rises until it is its own (Dinkelbach): the result is the global optimum.
        Of finitely many selections none comes twice, so the search ends.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = self._top(np.where(self.held, np.inf, np.nan_to_num(self.between / self.within)), steps)
        ratio = self._ratio(kept)
        while True:
            better = self._top(self.scores(ratio), steps)
            if not self._ratio(better) > ratio:  # NaN included
                return Selection(kept, ratio)
            kept, ratio = better, self._ratio(better)

    def _ratio(self, kept: np.ndarray) -> float:
        return float(self.between[kept].sum() / max(self.within[kept].sum(), 1e-300))

    def _top(self, scores: np.ndarray, steps: int) -> np.ndarray:
        kept = np.zeros(len(scores), dtype=bool)
        for cell, take in zip(self.cells, self.takes, strict=True):
            kept[cell[np.argsort(-scores[cell], kind="stable")[: steps * take]]] = True
        return kept


def trace_ratio_of(coupling: Coupling, group: Group, scatter: Scatter) -> TraceRatio:
    """Return the criterion of a group; what its choices take along adds up.

    A choice whose features were not seen counts by its share of the weights, against an even spread.
    """
    choices = group.choices
    channels, which = coupling.members.of(choices)
    n = len(choices)
    between, within, seen = (
        np.bincount(which, values[channels], n) for values in (scatter.between, scatter.within, scatter.seen)
    )
    if not seen.all():
        weights = np.bincount(which, magnitude(coupling)[channels], n)
        total = float((between + within).sum()) or 1.0
        between = np.where(seen > 0, between, total * weights / max(float(weights.sum()), 1e-300))
        within = np.where(seen > 0, within, total / n)
    within = within + FLOOR * float((between + within).mean())
    cells = group.places(np.ones(n, dtype=bool))
    return TraceRatio(between, within, cells, group.takes, coupling.held[choices])
