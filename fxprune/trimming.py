"""Fitting what a search of units has found to a budget: no more goes than it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxprune.units import Candidates, Units


def trim(
    units: Units, bounds: Mapping[str, float], start: np.ndarray, found: Sequence[tuple[Candidates, int]]
) -> np.ndarray:
    """Return what is left, (channels,), when as little goes as meets the bounds.

    Units go in their order until the bounds are met. Then each takes the fewest steps that still meet them, the last
    unit first. At last, channels that went before `start` come back where there is room.

    Args:
        units: of the network.
        bounds: resource -> the most it may cost.
        start: (channels,) what was left before.
        found: units with how many steps each can take, the cheapest first; all together meet the bounds.
    """

    def left(steps: Sequence[int]) -> np.ndarray:
        keep = start
        for (unit, _), count in zip(found, steps, strict=False):
            keep = units.without(keep, unit.choices[:count]) if count else keep
        return keep

    steps: list[int] = []
    for _, most in found:
        steps.append(most)
        if _fits(units, bounds, left(steps)):
            break
    for i in reversed(range(len(steps))):
        allowed = found[i][0].allowed
        low, high = 0, int(np.searchsorted(allowed, steps[i]))
        while low < high:
            middle = (low + high) // 2
            if _fits(units, bounds, left([*steps[:i], int(allowed[middle]), *steps[i + 1 :]])):
                high = middle
            else:
                low = middle + 1
        steps[i] = int(allowed[high])
    return _filled(units, bounds, left(steps))


def _fits(units: Units, bounds: Mapping[str, float], keep: np.ndarray) -> bool:
    return units.coupling.costs.within(keep, bounds) and not units.coupling.violation(keep)


def _filled(units: Units, bounds: Mapping[str, float], keep: np.ndarray) -> np.ndarray:
    """Bring back choices that fit, of each group those with the highest score first."""
    coupling = units.coupling
    dense = np.ones(len(keep), dtype=bool)
    for group in coupling.groups():
        lost = np.where(keep, np.inf, units.score(group, dense))
        cells = [cell[np.argsort(lost[cell], kind="stable")] for cell in group.cells]
        gone = [cell[: int((~keep[cell]).sum())][::-1] for cell in cells]
        for steps in range(min(len(cell) // take for cell, take in zip(gone, group.takes, strict=True)), 0, -1):
            back = [cell[: take * steps] for cell, take in zip(gone, group.takes, strict=True)]
            more = keep.copy()
            more[coupling.members.of(np.concatenate(back))[0]] = True
            more = coupling.settle(more)
            if units.may_have(group, more) and _fits(units, bounds, more):
                keep = more
                break
    return keep
