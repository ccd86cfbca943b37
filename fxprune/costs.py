"""What a plan costs: multiply-accumulates, parameters and memory, exact for any choice of kept channels.

Every op's macs, every parameter and every activation is a product of dims, and a dim is either fixed or counted from
its labels. So a cost is a few array lookups, through all coupled layers, without tracing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from fxprune.atoms import and_fixed
from fxprune.cloning import State
from fxprune.closing import distinct, owner, spans
from fxprune.labels import Extent, Labels, Shape, extents
from fxprune.records import Interpretation, Term
from fxprune.workspaces import Sizes, Workspaces

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
            rows = channels.reshape(1, -1) if plain else _distinct_rows(channels, dim)
            key = (rows.tobytes(), rows.shape[1])
            found = self._by_content.setdefault(key, len(self.rows))
            if found == len(self.rows):
                self.rows.append(rows)
            self._by_owner[id(home), -1 if plain else dim] = found
            self._alive.append(home)
        return found


def _distinct_rows(channels: np.ndarray, dim: int) -> np.ndarray:
    """Return (rows, width) channels along `dim`; of equal neighbours (the filters of a group) only the first."""
    rows = np.moveaxis(channels, dim, -1).reshape(-1, channels.shape[dim])
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]


_ONE = np.ones(1, dtype=np.int64)


class _Counter:
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


class CostModel:
    """Costs as a function of the kept channels."""

    def __init__(
        self, record: Interpretation, to_channels: Callable[[np.ndarray], np.ndarray], unlabelled: tuple[int, int]
    ) -> None:
        """Read the record of an interpretation.

        Args:
            record: what the interpretation noted.
            to_channels: from atoms to channels.
            unlabelled: elements of parameters, and bytes of parameters and buffers, that carry no labels.
        """
        sizes = _Sizes(to_channels)
        self._work = _products(sizes, ((w.fixed, w.dims) for w in record.work))
        tensors = list(record.issued.values())
        terms = {
            id(ls): (math.prod([n for n, ids in zip(s, ls, strict=True) if ids is None]), extents(ls))
            for s, ls in {id(ls): (s, ls) for s, ls, _, _ in tensors}.values()
        }  # once for all vectors of a batch norm, which share their labels
        self._state = _products(sizes, [terms[id(ls)] for _, ls, _, _ in tensors])
        self._itemsize = np.array([item for _, _, item, _ in tensors], dtype=np.int64)
        self._is_parameter = np.array([p for _, _, _, p in tensors], dtype=bool)
        self._buffers = _products(sizes, ((b.fixed, b.dims) for b in record.buffers))
        distinct = {id(t.labels): t.labels for ts in record.nodes.values() for t in ts}
        for labels in distinct.values():
            for extent in extents(labels):
                sizes.index(extent)
        self._born = np.array([b.born for b in record.buffers], dtype=np.int64)
        self._dies = np.array([b.dies for b in record.buffers], dtype=np.int64)
        self._steps = record.steps + 2
        sometimes = [(i, b.unlike) for i, b in enumerate(record.buffers) if b.unlike]
        self._sometimes = np.array([i for i, _ in sometimes], dtype=np.int64)
        self._unlike = [_products(sizes, [pair[side] for _, pair in sometimes]) for side in (0, 1)]
        self._workspaces = Workspaces([c.run for c in record.convolutions], record.machine)
        self._runs_at = np.array([c.step for c in record.convolutions], dtype=np.int64)
        self._run_dims = _table(sizes, [dims for c in record.convolutions for dims in c.dims])
        self._unlabelled = unlabelled
        self._counter = _Counter(sizes.rows)
        self._extents = sizes.rows

    def emptied(self, keep: np.ndarray) -> list[np.ndarray]:
        """Return the channels of every dim of a parameter or activation of which nothing stays."""
        return [self._extents[i].ravel() for i in np.flatnonzero(self._sizes(keep)[:-1] == 0)]

    def __call__(self, keep: np.ndarray) -> Costs:
        """Return the costs when `keep` (channels,) says which channels stay."""
        return self._costs(self._sizes(keep))

    @cached_property
    def dense(self) -> Costs:
        """What the dense network costs."""
        return self._costs(self._counter.sizes(self._counter.widths))

    def _costs(self, sizes: np.ndarray) -> Costs:
        return Costs(self._macs(sizes), self._params(sizes), self._memory(sizes))

    def within(self, keep: np.ndarray, bounds: Mapping[str, float]) -> bool:
        """Say whether the network of the channels `keep` (channels,) costs at most `bounds`: resource -> number."""
        sizes = self._sizes(keep)
        return all(self._measure[name](sizes) <= bound for name, bound in bounds.items())

    def _sizes(self, keep: np.ndarray) -> np.ndarray:
        return self._counter.sizes(self._counter.by_row(keep))

    @property
    def _measure(self) -> dict[str, Callable[[np.ndarray], int]]:
        return {"macs": self._macs, "params": self._params, "memory": self._memory}

    def _macs(self, sizes: np.ndarray) -> int:
        return int(_evaluate(self._work, sizes).sum())

    def _params(self, sizes: np.ndarray) -> int:
        return int(_evaluate(self._state, sizes)[self._is_parameter].sum()) + self._unlabelled[0]

    def _memory(self, sizes: np.ndarray) -> int:
        state = int((_evaluate(self._state, sizes) * self._itemsize).sum())
        return state + self._unlabelled[1] + int(self._live(sizes).max(initial=0))

    def _live(self, sizes: np.ndarray) -> np.ndarray:
        """Return (steps,) the bytes of all activations and workspaces that exist at each step."""
        change = np.zeros(self._steps + 1, dtype=np.int64)
        activations = _evaluate(self._buffers, sizes)
        if len(self._sometimes):
            one, other = (_evaluate(terms, sizes) for terms in self._unlike)
            activations[self._sometimes] *= one != other
        np.add.at(change, self._born, activations)
        np.add.at(change, self._dies + 1, -activations)
        live = np.cumsum(change)
        if len(self._runs_at):
            fixed, indices = self._run_dims
            dims = fixed * sizes[indices]
            x, weight, out = dims.reshape(-1, 3, dims.shape[1]).transpose(1, 0, 2)
            elements = x.prod(axis=1), weight.prod(axis=1), out.prod(axis=1)
            live[self._runs_at] += self._workspaces(Sizes(*elements, x[:, 1], out[:, 1], weight[:, 1]))
        return live

    def macs_with(self, keep: np.ndarray, part: np.ndarray, count: int) -> np.ndarray:
        """Return the macs of `keep` together with each of several disjoint parts.

        Args:
            keep: (channels,) bool, what stays in any case.
            part: (channels,) which part a channel is of, or -1.
            count: how many parts there are.

        Returns:
            (count,) macs. The work is linear in the network, however many parts there are.
        """
        counter, (factors, indices) = self._counter, self._work
        by_row = counter.by_row(keep)
        sizes = counter.sizes(by_row)
        n = len(sizes)
        of = np.append(part, -1)[counter.flat]
        real = of >= 0
        pairs, more = np.unique(of[real] * max(len(by_row), 1) + counter.row_of[real], return_counts=True)
        row = pairs % max(len(by_row), 1)
        key = pairs // max(len(by_row), 1) * n + counter.dim_of[row]
        changed, start = np.unique(key, return_index=True)
        if not len(changed):
            return np.full(count, float(self._macs(sizes)))
        fresh = np.maximum(np.maximum.reduceat(by_row[row] + more, start), sizes[changed % n])
        term, place = np.nonzero(indices >= 0)
        order = np.argsort(indices[term, place], kind="stable")
        dim = indices[term, place][order]
        first = np.searchsorted(dim, changed % n, "left")
        repeat = np.searchsorted(dim, changed % n, "right") - first
        hit = distinct(np.repeat(changed // n, repeat) * len(factors) + term[order][spans(first, repeat)])
        which, term = hit // max(len(factors), 1), hit % max(len(factors), 1)
        wanted = which[:, None] * n + indices[term] % n
        at = np.minimum(np.searchsorted(changed, wanted), len(changed) - 1)
        after = np.where(changed[at] == wanted, fresh[at], sizes[indices[term]]).prod(axis=1)
        delta = factors[term] * (after - sizes[indices[term]].prod(axis=1))
        return self._macs(sizes) + np.bincount(which, delta, count)


def unlabelled(record: Interpretation, state: Iterable[State]) -> tuple[int, int]:
    """Return elements of parameters, and bytes of parameters and buffers, that carry no labels."""
    rest = [(t, is_parameter) for name, t, is_parameter in state if name not in record.issued]
    elements = sum(t.numel() for t, is_parameter in rest if is_parameter)
    return elements, sum(t.numel() * t.element_size() for t, _ in rest)


_Products = tuple[np.ndarray, np.ndarray]


def _products(sizes: _Sizes, terms: Iterable[Term]) -> _Products:
    """Lay terms out as a vector of fixed factors and a matrix of indices of labelled dims, padded with -1."""
    listed = [(fixed, [sizes.index(e) for e in dims]) for fixed, dims in terms]
    rank = max((len(dims) for _, dims in listed), default=0)
    factors = np.array([fixed for fixed, _ in listed], dtype=np.int64)
    indices = np.array([dims + [-1] * (rank - len(dims)) for _, dims in listed], dtype=np.int64).reshape(
        len(listed), rank
    )
    return factors, indices


def _table(sizes: _Sizes, shapes: Sequence[tuple[Shape, Labels]]) -> _Products:
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


def _evaluate(products: _Products, sizes: np.ndarray) -> np.ndarray:
    factors, indices = products
    return factors * sizes[indices].prod(axis=1) if len(factors) else factors
