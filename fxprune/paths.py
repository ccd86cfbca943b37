"""Removal paths: in which order the choices of a group go, and what each step costs each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.coupling import Coupling
from fxprune.grouping import Group


@dataclass(frozen=True, slots=True)
class RemovalPath:
    """In which order the choices of a group go.

    Attributes:
        group: index of the group.
        choices: (steps, choices per step) which go.
        errors: (steps, tasks) what each step adds to the loss of each task, or to a score that stands for it.
        takes: how many choices of a step are of each cell of the group, in order.
    """

    group: int
    choices: np.ndarray
    errors: np.ndarray
    takes: tuple[int, ...]

    def weighed(self, weights: np.ndarray) -> RemovalPath:
        """Return the path with the errors of each task times its weight, (tasks,)."""
        return RemovalPath(self.group, self.choices, self.errors * weights, self.takes)

    def without(self, held: np.ndarray) -> RemovalPath:
        """Return the path on which the choices `held` (channels,) bool stay; the others of their cell move up."""
        stays = ~held[self.choices]
        if stays.all():
            return self
        ends = np.cumsum(self.takes)
        cells = [self.choices[:, end - take : end] for end, take in zip(ends, self.takes, strict=True)]
        left = [cell[~held[cell]] for cell in cells]
        steps = min(len(cell) // take for cell, take in zip(left, self.takes, strict=True))
        rows = [cell[: steps * take].reshape(steps, take) for cell, take in zip(left, self.takes, strict=True)]
        errors = self.errors[stays.all(axis=1)] if len(self.takes) == 1 and self.takes[0] == 1 else self.errors
        return RemovalPath(self.group, np.concatenate(rows, axis=1), errors[:steps], self.takes)


def path_by_score(group: Group, total: np.ndarray) -> RemovalPath:
    """Return the path on which the lowest score goes first.

    Args:
        group: the group.
        total: (channels,) score of every choice; infinite where it may not go.
    """
    choices = group.path(total)
    return RemovalPath(group.index, choices, total[choices].sum(axis=1)[:, None], group.takes)


def paths_by_score(coupling: Coupling, score: np.ndarray) -> Sequence[RemovalPath]:
    """Return the paths of all groups.

    Args:
        coupling: the coupled network.
        score: (channels,) one score per channel; a choice's score is the sum over its members.
    """
    total = coupling.members.total(score).astype(np.float64)
    total[coupling.is_frozen] = np.inf
    return [path_by_score(group, total) for group in coupling.groups()]


def paths_in_any_order(coupling: Coupling) -> Sequence[RemovalPath]:
    """Return paths of all groups for where only counts matter, not which channels go first."""
    return paths_by_score(coupling, np.ones(coupling.num_channels))
