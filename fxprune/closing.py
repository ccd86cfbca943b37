"""Close the record of an interpretation: which atoms are one channel, and which channels may not go.

Union-find over ties, then congruence: equal rows, equal products and what follows from frozen ones, to a fixed point.
All passes are vectorised; the work is near-linear in atoms and ties.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fxprune.atoms import FIXED, Ledger
from fxprune.needs import hold_needed

Pairs = tuple[np.ndarray, np.ndarray]


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the distinct numbers, ascending: `np.unique` by sorting, which is faster than its hashing."""
    ordered = np.sort(numbers, axis=None)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if ordered.size else ordered


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Hash integers to 64 bits (splitmix64), the same on every machine."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def spans(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return start[0], .., start[0] + count[0] - 1, start[1], .., one range after the other."""
    return np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)


def owner(ids: np.ndarray) -> np.ndarray:
    """Return the array of which `ids` is a mere reshaping, or `ids` itself: equal owners have equal positions."""
    base = ids.base
    return base if type(base) is np.ndarray and base.size == ids.size and ids.flags.c_contiguous else ids


@dataclass(frozen=True, slots=True)
class Classes:
    """The channels of one interpretation, numbered by their first atom.

    Attributes:
        of_atom: (atoms + 1,) channel of each atom; the last entry serves `FIXED`.
        num_channels: how many channels there are.
        frozen_by: (channels,) index into the ledger's freezes that says why a channel may not go, or -1.
    """

    of_atom: np.ndarray
    num_channels: int
    frozen_by: np.ndarray
    _known: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)
    """id of the owner of an array of atoms -> the owner, and the channels of its positions in a row."""

    def of(self, atoms: np.ndarray) -> np.ndarray:
        """Return the channels of atoms; `FIXED` stays."""
        return self.of_atom[atoms]

    def channels(self, atoms: np.ndarray) -> np.ndarray:
        """Return the channels of labels; those of reshapings of one array share their memory, and so their owner."""
        home = owner(atoms)
        found = self._known.get(id(home))
        if found is None:
            found = self._known[id(home)] = (home, self.of_atom[atoms].ravel())
        return found[1].reshape(atoms.shape)


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return, for each of `n` nodes, the smallest node it is connected to by the edges (a[i], b[i])."""
    parent = np.arange(n, dtype=np.int64)
    while True:
        a, b = parent[a], parent[b]
        differ = a != b
        if not differ.any():
            return parent
        a, b = a[differ], b[differ]
        a, b = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(parent, b, a)
        while True:
            up = parent[parent]
            if np.array_equal(up, parent):
                break
            parent = up


def close(ledger: Ledger) -> Classes:
    """Find the channels of everything the ledger has recorded."""
    n = ledger.num_atoms
    empty = np.empty(0, dtype=np.int64)
    a = np.concatenate([tie.a for tie in ledger.ties] or [empty])
    b = np.concatenate([tie.b for tie in ledger.ties] or [empty])
    root = components(n, a, b)
    rows = _by_width(ledger)
    reason = np.full(n, -1, dtype=np.int64)
    for index in reversed(range(len(ledger.freezes))):
        reason[root[ledger.freezes[index].atoms]] = index
    while True:
        reason, spread = _spread_frozen(ledger, rows, root, reason)
        pairs = [*_equal_rows(rows, root), *_equal_products(ledger, rows, root, reason)]
        a = np.concatenate([p[0] for p in pairs] or [empty])
        b = np.concatenate([p[1] for p in pairs] or [empty])
        if (a == b).all():
            if not spread and not hold_needed(ledger, root, reason):
                break
            continue
        joined = components(n, a, b)
        reason = _joined_reasons(reason, joined)
        root = joined[root]
    roots, of_atom = np.unique(root, return_inverse=True)
    return Classes(np.append(of_atom, FIXED), len(roots), reason[roots])


def _joined_reasons(reason: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """Carry the earliest reason of each root over to the root it was joined into."""
    late = np.iinfo(np.int64).max
    merged = np.full(len(reason), late)
    np.minimum.at(merged, joined, np.where(reason < 0, late, reason))
    return np.where(merged == late, -1, merged)


_Rows = list[tuple[np.ndarray, np.ndarray]]
"""The rows of each width, (rows, width) atoms, and their atoms (rows,)."""


def _by_width(ledger: Ledger) -> _Rows:
    """Lay all rows of the same width below each other, without those that always stay."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for batch in ledger.rows:
        real = batch.row != FIXED
        columns, row = (batch.columns, batch.row) if real.all() else (batch.columns[real], batch.row[real])
        if len(row):
            found.setdefault(columns.shape[1], []).append((columns, row))
    return [(np.concatenate([c for c, _ in same]), np.concatenate([r for _, r in same])) for same in found.values()]


def _reaches_rows(rows: _Rows, root: np.ndarray, reason: np.ndarray) -> bool:
    """Say whether a row that is not frozen has a frozen member."""
    is_frozen = reason[root] >= 0
    return any(bool((is_frozen[columns].any(axis=1) & ~is_frozen[row]).any()) for columns, row in rows)


def _spread_frozen(ledger: Ledger, rows: _Rows, root: np.ndarray, reason: np.ndarray) -> tuple[np.ndarray, bool]:
    """A row with a frozen member is frozen; a frozen product freezes both parents."""
    before = (reason >= 0).sum()
    for batch in ledger.rows if _reaches_rows(rows, root, reason) else ():
        real = batch.row != FIXED
        member = reason[root[batch.columns[real]]]
        row = root[batch.row[real]]
        cause = member.max(axis=1, initial=-1)
        reason[row] = np.where(reason[row] < 0, cause, reason[row])
    for batch in ledger.products:
        cause = reason[root[batch.atom]]
        for parent in (root[batch.row], root[batch.column]):
            hit = (cause >= 0) & (reason[parent] < 0)
            reason[parent[hit]] = cause[hit]
    return reason, bool((reason >= 0).sum() > before)


def _equal_rows(rows: _Rows, root: np.ndarray) -> list[Pairs]:
    """Rows with the same members are one; a row with one distinct member is that member."""
    pairs: list[Pairs] = []
    hashes = mixed(root)
    for columns, row in rows:
        members, channel = root[columns], root[row]
        single = (members == members[:, :1]).all(axis=1)
        pairs.append((channel[single], members[single, 0]))
        pairs.append(_same_key(hashes[columns].sum(axis=1), channel))
    return pairs


def _equal_products(ledger: Ledger, rows: _Rows, root: np.ndarray, reason: np.ndarray) -> list[Pairs]:
    """Products of equal parents are one, a frozen parent gives the other, r & s_1 ~ r & s_2 gives s_1 ~ s_2."""
    if not ledger.products:
        return []
    atom = root[np.concatenate([p.atom for p in ledger.products])]
    row = root[np.concatenate([p.row for p in ledger.products])]
    column = root[np.concatenate([p.column for p in ledger.products])]
    n = len(root)
    pairs: list[Pairs] = []
    for mine, other in ((row, column), (column, row)):
        certain = (reason[other] >= 0) | (mine == other)
        pairs.append((atom[certain], mine[certain]))
        proper = atom != mine
        pairs.append(_same_key((atom * n + mine)[proper], other[proper]))
    pairs.append(_same_key(np.minimum(row, column) * n + np.maximum(row, column), atom))
    pairs.extend(_one_crossing(atom, row, column))
    pairs.extend(_absorbed(rows, root, atom, row, column))
    return pairs


def _one_crossing(atom: np.ndarray, row: np.ndarray, column: np.ndarray) -> list[Pairs]:
    """Let a channel that is two crossings at once be one: r & s ~ r' & s' gives r ~ r' and s ~ s'.

    That is more than needed, but a channel must not go while the parents of another of its crossings stay.
    """
    _, first, inverse = np.unique(atom, return_index=True, return_inverse=True)
    other_row, other_column = row[first[inverse]], column[first[inverse]]
    proper = (atom != row) & (atom != column) & ((row != other_column) | (column != other_row))
    return [(row[proper], other_row[proper]), (column[proper], other_column[proper])]


def _same_key(keys: np.ndarray, values: np.ndarray) -> Pairs:
    """Pair every value with one of the same key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.append(True, ordered[1:] != ordered[:-1])[: len(order)]
    values = values[order]
    return values, values[first][np.cumsum(first) - 1]


def _absorbed(rows: _Rows, root: np.ndarray, atom: np.ndarray, row: np.ndarray, column: np.ndarray) -> list[Pairs]:
    """A row and one of its own members cross in that member: any(.., s, ..) & s is s."""
    n = len(root)
    asked = np.zeros(n, dtype=bool)
    asked[row] = asked[column] = True
    known = [np.empty(0, dtype=np.int64)]
    for columns, channel in rows:
        parents = asked[root[channel]]
        known.append((root[channel[parents], None] * n + root[columns[parents]]).ravel())
    members = np.append(distinct(np.concatenate(known)), n * n)
    pairs: list[Pairs] = []
    for r, s in ((row, column), (column, row)):
        code = r * n + s
        hit = members[np.searchsorted(members, code)] == code
        pairs.append((atom[hit], s[hit]))
    return pairs
