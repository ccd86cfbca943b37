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
        inverse: (n, n) of the damped moment, where it is known; it is not changed.
    """

    weight: torch.Tensor
    second: torch.Tensor
    sensitivity: torch.Tensor
    choice: np.ndarray
    inverse: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Elimination:
    """A removal path.

    Attributes:
        order: (steps, choices per step) which choices go, step by step.
        errors: (steps, tasks) what each step adds to the loss of each task.
    """

    order: np.ndarray
    errors: np.ndarray


@dataclass(slots=True)
class _Blocks:
    """Choices that go with equally many inputs of a unit; their inputs lie side by side.

    Attributes:
        choices: (c,) which.
        start: where the inputs of the first are.
        inverse: (c, size, size) blocks of the inverse, up to date; those of choices that are gone mean nothing.
    """

    choices: np.ndarray
    start: int
    inverse: torch.Tensor

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return (c, size, k) what (inputs of the unit, k) values have for the choices."""
        count, size = self.inverse.shape[:2]
        return values[self.start : self.start + count * size].unflatten(0, (count, size))


class _State:
    """A unit from which inputs go one after the other.

    This is a Cholesky factorization of H^-1 whose pivots are the inputs that go, chosen on the way. It looks left: what
    is left of H^-1 is not written down, but for the blocks of each choice, which say what goes next.
    """

    def __init__(self, unit: Unit, damping: float) -> None:
        m = unit.weight.shape[2]
        self._sensitivity = unit.sensitivity
        scale = torch.einsum("tii->", unit.sensitivity) / max(m, 1)
        floor = torch.eye(m, dtype=torch.float64) * (damping * scale).clamp_min(1e-30)
        self._metric = torch.linalg.cholesky(unit.sensitivity.sum(0) + floor)  # C: e^T (C C^T) e
        inverse = unit.inverse
        if inverse is None:
            inverse = damped_inverse(unit.second, float(unit.second.diagonal().mean()) * damping)
        self._inverse = inverse.numpy()
        choices, which, counts = np.unique(unit.choice, return_inverse=True, return_counts=True)
        order = np.lexsort((which, counts[which]))
        order = order[unit.choice[order] >= 0]
        self._at = order  # rows of the inverse; those of one choice side by side
        self._choice = unit.choice[order]  # -1 once it is gone
        self._left = (unit.weight[torch.from_numpy(order)] @ self._metric).flatten(1)  # (n, copies * m)
        self._done = self._gone = 0  # how many inputs have gone; how many of them are not forgotten
        self._factor = torch.empty(len(order), len(order), dtype=torch.float64)  # (rows, n), of which `_done` are known
        self._lost: list[tuple[np.ndarray, torch.Tensor]] = []  # choices, and errors that each of their inputs left
        self._blocks: list[_Blocks] = []
        start = 0
        for size in np.unique(counts[choices >= 0]):
            alike = choices[(counts == size) & (choices >= 0)]
            at = order[start : start + len(alike) * size].reshape(len(alike), size)
            blocks = torch.from_numpy(self._inverse[at[:, :, None], at[:, None, :]])
            self._blocks.append(_Blocks(alike, start, blocks))
            start += at.size

    def scores(self, total: np.ndarray) -> None:
        """Add the error of each choice that is left, if it goes next, to `total` (choices,)."""
        for blocks in self._blocks:
            left = blocks.of(self._left)
            if left.shape[1] == 1:
                error = torch.linalg.vector_norm(left, dim=2).square() / blocks.inverse[:, :, 0]
            else:
                error = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks.inverse), left, upper=False)
                error = torch.linalg.vector_norm(error, dim=2).square()
            total[blocks.choices] += error.sum(1).numpy() / 2

    def remove(self, going: np.ndarray, *, free: bool = False) -> None:
        """Remove choices in the order given; at no cost, if so."""
        rank = np.full(max(int(self._choice.max(initial=-1)), int(going.max(initial=-1))) + 2, -1)
        rank[going] = np.arange(len(going))
        place = rank[self._choice]  # the last entry, -1, is for inputs that are gone
        gone = np.flatnonzero(place >= 0)
        if not len(gone):
            return
        gone = gone[np.argsort(place[gone], kind="stable")]
        s = torch.from_numpy(gone)
        across = torch.from_numpy(self._inverse[np.ix_(self._at[gone], self._at)])
        before = self._factor[: self._done]
        across.addmm_(before[:, s].T, before, alpha=-1)
        pivots = torch.linalg.cholesky(across[:, s])
        across = torch.linalg.solve_triangular(pivots, across, upper=False)
        left = torch.linalg.solve_triangular(pivots, self._left[s], upper=False)
        if not free:
            self._lost.append((self._choice[gone], left))
        self._left.addmm_(across.T, left, alpha=-1)
        self._factor[self._done : self._done + len(gone)] = across
        self._choice[gone] = -1
        self._done, self._gone = self._done + len(gone), self._gone + len(gone)
        self._downdate(across)
        if 8 * self._gone > len(self._choice):
            self._forget()

    def add_costs(self, total: np.ndarray) -> None:
        """Add what the removal of each choice has cost each task to `total` (choices, tasks)."""
        if not self._lost:
            return
        choices, errors = zip(*self._lost, strict=True)
        left = torch.cat(errors)  # (inputs, copies * m), in the metric
        m = len(self._metric)
        e = torch.linalg.solve_triangular(self._metric, left.reshape(-1, m), upper=False, left=False)
        costs = [((e @ g) * e).sum(1).reshape(len(left), -1).sum(1) for g in self._sensitivity]
        np.add.at(total, np.concatenate(choices), torch.stack(costs, 1).numpy() / 2)

    def _downdate(self, across: torch.Tensor) -> None:
        """Bring the blocks of all choices up to date with new rows (rows, n) of the factor."""
        for blocks in self._blocks:
            new = blocks.of(across.T)
            count, size = new.shape[:2]
            if size == 1:
                blocks.inverse -= new.square().sum(2, keepdim=True)
                continue
            blocks.inverse -= new @ new.mT
            gone = self._choice[blocks.start : blocks.start + count * size : size] < 0
            blocks.inverse[torch.from_numpy(gone)] = torch.eye(size, dtype=torch.float64)

    def _forget(self) -> None:
        """Leave out inputs that are gone."""
        stays = self._choice >= 0
        kept = np.flatnonzero(stays)
        start = 0
        for blocks in self._blocks:
            count, size = blocks.inverse.shape[:2]
            alive = stays[blocks.start : blocks.start + count * size : size]
            blocks.choices, blocks.inverse = blocks.choices[alive], blocks.inverse[torch.from_numpy(alive)]
            blocks.start = start
            start += len(blocks.choices) * size
        self._blocks = [blocks for blocks in self._blocks if len(blocks.choices)]
        self._choice, self._at, self._left = self._choice[kept], self._at[kept], self._left[torch.from_numpy(kept)]
        known = self._factor.numpy()[: self._done, kept]
        self._factor, self._gone = torch.empty(len(self._factor), len(kept), dtype=torch.float64), 0
        self._factor[: self._done] = torch.from_numpy(known)


def damped_inverse(second: torch.Tensor, level: float) -> torch.Tensor:
    """Invert a second moment (n, n), `level` added to its diagonal; more where rounding has made it indefinite."""
    return torch.cholesky_inverse(_damped_factor(second, level))


def damped_solve(second: torch.Tensor, level: float, right: torch.Tensor) -> torch.Tensor:
    """Return what `damped_inverse(second, level) @ right` is, for right (n, k)."""
    return torch.cholesky_solve(right, _damped_factor(second, level))


def _damped_factor(second: torch.Tensor, level: float) -> torch.Tensor:
    """Return the Cholesky factor. How far the least eigenvalue is below zero says how far rounding has moved others."""
    damped = second.clone()
    damped.diagonal().add_(max(level, 1e-20))
    factor, info = torch.linalg.cholesky_ex(damped)
    if info:
        values = torch.linalg.eigvalsh(second)
        exact = len(values) * torch.finfo(values.dtype).eps * values[-1]
        damped.diagonal().add_(2 * torch.maximum(-values[0], exact))
        factor = torch.linalg.cholesky(damped)
    return factor


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
    chunk: float = CHUNK,
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
            state.remove(first, free=True)
    left = [np.sort(cell) for cell in cells]
    order: list[np.ndarray] = []
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
        for state in states:
            state.remove(rows.ravel())
        order += list(rows)
    costs = own.copy()
    for state in states:
        state.add_costs(costs)
    steps_taken = np.array(order, dtype=np.int64).reshape(-1, sum(takes))
    return Elimination(steps_taken, costs[steps_taken].sum(axis=1))
