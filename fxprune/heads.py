"""Constraints on attention: whole heads stay, or the head dims of queries and keys, or those of values."""

from __future__ import annotations

import numpy as np

from fxprune.atoms import FIXED, Ledger
from fxprune.coupling import Coupling

FIELDS = ("keep_heads", "keep_qk", "keep_v")


def hold(ledger: Ledger, coupling: Coupling, field: str, pattern: str, layers: set[str]) -> None:
    """Write into a ledger what one of the three constraints keeps.

    Args:
        ledger: the coupling's ledger, or a copy of it.
        coupling: the coupled network.
        field: "keep_heads", "keep_qk" or "keep_v".
        pattern: what the user wrote.
        layers: names of the layers that it matches.
    """
    reason = f"is kept by Constraints({field}={pattern!r})"
    of = coupling.classes.of
    ours = _channels_of(coupling, layers)
    paired = np.zeros(coupling.num_channels + 1, dtype=bool)
    for atoms in coupling.record.paired:
        paired[of(atoms)] = True
    paired[FIXED] = False
    is_row = np.zeros(coupling.num_channels + 1, dtype=bool)
    for batch in ledger.rows:
        is_row[of(batch.row)] = True
    is_row[FIXED] = False
    in_rows = np.zeros(coupling.num_channels + 1, dtype=bool)
    for batch in list(ledger.rows):
        columns = of(batch.columns)
        in_rows[columns] = True
        hit = ours[columns].any(axis=1) & ~is_row[columns].any(axis=1)  # rows of rows are no heads
        if field == "keep_heads":
            ledger.freeze(batch.row[hit], reason)
        else:
            wanted = hit & (paired[columns].any(axis=1) == (field == "keep_qk"))
            if wanted.any():  # rows keep equally many: where one keeps all, so do those it was cut with
                _hold_columns(ledger, batch.columns[hit], batch.row[hit], reason)
    if field == "keep_qk":  # of a single head: rows are not told apart
        alone = paired & ours & ~in_rows
        ledger.freeze(np.flatnonzero(alone[coupling.classes.of_atom[:FIXED]]), reason)


def _channels_of(coupling: Coupling, layers: set[str]) -> np.ndarray:
    """Return (channels + 1,) which channels are in a parameter of these layers."""
    found = np.zeros(coupling.num_channels + 1, dtype=bool)
    for site in coupling.sites:
        if site.name.rpartition(".")[0] in layers or any(site.name.startswith(f"{layer}.") for layer in layers):
            found[site.channels] = True
    found[FIXED] = False
    return found


def _hold_columns(ledger: Ledger, columns: np.ndarray, row: np.ndarray, reason: str) -> None:
    """Let the columns of a row go only with their row."""
    if not columns.size:
        return
    parents = ledger.parents(columns)
    if parents is not None:  # the same columns in every row
        ledger.freeze(np.unique(parents[1]), reason)
    else:
        ledger.tie(columns, row[:, None], reason)
