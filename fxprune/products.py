"""Products of sizes, for any choice of channels: a dim is either fixed or counted from its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fxprune.atoms import and_fixed
from fxprune.closing import owner
from fxprune.labels import Extent, Labels, Shape
from fxprune.records import Term


class Sizes:
    """Distinct labelled dims, counted together."""

    def __init__(self, to_channels: Callable[[np.ndarray], np.ndarray]) -> None:
        self._to_channels = to_channels
        self._by_id: dict[tuple[int, int], int] = {}
        self._by_owner: dict[tuple[int, int], int] = {}
        self._by_content: dict[tuple[bytes, int], int] = {}
        self._alive: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []

    def index(self, extent: Extent) -> int:
        """Return the number of a labelled dim."""
        ids, dim = extent
        found = self._by_id.get((id(ids), dim))
        if found is None:
            found = self._by_id[id(ids), dim] = self._find(ids, dim)
            self._alive.append(ids)
        return found

    def _find(self, ids: np.ndarray, dim: int) -> int:
        plain = ids.size == ids.shape[dim]
        home = owner(ids) if plain else ids
        found = self._by_owner.get((id(home), -1 if plain else dim))
        if found is None:
            channels = self._to_channels(ids)
            rows = channels.reshape(1, -1) if plain else distinct_rows(channels, dim)
            key = (rows.tobytes(), rows.shape[1])
            found = self._by_content.setdefault(key, len(self.rows))
            if found == len(self.rows):
                self.rows.append(rows)
            self._by_owner[id(home), -1 if plain else dim] = found
            self._alive.append(home)
        return found


def distinct_rows(channels: np.ndarray, dim: int) -> np.ndarray:
    """Return (rows, width) channels along `dim`; of equal neighbours (the filters of a group) only the first."""
    rows = np.moveaxis(channels, dim, -1).reshape(-1, channels.shape[dim])
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]


_ONE = np.ones(1, dtype=np.int64)


class Counter:
    """Kept sizes of all labelled dims: a dim has one or several rows of channels, the longest counts."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        """Lay all rows out end to end: `rows` holds (rows, width) channels for every dim."""
        self.flat = np.concatenate([r.ravel() for r in rows] or [np.empty(0, dtype=np.int64)])
        widths = np.concatenate([np.full(len(r), r.shape[1]) for r in rows] or [np.empty(0, dtype=np.int64)])
        heights = np.array([len(r) for r in rows], dtype=np.int64)
        self.widths = widths
        """(rows,) how many positions every row has."""
        self.row_of = np.repeat(np.arange(len(widths)), widths)
        self.dim_of = np.repeat(np.arange(len(rows)), heights)
        self._row_starts = np.cumsum(widths) - widths
        self._starts = np.cumsum(heights) - heights

    def by_row(self, keep: np.ndarray) -> np.ndarray:
        """Return how many positions of every row stay; `keep` is (channels,) bool."""
        return (
            np.add.reduceat(and_fixed(keep)[self.flat], self._row_starts, dtype=np.int64)
            if len(self.flat)
            else self.flat
        )

    def sizes(self, by_row: np.ndarray) -> np.ndarray:
        """Return the size of every dim, and a last one of 1."""
        return np.concatenate((np.maximum.reduceat(by_row, self._starts) if len(by_row) else by_row, _ONE))


Products = tuple[np.ndarray, np.ndarray]


def products(sizes: Sizes, terms: Iterable[Term]) -> Products:
    """Lay terms out as a vector of fixed factors and a matrix of indices of labelled dims, padded with -1."""
    listed = [(fixed, [sizes.index(e) for e in dims]) for fixed, dims in terms]
    rank = max((len(dims) for _, dims in listed), default=0)
    factors = np.array([fixed for fixed, _ in listed], dtype=np.int64)
    indices = np.array([dims + [-1] * (rank - len(dims)) for _, dims in listed], dtype=np.int64).reshape(
        len(listed), rank
    )
    return factors, indices


def table(sizes: Sizes, shapes: Sequence[tuple[Shape, Labels]]) -> Products:
    """Lay shapes out as a matrix of the dims without labels, 1 elsewhere, and one of indices of the others, else -1."""
    rank = max((len(shape) for shape, _ in shapes), default=0)
    fixed, indices = np.ones((len(shapes), rank), dtype=np.int64), np.full((len(shapes), rank), -1)
    for row, (shape, labels) in enumerate(shapes):
        for d, ids in enumerate(labels):
            if ids is None:
                fixed[row, d] = shape[d]
            else:
                indices[row, d] = sizes.index((ids, d))
    return fixed, indices


def evaluate(products: Products, sizes: np.ndarray) -> np.ndarray:
    """Return (terms,) the products, at (dims + 1,) sizes, of which the last is 1."""
    factors, indices = products
    return factors * sizes[indices].prod(axis=1) if len(factors) else factors
