"""Sparse approximation: which vectors of a dictionary to keep, so that linear combinations of them give all others.

Everything is read off inner products. Let F hold the vectors, A those that are kept, G = (A^T A)^-1, and let
Lam = G A^T F hold the best coefficients. To give up the kept vector k raises the squared error, summed over all
vectors, by |Lam[k, :]|^2 / G[k, k]; then G and Lam are brought up to date with one product of rank 1. To take in a
vector l subtracts R[:, l] R[l, :] / R[l, l] from the inner products R of what is not explained yet. Either way, one
path through a layer of n filters takes O(n^3) operations and gives every budget.

Source: Purohit et al., A Greedy Hierarchical Approach to Whole-Network Filter-Pruning in CNNs (TMLR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

RANK = 1e-10
"""Eigenvalues below this share of the largest are taken for zero: the vectors depend on each other linearly."""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Vectors that stand for each other, such as the filters of a layer.

    Attributes:
        gram: (n, n) their inner products, in float64.
        choice: (n,) which choice a vector goes with; -1 for one that stays.
    """

    gram: torch.Tensor
    choice: np.ndarray

    @property
    def total(self) -> float:
        """The sum of squares of the vectors that may go: what errors are a share of."""
        return max(float(self.gram.diagonal()[torch.from_numpy(self.choice >= 0)].sum()), 1e-300)


@dataclass(frozen=True, slots=True)
class Approximation:
    """A removal path.

    Attributes:
        order: (steps, choices per step) which choices go, step by step.
        errors: (steps,) what each step adds to the squared error, as a share of the dictionary's sum of squares; summed
            over dictionaries.
    """

    order: np.ndarray
    errors: np.ndarray


class _Kept:
    """A dictionary from which vectors go one after the other."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.gram = dictionary.gram / dictionary.total
        self.choice = dictionary.choice
        self.place = np.arange(len(self.choice))
        self._start()

    def _start(self) -> None:
        """Invert what is left; where vectors depend on each other, with a ridge that tells by how much."""
        at = torch.from_numpy(self.place)
        inside = self.gram[at[:, None], at]
        values, basis = torch.linalg.eigh(inside)
        values = values.clamp_min(0)
        least, most = (float(values[0]), float(values[-1])) if len(values) else (1.0, 1.0)
        self.ridge = max(RANK * most, 1e-30) if least <= RANK * most else 0.0
        self.inverse = basis @ ((values + self.ridge).reciprocal()[:, None] * basis.T)
        if self.ridge:
            inner = basis @ ((values / (values + self.ridge))[:, None] * basis.T)
            others = np.setdiff1d(np.arange(self.gram.shape[1]), self.place)
            self.lam = self.inverse.new_zeros(len(at), self.gram.shape[1])
            self.lam[:, at] = inner
            self.lam[:, others] = self.inverse @ self.gram[at[:, None], torch.from_numpy(others)]
        else:
            self.lam = self.inverse @ self.gram[at]

    @property
    def _broken(self) -> bool:
        """Whether what is left has become independent, or rounding has eaten up the inverse."""
        diagonal = self.inverse.diagonal()
        if self.ridge and float(diagonal.sum()) * self.ridge < 0.5:
            return True
        bound = self.gram.diagonal()[torch.from_numpy(self.place)] + self.ridge
        return bool((diagonal * bound < 1 - 1e-6).any())  # no inverse has less on its diagonal

    def rises(self, total: np.ndarray) -> None:
        """Add to `total` (choices,) by how much the error rises if a choice goes next."""
        if not (self.choice >= 0).any():
            return
        diagonal, squares = self.inverse.diagonal(), self.lam.square().sum(1)
        known, counts = np.unique(self.choice[self.choice >= 0], return_counts=True)
        alone = np.isin(self.choice, known[counts == 1])
        np.add.at(total, self.choice[alone], (squares / diagonal).numpy()[alone])
        for choice in known[counts > 1]:
            total[choice] += self._rise(np.flatnonzero(self.choice == choice))

    def _rise(self, at: np.ndarray) -> float:
        s = torch.from_numpy(at)
        factor = torch.linalg.cholesky(self.inverse[s[:, None], s])
        return float(torch.linalg.solve_triangular(factor, self.lam[s], upper=False).square().sum())

    def remove(self, going: np.ndarray) -> float:
        """Let choices go; return by how much the error rises."""
        flags = np.isin(self.choice, going)
        if not flags.any():
            return 0.0
        before = self._rise(np.flatnonzero(flags))
        s, k = (torch.from_numpy(np.flatnonzero(f)) for f in (flags, ~flags))
        factor = torch.linalg.cholesky(self.inverse[s[:, None], s])
        across = torch.linalg.solve_triangular(factor, self.inverse[s[:, None], k], upper=False)
        left = torch.linalg.solve_triangular(factor, self.lam[s], upper=False)
        self.inverse = self.inverse[k[:, None], k] - across.T @ across
        self.lam = self.lam[k] - across.T @ left
        self.choice, self.place = self.choice[~flags], self.place[~flags]
        if self._broken:
            self._start()
        return before


def backward(
    dictionaries: Sequence[Dictionary], cells: Sequence[np.ndarray], takes: Sequence[int], steps: int | None = None
) -> Approximation:
    """Let choices go, at every step those without which the error rises least.

    Where vectors depend on each other linearly, those that depend most on others go first, at no cost.

    Args:
        dictionaries: in each, a choice that goes takes its vectors along.
        cells: arrays of choices, numbered from 0; of each cell some go at every step.
        takes: how many.
        steps: after how many steps to stop; as many as there are without it.
    """
    states = [_Kept(d) for d in dictionaries]
    count = 1 + max([int(c.max(initial=-1)) for c in (*cells, *(d.choice for d in dictionaries))], default=-1)
    left = [np.sort(cell) for cell in cells]
    order: list[np.ndarray] = []
    errors: list[float] = []
    most = _steps(cells, takes)
    for _ in range(most if steps is None else min(steps, most)):
        rise = np.zeros(count)
        for state in states:
            state.rises(rise)
        going = [cell[np.argsort(rise[cell], kind="stable")][:take] for cell, take in zip(left, takes, strict=True)]
        left = [np.setdiff1d(cell, gone, assume_unique=True) for cell, gone in zip(left, going, strict=True)]
        order.append(np.concatenate(going))
        errors.append(sum(state.remove(order[-1]) for state in states))
    return Approximation(np.array(order, dtype=np.int64).reshape(-1, sum(takes)), np.array(errors))


class _Explained:
    """A dictionary of which vectors are taken in one after the other."""

    def __init__(self, dictionary: Dictionary, targets: np.ndarray | None = None, *, normalised: bool) -> None:
        diagonal = dictionary.gram.diagonal().clamp_min(0)
        self.squares = (diagonal / dictionary.total).numpy()
        scale = diagonal.sqrt() if normalised else torch.full_like(diagonal, dictionary.total).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        self.rest = dictionary.gram / scale[:, None] / scale
        self.choice = dictionary.choice
        self._targets = None if targets is None else torch.from_numpy(targets)
        self._taken = np.zeros(len(diagonal), dtype=bool)
        self._floor = RANK * float(self.rest.diagonal().max()) if len(diagonal) else 0.0
        self.take(-1)

    def take(self, choice: int) -> None:
        """Take in the vectors of a choice."""
        for at in np.flatnonzero(self.choice == choice):
            pivot = float(self.rest[at, at])
            if pivot > self._floor:
                row = self.rest[at].clone()
                self.rest.addr_(row, row, alpha=-1 / pivot)
                self._taken[at] = True
        if self._taken.sum() * 8 > len(self._taken):
            self._forget()

    def _forget(self) -> None:
        """Drop the vectors that were taken in: nothing of them is left to explain, and they answer no more."""
        left = ~self._taken
        at = torch.from_numpy(np.flatnonzero(left))
        self.rest = self.rest[at[:, None], at]
        self._targets = None if self._targets is None else self._targets[at]
        self.choice, self.squares, self._taken = self.choice[left], self.squares[left], self._taken[left]

    def answers(self, total: np.ndarray) -> None:
        """Add to `total` (choices,) how much of what is not explained is along the vectors of each choice."""
        here = self.choice >= 0
        rest = self.rest if self._targets is None else self.rest[:, self._targets]
        np.add.at(total, self.choice[here], torch.linalg.vector_norm(rest, 1, dim=1).numpy()[here])

    @property
    def error(self) -> float:
        """The sum of squares that is not explained."""
        return float(self.rest.diagonal().clamp_min(0).sum())


def forward(
    dictionaries: Sequence[Dictionary], choices: np.ndarray, targets: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Take in choices, each time that along which most of what is not explained lies: orthogonal matching pursuit.

    Vectors are normalised; `max_l sum_j |r_j . f_l|` over the residuals r_j of all vectors is taken in next. Once
    nothing is left to explain, the longest go first.

    Args:
        dictionaries: in each, a choice takes its vectors in. Those of choice -1 are taken in first.
        choices: that are taken in, numbered from 0.
        targets: of each dictionary, (n,) bool which vectors are to be explained; all without it.

    Returns:
        (choices,) in which order.
    """
    wanted = [None] * len(dictionaries) if targets is None else targets
    states = [_Explained(d, t, normalised=True) for d, t in zip(dictionaries, wanted, strict=True)]
    count = 1 + max([int(c.max(initial=-1)) for c in (choices, *(d.choice for d in dictionaries))], default=-1)
    lengths = np.zeros(count)
    for state in states:
        here = state.choice >= 0
        np.add.at(lengths, state.choice[here], state.squares[here])
    open_, order = np.isin(np.arange(count), choices), []
    for _ in range(len(choices)):
        along = np.zeros(count)
        for state in states:
            state.answers(along)
        along = np.where(open_, along, -1.0)
        if along.max() <= 1e-7:
            along = np.where(open_, lengths, -1.0)
        best = int(np.argmax(along))
        order.append(best)
        open_[best] = False
        for state in states:
            state.take(best)
    return np.array(order, dtype=np.int64)


def errors_along(dictionaries: Sequence[Dictionary], order: np.ndarray) -> np.ndarray:
    """Return (steps,) what each step of a removal path adds to the error: see `Approximation.errors`.

    Args:
        dictionaries: of which the choices go.
        order: (steps, choices per step).
    """
    states = [_Explained(d, normalised=False) for d in dictionaries]
    gone = np.unique(order)
    for state in states:
        for choice in np.setdiff1d(np.unique(state.choice), np.append(gone, -1)):
            state.take(choice)
    found = [sum(state.error for state in states)]
    for row in order[::-1]:
        for state in states:
            for choice in row:
                state.take(choice)
        found.append(sum(state.error for state in states))
    return np.maximum(-np.diff(found), 0)[::-1]


def _steps(cells: Sequence[np.ndarray], takes: Sequence[int]) -> int:
    return min((len(cell) // take for cell, take in zip(cells, takes, strict=True)), default=0)
