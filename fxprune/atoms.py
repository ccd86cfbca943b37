"""Atoms: the integers that label positions, and everything said about them while a graph is interpreted.

An atom is one position of one dim at its birth. Interpreting a graph says four things of atoms: two of them live
and die together (a *tie*), one must stay (*frozen*), one is a row of others (*any*: it stays while a member stays)
and one is the crossing of a row and a column (*product*: it stays while both stay).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

FIXED = -1
"""The label of a position that always stays and belongs to no channel."""


_STAYS = np.ones(1, dtype=bool)


def and_fixed(keep: np.ndarray) -> np.ndarray:
    """Return what stays, (channels + 1,) bool, of `keep` (channels,) bool: the last entry serves `FIXED`."""
    return np.concatenate((keep, _STAYS))  # several times faster than `np.append`, and asked for every trial


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows that must keep equally many of their columns; `row[i]` stays while any of `columns[i]` stays."""

    columns: np.ndarray
    """(rows, width) atoms."""
    row: np.ndarray
    """(rows,) atoms."""
    node: str


@dataclass(frozen=True, slots=True)
class ProductBatch:
    """Atoms that stay while both of their parents stay. All arrays: (n,)."""

    atom: np.ndarray
    row: np.ndarray
    column: np.ndarray
    node: str


@dataclass(frozen=True, slots=True)
class Tie:
    """Pairs of atoms that one node tied. All arrays: (n,)."""

    a: np.ndarray
    b: np.ndarray
    node: str


@dataclass(frozen=True, slots=True)
class Freeze:
    """Atoms that must stay, with the node that says so and the reason. `atoms`: (n,)."""

    atoms: np.ndarray
    node: str
    reason: str


@dataclass(slots=True)
class Ledger:
    """The record of one interpretation. `node` is the node being interpreted: every entry is stamped with it."""

    num_atoms: int = 0
    node: str = ""
    ties: list[Tie] = field(default_factory=list)
    rows: list[RowBatch] = field(default_factory=list)
    products: list[ProductBatch] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    births: list[tuple[int, str]] = field(default_factory=list)
    """(first atom, node) of every issue, ascending."""
    _constant: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=bool))
    """(at least atoms + 1,): which are made of a constant, wholly or in part; the last entry serves `FIXED`."""
    _rows_seen: dict[tuple[bytes, int], np.ndarray] = field(default_factory=dict)
    _owned: set[tuple[bytes, bytes]] = field(default_factory=set)
    _products_seen: dict[bytes, np.ndarray] = field(default_factory=dict)
    _parents: np.ndarray = field(default_factory=lambda: np.empty((2, 0), dtype=np.int64))
    """(2, at most about twice as many as atoms): row and column of each atom that is a crossing, -1 for others."""

    def copy(self) -> Ledger:
        """Return a ledger that says the same and can be written to."""
        return replace(
            self,
            ties=list(self.ties),
            rows=list(self.rows),
            products=list(self.products),
            freezes=list(self.freezes),
            births=list(self.births),
            _constant=self._constant.copy(),
            _rows_seen={},
            _owned=set(),
            _products_seen={},
            _parents=self._parents.copy(),
        )

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        """Issue new atoms, numbered in order."""
        n = math.prod(shape)
        atoms = np.arange(self.num_atoms, self.num_atoms + n, dtype=np.int64).reshape(shape)
        self.births.append((self.num_atoms, self.node))
        self.num_atoms += n
        return atoms

    def mark(self, atoms: np.ndarray) -> None:
        """Remember that these atoms are made of a constant: the dense network has them whatever else goes."""
        if not atoms.size:
            return
        if len(self._constant) <= self.num_atoms:
            self._constant = np.append(self._constant, np.zeros(self.num_atoms + 1, dtype=bool))
        self._constant[atoms] = True

    @property
    def has_constants(self) -> bool:
        """Whether any atom is made of a constant."""
        return len(self._constant) > 1

    def is_constant(self, atoms: np.ndarray) -> np.ndarray:
        """Return which atoms are made of a constant, wholly or in part."""
        if not self.has_constants:
            return np.zeros(atoms.shape, dtype=bool)
        return (atoms < len(self._constant)) & self._constant.take(atoms, mode="clip") & (atoms != FIXED)

    def chosen(self, a: np.ndarray, b: np.ndarray, constant: bool) -> np.ndarray:
        """Return, of two tied atoms at each position, one that is made of a constant, or one that is not."""
        if not self.has_constants or a.shape != b.shape:
            return a
        swap = (self.is_constant(a) != constant) & (self.is_constant(b) == constant)
        return np.where(swap, b, a) if swap.any() else a

    def constants(self, atoms: np.ndarray) -> np.ndarray:
        """Return the constants that these atoms are made of: of a crossing, those among its parents."""
        found = [np.empty(0, dtype=np.int64)]
        left = np.unique(atoms[self.is_constant(atoms)]) if self.has_constants else found[0]
        while left.size:
            parents = self._parents_of(left)
            crossing = parents[0] != FIXED
            found.append(left[~crossing])
            parents = parents[:, crossing].ravel()
            left = np.unique(parents[self.is_constant(parents)])
        return np.unique(np.concatenate(found)) if len(found) > 1 else found[0]

    def tie(self, a: np.ndarray, b: np.ndarray, reason: str = "is tied to positions that cannot go") -> None:
        """Say that `a` and `b` (broadcast against each other) live and die together, position by position."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        differ = a != b
        if not differ.all():
            a, b = a[differ], b[differ]
        if not a.size:
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.freeze(np.maximum(a, b)[fixed], reason)
            a, b = a[~fixed], b[~fixed]
        if a.size:
            self.ties.append(Tie(a, b, self.node))

    def tie_row(self, row: np.ndarray, owner: np.ndarray) -> None:
        """Say that `owner` labels the rows `row`, and remember it."""
        self.tie(row, owner, "is a row whose number cannot change")
        if row.size == owner.size:
            self._owned.add((row.tobytes(), owner.tobytes()))

    def is_row(self, row: np.ndarray, owner: np.ndarray) -> bool:
        """Say whether `owner` was said to label the rows `row`."""
        return (row.tobytes(), owner.tobytes()) in self._owned

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        """Say that these atoms must stay."""
        atoms = atoms[atoms != FIXED]
        if atoms.size:
            self.freezes.append(Freeze(atoms, self.node, reason))

    def any_along(self, ids: np.ndarray, dim: int) -> np.ndarray:
        """Return the row atoms of `ids` over `dim` (kept with size 1); record that the rows are balanced."""
        if ids.shape[dim] == 1:
            return ids
        moved = ids.transpose([*range(dim), *range(dim + 1, ids.ndim), dim])
        columns = np.ascontiguousarray(moved).reshape(-1, ids.shape[dim])
        key = (columns.tobytes(), columns.shape[1])
        row = self._rows_seen.get(key)
        if row is None:
            row = self.fresh((columns.shape[0],))
            row[(columns == FIXED).any(1)] = FIXED
            self.mark(row[self.is_constant(columns).any(1) & (row != FIXED)])
            self._rows_seen[key] = row
            self.rows.append(RowBatch(columns, row, self.node))
        return row.reshape([1 if d == dim else n for d, n in enumerate(ids.shape)])

    def product(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return atoms that stay while both `row` and `column` (broadcast against each other) stay."""
        row, column = np.broadcast_arrays(row, column)
        result = np.where(row == FIXED, column, row)
        real = (row != FIXED) & (column != FIXED) & (row != column)
        if not real.any():
            return result
        codes, inverse = np.unique(row[real] * self.num_atoms + column[real], return_inverse=True)
        pairs = np.stack(np.divmod(codes, self.num_atoms))
        key = pairs.tobytes()
        atoms = self._products_seen.get(key)
        if atoms is None:
            atoms = self.fresh((len(codes),))
            self.mark(atoms[self.is_constant(pairs).any(0)])
            self._products_seen[key] = atoms
            self.products.append(ProductBatch(atoms, pairs[0], pairs[1], self.node))
            if self._parents.shape[1] < self.num_atoms:
                none = np.full((2, self.num_atoms), FIXED, dtype=np.int64)
                self._parents = np.concatenate([self._parents, none], axis=1)
            self._parents[:, atoms] = pairs
        result[real] = atoms[inverse]
        return result

    def parents(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the row and column parents of every atom in `ids`, or None when some atom is no product."""
        if not self._parents.size:
            return None
        row, column = self._parents_of(ids)
        return None if (row == FIXED).any() else (row, column)

    def factors(self, ids: np.ndarray) -> list[np.ndarray]:
        """Take crossings of crossings apart: return what the atoms in `ids` are crossings of, or `ids` itself."""
        parents = self.parents(ids)
        return [ids] if parents is None else [f for parent in parents for f in self.factors(parent)]

    def _parents_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the row and the column (2, *ids) of every atom, `FIXED` where it is no product."""
        known = (ids >= 0) & (ids < self._parents.shape[1])
        found = np.full((2, *ids.shape), FIXED, dtype=np.int64)
        found[:, known] = self._parents[:, ids[known]]
        return found
