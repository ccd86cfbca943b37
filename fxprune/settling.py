"""What follows when channels go: rows without columns go too, columns without their row, crossings without a parent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.atoms import FIXED, and_fixed
from fxprune.grouping import Products, Rows


class Settling:
    """All rows and crossings of a coupling, laid end to end: a choice is settled without a look at any single row."""

    def __init__(self, rows: Sequence[Rows], products: Products) -> None:
        """Lay rows out; several nodes may have said the same of the same rows."""
        distinct = {(b.row.tobytes(), b.columns.tobytes()): b for b in reversed(rows)}
        batches = list(distinct.values())[::-1]
        self.products = products
        self.nodes = [b.node for b in batches]
        none = np.empty(0, dtype=np.int64)
        self.row = np.concatenate([b.row for b in batches] or [none])
        """(rows,) the channel of each row."""
        self.columns = np.concatenate([b.columns.ravel() for b in batches] or [none])
        """The columns of all rows, one row after the other."""
        self.width = np.concatenate([np.full(len(b.row), b.columns.shape[1]) for b in batches] or [none])
        """(rows,) how many columns each row has."""
        self._starts = np.cumsum(self.width) - self.width
        height = np.array([len(b.row) for b in batches], dtype=np.int64)
        self._first_rows = np.cumsum(height) - height

    def settle(self, keep: np.ndarray) -> np.ndarray:
        """Return what stays of `keep` (channels,) bool."""
        if not (len(self.row) or len(self.products.channel)):
            return keep.copy()
        keep = and_fixed(keep)
        self._settle_rows(keep)
        while self._settle_products(keep):
            self._settle_rows(keep)
        return keep[:FIXED]

    def _settle_rows(self, keep: np.ndarray) -> None:
        """Remove rows without columns, and columns without their row, until no more follow."""
        while len(self.row):
            alive = np.logical_or.reduceat(keep[self.columns], self._starts)
            keep[self.row[~alive]] = False
            keep[FIXED] = True
            torn = alive & ~keep[self.row]
            if not torn.any():
                return
            keep[self.columns[np.repeat(torn, self.width)]] = False
            keep[FIXED] = True

    def _settle_products(self, keep: np.ndarray) -> bool:
        """Remove crossings with a parent, and a parent of which no crossing is left; say whether anything went."""
        p = self.products
        if not len(p.channel):
            return False
        before = np.count_nonzero(keep)
        keep[p.channel[~(keep[p.row] & keep[p.column])]] = False
        for parent, other in ((p.row, p.column), (p.column, p.row)):
            torn = ~keep[p.channel] & keep[parent] & keep[other]
            if torn.any():
                left = np.bincount(parent[keep[p.channel]], minlength=len(keep))
                keep[parent[torn & (left[parent] == 0)]] = False
        return bool(np.count_nonzero(keep) < before)

    def emptied(self, keep: np.ndarray, among: np.ndarray) -> list[np.ndarray]:
        """Return the columns of every row `among` (channels,) bool that is gone from `keep` (channels,) bool."""
        gone = np.append(among & ~keep, False)[self.row]
        return [self.columns[self._starts[i] : self._starts[i] + self.width[i]] for i in np.flatnonzero(gone)]

    def uneven(self, keep: np.ndarray) -> str | None:
        """Return the first node whose rows, as far as they stay, would keep unequally many columns."""
        if not len(self.row):
            return None
        count = np.add.reduceat(np.append(keep, True)[self.columns], self._starts, dtype=np.int64)
        most = np.maximum.reduceat(count, self._first_rows)
        least = np.minimum.reduceat(np.where(count > 0, count, np.iinfo(np.int64).max), self._first_rows)
        wrong = np.flatnonzero((most > 0) & (least < most))
        return self.nodes[wrong[0]] if len(wrong) else None
