"""Which inputs of linear maps go first, and at what error, when those that stay are corrected as well as can be.

For y = W^T x with second moment H = E[x x^T], let S be inputs that go. The best correction of the others leaves the
error tr(W_S^T ((H^-1)_SS)^-1 W_S), weighted by how the loss answers to y. One elimination gives it at every width:
H^-1 is brought up to date with each step (Hassibi and Stork, Optimal Brain Surgeon, 1992, for blocks of columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

DAMPING = 0.01
"""What is added to moments before they are inverted, as a share of their mean diagonal."""
CHUNK = 16
"""At each round, one of so many of the choices that are left goes, at least one: then all are scored again."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A linear map that reads choices.

    Attributes:
        weight: (n, copies, m): `copies` maps that read the same inputs, such as the taps of a kernel.
        second: (n, n) moment of the inputs.
        sensitivity: (tasks, m, m): an error e of the output costs task t `e^T sensitivity[t] e / 2`.
        choice: (n,) which choice an input goes with, -1 for none.
    """

    weight: torch.Tensor
    second: torch.Tensor
    sensitivity: torch.Tensor
    choice: np.ndarray


@dataclass(frozen=True, slots=True)
class Elimination:
    """A removal path.

    Attributes:
        order: (steps, choices per step) which choices go, step by step.
        errors: (steps, tasks) what each step adds to the loss of each task.
    """

    order: np.ndarray
    errors: np.ndarray


class _State:
    """A unit from which inputs go one after the other."""

    def __init__(self, unit: Unit, damping: float) -> None:
        m = unit.weight.shape[2]
        scale = torch.einsum("tii->", unit.sensitivity) / max(m, 1)
        floor = torch.eye(m, dtype=torch.float64) * (damping * scale).clamp_min(1e-30)
        self.metric = torch.linalg.cholesky(unit.sensitivity.sum(0) + floor)  # C: e^T (C C^T) e
        self.tasks = torch.linalg.solve_triangular(
            self.metric, torch.linalg.solve_triangular(self.metric, unit.sensitivity, upper=False).mT, upper=False
        )  # C^-1 G_t C^-T
        self.left = unit.weight @ self.metric  # (n, copies, m)
        self.inverse = damped_inverse(unit.second, float(unit.second.diagonal().mean()) * damping)
        self.choice = unit.choice

    def scores(self, total: np.ndarray) -> None:
        """Add the error of each choice that is left, if it goes next, to `total` (choices,)."""
        order = np.argsort(self.choice, kind="stable")
        order = order[self.choice[order] >= 0]
        choices, counts = np.unique(self.choice[order], return_counts=True)
        starts = np.cumsum(counts) - counts
        for size in np.unique(counts):
            alike = counts == size
            at = torch.from_numpy(order[starts[alike][:, None] + np.arange(size)])  # (choices, size)
            left = self.left[at].flatten(2)  # (choices, size, copies * m)
            if size == 1:
                error = left.square().sum((1, 2)) / self.inverse[at[:, 0], at[:, 0]]
            else:
                blocks = self.inverse[at[:, :, None], at[:, None, :]]
                error = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), left, upper=False)
                error = error.square().sum((1, 2))
            total[choices[alike]] += error.numpy() / 2

    def remove(self, going: np.ndarray, errors: np.ndarray | None) -> None:
        """Remove choices in the order given; add what each costs each task to `errors` (choices, tasks)."""
        rank = np.full(max(int(self.choice.max(initial=-1)), int(going.max(initial=-1))) + 2, -1)
        rank[going] = np.arange(len(going))
        place = rank[self.choice]  # the last entry, -1, is for inputs of no choice
        gone = np.flatnonzero(place >= 0)
        if not len(gone):
            return
        gone = gone[np.argsort(place[gone], kind="stable")]
        stay = np.flatnonzero(place < 0)
        s, k = torch.from_numpy(gone), torch.from_numpy(stay)
        factor = torch.linalg.cholesky(self.inverse[s[:, None], s])
        left = torch.linalg.solve_triangular(factor, self.left[s].flatten(1), upper=False)
        if errors is not None:
            each = left.reshape(len(gone), *self.left.shape[1:])
            costs = torch.einsum("scm,tmn,scn->st", each, self.tasks, each).numpy() / 2
            np.add.at(errors, place[gone], costs)
        across = torch.linalg.solve_triangular(factor, self.inverse[s[:, None], k], upper=False)
        self.inverse = self.inverse[k[:, None], k] - across.T @ across
        self.left = self.left[k] - (across.T @ left).reshape(len(stay), *self.left.shape[1:])
        self.choice = self.choice[stay]


def damped_inverse(second: torch.Tensor, level: float) -> torch.Tensor:
    """Invert a second moment (n, n), `level` added to its diagonal; what rounding made negative counts as zero."""
    level = max(level, 1e-20)
    factor, info = torch.linalg.cholesky_ex(second + level * torch.eye(len(second), dtype=torch.float64))
    if not info:
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh(second)
    return vectors @ ((values.clamp_min(0) + level).reciprocal()[:, None] * vectors.T)


def eliminate(
    units: Sequence[Unit],
    cells: Sequence[np.ndarray],
    takes: Sequence[int],
    *,
    steps: int,
    tasks: int,
    first: np.ndarray | None = None,
    own: np.ndarray | None = None,
    damping: float = DAMPING,
    chunk: int = CHUNK,
) -> Elimination:
    """Let choices go, cheapest first, summed over all maps that read them.

    Args:
        units: the maps.
        cells: arrays of choices, numbered from 0; of each cell some go at every step.
        takes: how many.
        steps: after how many steps to stop.
        tasks: how many tasks the units' sensitivities have.
        first: choices that are gone before the first step, at no cost.
        own: (choices, tasks) what the removal of each choice costs besides.
        damping: added to the moments, as a share of their mean diagonal.
        chunk: as `CHUNK`; infinite for one step at a time.
    """
    count = 1 + max([int(c.max(initial=-1)) for c in (*cells, *(u.choice for u in units))], default=-1)
    own = np.zeros((count, tasks)) if own is None else own
    states = [_State(unit, damping) for unit in units]
    if first is not None and len(first):
        for state in states:
            state.remove(first, None)
    left = [np.sort(cell) for cell in cells]
    order: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    while len(order) < steps:
        score = own.sum(axis=1)
        for state in states:
            state.scores(score)
        least = min(len(cell) // take for cell, take in zip(left, takes, strict=True))
        now = min(max(1, int(least / chunk)), steps - len(order))
        going = []
        for i, (cell, take) in enumerate(zip(left, takes, strict=True)):
            ranked = cell[np.argsort(score[cell], kind="stable")][: now * take]
            left[i] = np.setdiff1d(cell, ranked, assume_unique=True)
            going.append(ranked.reshape(now, take))
        rows = np.concatenate(going, axis=1)
        added = own[rows.ravel()].copy()
        for state in states:
            state.remove(rows.ravel(), added)
        order += list(rows)
        errors += list(added.reshape(now, -1, tasks).sum(axis=1))
    per_step = sum(takes)
    return Elimination(np.array(order, dtype=np.int64).reshape(-1, per_step), np.array(errors).reshape(-1, tasks))
