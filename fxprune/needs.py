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
    needs: dict[str, set[tuple[int, int]]] = {}
    for batch in ledger.products:
        needs.setdefault(batch.node, set()).update(
            _needs(root[batch.atom], root[batch.row], root[batch.column], reason)
        )
    if not any(needs.values()):
        return False
    known = _implied(ledger, root)
    before = len(ledger.freezes)
    for node, pairs in needs.items():
        held = {s for r, s in pairs if reason[s] < 0 and not _leads(known, r, s)}
        if held:
            atoms = np.array(sorted(held))
            reason[atoms] = len(ledger.freezes)
            ledger.freezes.append(Freeze(atoms, node, REASON))
    return len(ledger.freezes) > before


def _needs(atom: np.ndarray, row: np.ndarray, column: np.ndarray, reason: np.ndarray) -> set[tuple[int, int]]:
    """Return the pairs (r, s) of channels such that r & s is r, and s is not frozen."""
    found: set[tuple[int, int]] = set()
    for mine, other in ((row, column), (column, row)):
        hit = (atom == mine) & (mine != other) & (reason[other] < 0)
        found.update(zip(mine[hit].tolist(), other[hit].tolist(), strict=True))
    return found


def _implied(ledger: Ledger, root: np.ndarray) -> np.ndarray:
    """Return (2, n), by the first: what stays while what does; a row while a column, the parents while a crossing."""
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
    found = np.concatenate(pairs, axis=1)
    return found[:, np.argsort(found[0], kind="stable")]


def _leads(known: np.ndarray, a: int, b: int) -> bool:
    """Say whether `b` stays while `a` does, by what is known, step by step."""
    seen, stack = {a}, [a]
    while stack and b not in seen:
        first, last = np.searchsorted(known[0], (at := stack.pop(), at + 1))
        fresh = set(known[1, first:last].tolist()) - seen
        seen |= fresh
        stack += fresh
    return b in seen
