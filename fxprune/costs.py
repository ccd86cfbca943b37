"""What a plan costs: multiply-accumulates, parameters and memory, exact for any choice of kept channels.

Every op's macs, every parameter and every activation is a product of dims, and a dim is either fixed or counted from
its labels. So a cost is a few array lookups, through all coupled layers, without tracing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from fxprune.interpreting import Interpretation
from fxprune.labels import Extent, extents

RESOURCES = ("macs", "params", "memory")


@dataclass(frozen=True, slots=True)
class Costs:
    """What one forward pass over the example inputs costs.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products (biases not counted).
        params: elements of all parameters that take part.
        memory: peak bytes: parameters, buffers, inputs and live activations of an eager forward without gradients.
    """

    macs: int
    params: int
    memory: int

    def to_dict(self) -> dict[str, int]:
        """Return the three numbers by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CostChange:
    """Costs of the dense and of the slim network."""

    before: Costs
    after: Costs

    def share(self, resource: str) -> float:
        """Return after / before of one resource."""
        before = getattr(self.before, resource)
        return getattr(self.after, resource) / before if before else 1.0


class _Sizes:
    """Distinct labelled dims, counted together."""

    def __init__(self, to_channels: Callable[[np.ndarray], np.ndarray]) -> None:
        self._to_channels = to_channels
        self._by_id: dict[tuple[int, int], int] = {}
        self._by_content: dict[tuple[bytes, int], int] = {}
        self._alive: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []

    def index(self, extent: Extent) -> int:
        """Return the number of a labelled dim."""
        ids, dim = extent
        found = self._by_id.get((id(ids), dim))
        if found is None:
            rows = np.moveaxis(self._to_channels(ids), dim, -1)
            rows = rows.reshape(-1, rows.shape[-1])
            key = (rows.tobytes(), rows.shape[1])
            found = self._by_content.setdefault(key, len(self.rows))
            if found == len(self.rows):
                self.rows.append(rows)
            self._by_id[id(ids), dim] = found
            self._alive.append(ids)
        return found

    def counter(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function from `keep` (channels,) to the kept size of every labelled dim, and a last one of 1."""
        if not self.rows:
            return lambda keep: np.ones(1, dtype=np.int64)
        flat = np.concatenate([rows.ravel() for rows in self.rows])
        widths = np.concatenate([np.full(len(rows), rows.shape[1]) for rows in self.rows])
        row_starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        starts = np.concatenate([[0], np.cumsum([len(rows) for rows in self.rows])[:-1]])

        def count(keep: np.ndarray) -> np.ndarray:
            counts = np.add.reduceat(np.append(keep, True)[flat].astype(np.int64), row_starts)
            return np.append(np.maximum.reduceat(counts, starts), 1)

        return count


class CostModel:
    """Costs as a function of the kept channels."""

    def __init__(self, record: Interpretation, to_channels: Callable[[np.ndarray], np.ndarray], unlabelled: tuple[int, int]) -> None:
        """Read the record of an interpretation.

        Args:
            record: what the interpretation noted.
            to_channels: from atoms to channels.
            unlabelled: elements of parameters, and bytes of parameters and buffers, that carry no labels.
        """
        sizes = _Sizes(to_channels)
        self._work = _products(sizes, ((w.fixed, w.dims) for w in record.work))
        tensors = [(shape, labels, itemsize, is_parameter) for shape, labels, itemsize, is_parameter in record.issued.values()]
        fixed = [(int(np.prod([n for n, ids in zip(s, ls, strict=True) if ids is None])), extents(ls)) for s, ls, _, _ in tensors]
        self._state = _products(sizes, fixed)
        self._itemsize = np.array([item for _, _, item, _ in tensors], dtype=np.int64)
        self._is_parameter = np.array([p for _, _, _, p in tensors], dtype=bool)
        self._buffers = _products(sizes, ((b.fixed, b.dims) for b in record.buffers))
        for extent in (e for ts in record.nodes.values() for t in ts for e in extents(t.labels)):
            sizes.index(extent)
        self._born = np.array([b.born for b in record.buffers], dtype=np.int64)
        self._dies = np.array([b.dies for b in record.buffers], dtype=np.int64)
        self._steps = record.steps + 2
        self._unlabelled = unlabelled
        self._count = sizes.counter()
        self._extents = sizes.rows

    def emptied(self, keep: np.ndarray) -> list[np.ndarray]:
        """Return the channels of every dim of a parameter or activation of which nothing stays."""
        return [self._extents[i].ravel() for i in np.flatnonzero(self._count(keep)[:-1] == 0)]

    def __call__(self, keep: np.ndarray) -> Costs:
        """Return the costs when `keep` (channels,) says which channels stay."""
        sizes = self._count(keep)
        macs = int(_evaluate(self._work, sizes).sum())
        state = _evaluate(self._state, sizes)
        params = int(state[self._is_parameter].sum()) + self._unlabelled[0]
        live = np.zeros(self._steps + 1, dtype=np.int64)
        activations = _evaluate(self._buffers, sizes)
        np.add.at(live, self._born, activations)
        np.add.at(live, self._dies + 1, -activations)
        memory = int((state * self._itemsize).sum()) + self._unlabelled[1] + int(np.cumsum(live).max(initial=0))
        return Costs(macs, params, memory)


_Products = tuple[np.ndarray, np.ndarray]


def _products(sizes: _Sizes, terms: Iterable[tuple[int, tuple[Extent, ...]]]) -> _Products:
    """Lay terms out as a vector of fixed factors and a matrix of indices of labelled dims, padded with -1."""
    listed = [(fixed, [sizes.index(e) for e in dims]) for fixed, dims in terms]
    rank = max((len(dims) for _, dims in listed), default=0)
    factors = np.array([fixed for fixed, _ in listed], dtype=np.int64)
    indices = np.array([dims + [-1] * (rank - len(dims)) for _, dims in listed], dtype=np.int64).reshape(len(listed), rank)
    return factors, indices


def _evaluate(products: _Products, sizes: np.ndarray) -> np.ndarray:
    factors, indices = products
    return factors * sizes[indices].prod(axis=1) if len(factors) else factors
