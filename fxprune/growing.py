"""Greedy growth: of all that could be added, what brings most for its cost, until nothing more fits."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np

from fxprune.allocating import Allocation

GRAIN = 64
"""A group is grown in at most about so many steps, several channels at a time where it is wider."""


def lazy_greedy(count: int, rate: Callable[[int], float | None], take: Callable[[int], None]) -> None:
    """Take items one after the other, always the one with the highest rate, of equal ones the first.

    A rate that was highest when last looked at is looked at again; the others can only have fallen, so most are not.

    Args:
        count: of items, numbered from 0.
        rate: what an item would bring now, per cost; None where there is no more of it, or it does not fit. It never
            rises while others are taken, and what does not fit never fits again.
        take: takes an item; it is asked for its rate again.

    Source: Minoux, Accelerated greedy algorithms for maximizing submodular set functions (1978).
    """
    first = [(rate(i), i) for i in range(count)]
    heap = [(-value, i) for value, i in first if value is not None]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        now = rate(i)
        if now is None:
            continue
        if heap and (-now, i) > heap[0]:
            heapq.heappush(heap, (-now, i))
            continue
        take(i)
        after = rate(i)
        if after is not None:
            heapq.heappush(heap, (-after, i))


def concave(share: np.ndarray) -> np.ndarray:
    """Return what it is worth to keep a share, from 0 to 1: 1 less the square of what is lost."""
    return 1 - np.square(1 - share)


class Growth:
    """Grows the groups of a network from their least widths.

    The objective of a set of steps that stay is the sum over groups of `weight * concave(worth of what stays / worth of
    all)`: concave functions of modular ones, so it is monotone and submodular over the steps. A group's weight is the
    share of the bounds that it costs: without it, whatever is cheap would be kept first.

    Attributes:
        allocation: the steps of all groups, in the order they go; they come back in the opposite order.
        taken: (steps,) bool, which steps are gone.
    """

    def __init__(
        self,
        allocation: Allocation,
        worth: np.ndarray,
        total: np.ndarray,
        bounds: Mapping[str, float],
        most: Mapping[int, int] | None = None,
    ) -> None:
        """Start from the least network.

        Args:
            allocation: the steps of all groups.
            worth: (steps,) of the allocation, not negative.
            total: (groups,) the worth of all that a group has, with what no step takes.
            bounds: resource -> the most it may cost.
            most: group -> how many of its steps come back at most; all without it.
        """
        self.allocation = allocation
        self.taken = np.ones(len(allocation), dtype=bool)
        self._bounds = bounds
        self._places: list[np.ndarray] = []
        self._worth: list[np.ndarray] = []
        dense = self._used(np.zeros(len(allocation), dtype=bool))
        for g in np.unique(allocation.group):
            weight = float((dense - self._used(allocation.group == g)).max())
            places = np.flatnonzero(allocation.group == g)[::-1]
            there = np.concatenate([[0.0], np.cumsum(worth[places])])
            share = (total[g] - there[-1] + there) / max(float(total[g]), 1e-300)
            self._places.append(places[: len(places) if most is None else most[int(g)]])
            self._worth.append(weight * concave(np.clip(share, 0, 1)))
        self._back = [0] * len(self._places)
        self._grain = [max(1, len(places) // GRAIN) for places in self._places]
        self._use = self._used(self.taken)

    def run(self) -> np.ndarray:
        """Grow until nothing more fits; return (channels,) what stays."""
        lazy_greedy(len(self._places), self.rate, self.take)
        return self.allocation.keep(self.taken)

    def rate(self, group: int) -> float | None:
        """Return what the next steps of a group bring, for the largest share of a bound that they cost."""
        back, places = self._back[group], self._places[group]
        while self._grain[group] and back < len(places):
            ahead = min(back + self._grain[group], len(places))
            cost = self._used(self._with(group, ahead))
            if (cost <= 1).all():
                gain = self._worth[group][ahead] - self._worth[group][back]
                return float(gain / max(float((cost - self._use).max()), 1e-12))
            self._grain[group] //= 2
        return None

    def take(self, group: int) -> None:
        """Give the next steps of a group back."""
        ahead = min(self._back[group] + self._grain[group], len(self._places[group]))
        self.taken = self._with(group, ahead)
        self._back[group] = ahead
        self._use = self._used(self.taken)

    def _with(self, group: int, back: int) -> np.ndarray:
        taken = self.taken.copy()
        taken[self._places[group][:back]] = False
        return taken

    def _used(self, taken: np.ndarray) -> np.ndarray:
        """Return (resources,) costs as shares of their bounds."""
        costs = self.allocation.costs(self.allocation.keep(taken)).to_dict()
        return np.array([costs[name] / bound for name, bound in self._bounds.items()])
