"""What channels need that is no row of theirs: r & s ~ r says that s stays as long as r does.

It comes about where a row is all or nothing, and each of its positions is also a crossing with a column of its own:
pairs of channels that only go together, read by a weight that is computed. All rows need `s` then, so it is frozen.
"""

from __future__ import annotations

import numpy as np

from fxprune.atoms import FIXED, Freeze, Ledger

REASON = "is needed by rows that stay in whole or not at all"


def hold_needed(ledger: Ledger, root: np.ndarray, reason: np.ndarray) -> bool:
    """Freeze what a channel needs and nothing else that is known makes stay; say whether there was any.

    Args:
        ledger: the record, closed as far as it goes; what is frozen is noted in it.
        root: (atoms,) which atom stands for the channel of each.
        reason: (atoms,) index into the ledger's freezes, or -1; what is frozen is noted in it.
    """
    found = [_needs(root[p.atom], root[p.row], root[p.column], reason) for p in ledger.products]
    if not any(pairs.size for pairs in found):
        return False
    known, (mine, other) = _implied(ledger, root), np.concatenate(found, axis=1)
    codes, n = np.sort(known[0] * len(root) + known[1]), len(root)
    at = np.minimum(np.searchsorted(codes, mine * n + other), len(codes) - 1)
    far = codes[at] != mine * n + other if len(codes) else np.ones(len(mine), dtype=bool)
    if not far.any():
        return False
    nodes = np.repeat(np.arange(len(found)), [pairs.shape[1] for pairs in found])
    known = known[:, np.argsort(known[0], kind="stable")]
    held: dict[str, set[int]] = {}
    for p, r, s in zip(nodes[far].tolist(), mine[far].tolist(), other[far].tolist(), strict=True):
        if not _leads(known, r, s):
            held.setdefault(ledger.products[p].node, set()).add(s)
    for node, channels in held.items():
        atoms = np.array(sorted(channels))
        reason[atoms] = len(ledger.freezes)
        ledger.freezes.append(Freeze(atoms, node, REASON))
    return bool(held)


def _needs(atom: np.ndarray, row: np.ndarray, column: np.ndarray, reason: np.ndarray) -> np.ndarray:
    """Return the pairs (2, n) of channels r, s such that r & s is r, and s is not frozen."""
    found = []
    for mine, other in ((row, column), (column, row)):
        hit = (atom == mine) & (mine != other) & (reason[other] < 0)
        found.append(np.stack([mine[hit], other[hit]]))
    return np.concatenate(found, axis=1)


def _implied(ledger: Ledger, root: np.ndarray) -> np.ndarray:
    """Return pairs (2, n): while the first stays, so does the second; a column and its row, a crossing and a parent."""
    pairs: list[np.ndarray] = []
    for batch in ledger.rows:
        real = batch.row != FIXED
        columns = root[batch.columns[real]]
        row = np.broadcast_to(root[batch.row[real], None], columns.shape)
        pairs.append(np.stack([columns.ravel(), row.ravel()]))
    for batch in ledger.products:
        atom, row, column = root[batch.atom], root[batch.row], root[batch.column]
        proper = (atom != row) & (atom != column)
        pairs += [np.stack([atom[proper], parent[proper]]) for parent in (row, column)]
    return np.concatenate(pairs, axis=1)


def _leads(known: np.ndarray, a: int, b: int) -> bool:
    """Say whether `b` stays while `a` does, by the pairs `known` (2, n), sorted by their first, step by step."""
    seen, stack = {a}, [a]
    while stack and b not in seen:
        first, last = np.searchsorted(known[0], (at := stack.pop(), at + 1))
        fresh = set(known[1, first:last].tolist()) - seen
        seen |= fresh
        stack += fresh
    return b in seen
