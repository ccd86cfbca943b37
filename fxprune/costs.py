"""What a plan costs: multiply-accumulates, parameters and memory, exact for any choice of kept channels; latency.

Every op's macs, every parameter and every activation is a product of dims, and a dim is either fixed or counted from
its labels. So a cost is a few array lookups, through all coupled layers, without tracing again. What an op takes by a
latency model follows from the elements that go in and come out, which are such products too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from fxprune import workspaces
from fxprune.cloning import State
from fxprune.closing import distinct, spans
from fxprune.labels import extents
from fxprune.operands import Timed, Timing
from fxprune.products import Counter, Sizes, evaluate, products, table
from fxprune.records import Interpretation
from fxprune.weighing import Weights

RESOURCES = ("macs", "params", "memory", "latency")
COMBINED = {"macs": "combined_macs", "params": "combined_params"}
"""What a resource is called where it is counted over combinations of tasks."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one forward pass over the example inputs costs.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products (biases not counted).
        params: elements of all parameters that take part.
        memory: peak bytes: parameters, buffers, inputs and live activations of an eager forward without gradients.
        latency: microseconds, as a latency model predicts; None without one.
        combined_macs: macs over combinations of tasks, where a budget asks for them, rounded; else None.
        combined_params: the same of params.
    """

    macs: int
    params: int
    memory: int
    latency: int | None = None
    combined_macs: int | None = field(default=None, repr=False)
    combined_params: int | None = field(default=None, repr=False)

    @property
    def asked_macs(self) -> int:
        """Macs as a budget bounds them: over combinations of tasks where it says so."""
        return self.macs if self.combined_macs is None else self.combined_macs

    def to_dict(self) -> dict[str, int]:
        """Return the numbers that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class CostChange:
    """Costs of the dense and of the slim network."""

    before: Costs
    after: Costs

    def share(self, resource: str) -> float:
        """Return after / before of one resource."""
        before = getattr(self.before, resource)
        return getattr(self.after, resource) / before if before else 1.0

    def rows(self) -> list[tuple[str, int, int, float]]:
        """Return what is known of each resource: its name, before, after, and share."""
        return [
            (name, before, getattr(self.after, name), self.share(name))
            for name, before in self.before.to_dict().items()
        ]


class CostModel:
    """Costs as a function of the kept channels."""

    def __init__(
        self,
        record: Interpretation,
        to_channels: Callable[[np.ndarray], np.ndarray],
        unlabelled: Mapping[str, tuple[int, int]],
        timed: Timed | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Read the record of an interpretation.

        Args:
            record: what the interpretation noted.
            to_channels: from atoms to channels.
            unlabelled: parameters and buffers that carry no labels, from `unlabelled`.
            timed: a latency model, and the graph that it is for; None for costs without latency.
            weights: how much nodes and parameters count over combinations of tasks; None for costs without that.

        Raises:
            PlanError: the latency model does not know a node of the graph.
        """
        sizes = Sizes(to_channels)
        self._work = products(sizes, ((w.fixed, w.dims) for w in record.work))
        tensors = list(record.issued.values())
        terms = {
            id(ls): (math.prod([n for n, ids in zip(s, ls, strict=True) if ids is None]), extents(ls))
            for s, ls in {id(ls): (s, ls) for s, ls, _, _ in tensors}.values()
        }  # once for all vectors of a batch norm, which share their labels
        self._state = products(sizes, [terms[id(ls)] for _, ls, _, _ in tensors])
        self._itemsize = np.array([item for _, _, item, _ in tensors], dtype=np.int64)
        self._is_parameter = np.array([p for _, _, _, p in tensors], dtype=bool)
        self._buffers = products(sizes, ((b.fixed, b.dims) for b in record.buffers))
        every = {id(t.labels): t.labels for ts in record.nodes.values() for t in ts}
        for labels in every.values():
            for extent in extents(labels):
                sizes.index(extent)
        self._born = np.array([b.born for b in record.buffers], dtype=np.int64)
        self._dies = np.array([b.dies for b in record.buffers], dtype=np.int64)
        self._steps = record.steps + 2
        sometimes = [(i, b.unlike) for i, b in enumerate(record.buffers) if b.unlike]
        self._sometimes = np.array([i for i, _ in sometimes], dtype=np.int64)
        self._unlike = [products(sizes, [pair[side] for _, pair in sometimes]) for side in (0, 1)]
        self._workspaces = workspaces.Workspaces([c.run for c in record.convolutions], record.machine)
        self._runs_at = np.array([c.step for c in record.convolutions], dtype=np.int64)
        self._run_dims = table(sizes, [dims for c in record.convolutions for dims in c.dims])
        self._timing = None if timed is None else Timing(sizes, record, *timed)
        self._unlabelled = [sum(item[i] for item in unlabelled.values()) for i in (0, 1)]
        self._macs_of = {"macs": self._work}
        if weights is not None:
            factors, indices = self._work
            self._macs_of["combined_macs"] = factors * [weights.nodes.get(w.node, 0.0) for w in record.work], indices
            self._shares = np.array([weights.state[name] for name in record.issued]) * self._is_parameter
            self._rest = sum(weights.state[name] * count for name, (count, _) in unlabelled.items())
        self._counter = Counter(sizes.rows)
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
        return Costs(**{name: measure(sizes) for name, measure in self._measure.items()})

    def within(self, keep: np.ndarray, bounds: Mapping[str, float]) -> bool:
        """Say whether the network of the channels `keep` (channels,) costs at most `bounds`: resource -> number."""
        sizes = self._sizes(keep)
        return all(self._measure[name](sizes) <= bound for name, bound in bounds.items())

    def _sizes(self, keep: np.ndarray) -> np.ndarray:
        return self._counter.sizes(self._counter.by_row(keep))

    @property
    def _measure(self) -> dict[str, Callable[[np.ndarray], int]]:
        known = {"macs": self._macs, "params": self._params, "memory": self._memory}
        if self._timing is not None:
            known["latency"] = self._timing
        if "combined_macs" in self._macs_of:
            known |= {"combined_macs": self._combined_macs, "combined_params": self._combined_params}
        return known

    def _macs(self, sizes: np.ndarray) -> int:
        return int(evaluate(self._work, sizes).sum())

    def _combined_macs(self, sizes: np.ndarray) -> int:
        return round(float(evaluate(self._macs_of["combined_macs"], sizes).sum()))

    def _combined_params(self, sizes: np.ndarray) -> int:
        return round(float(evaluate(self._state, sizes) @ self._shares) + self._rest)

    def _params(self, sizes: np.ndarray) -> int:
        return int(evaluate(self._state, sizes)[self._is_parameter].sum()) + self._unlabelled[0]

    def _memory(self, sizes: np.ndarray) -> int:
        state = int((evaluate(self._state, sizes) * self._itemsize).sum())
        return state + self._unlabelled[1] + int(self._live(sizes).max(initial=0))

    def _live(self, sizes: np.ndarray) -> np.ndarray:
        """Return (steps,) the bytes of all activations and workspaces that exist at each step."""
        change = np.zeros(self._steps + 1, dtype=np.int64)
        activations = evaluate(self._buffers, sizes)
        if len(self._sometimes):
            one, other = (evaluate(terms, sizes) for terms in self._unlike)
            activations[self._sometimes] *= one != other
        np.add.at(change, self._born, activations)
        np.add.at(change, self._dies + 1, -activations)
        live = np.cumsum(change)
        if len(self._runs_at):
            fixed, indices = self._run_dims
            dims = fixed * sizes[indices]
            x, weight, out = dims.reshape(-1, 3, dims.shape[1]).transpose(1, 0, 2)
            elements = x.prod(axis=1), weight.prod(axis=1), out.prod(axis=1)
            live[self._runs_at] += self._workspaces(workspaces.Sizes(*elements, x[:, 1], out[:, 1], weight[:, 1]))
        return live

    def macs_with(self, resource: str, keep: np.ndarray, part: np.ndarray, count: int) -> np.ndarray:
        """Return the macs of `keep` together with each of several disjoint parts.

        Args:
            resource: "macs" or "combined_macs".
            keep: (channels,) bool, what stays in any case.
            part: (channels,) which part a channel is of, or -1.
            count: how many parts there are.

        Returns:
            (count,) macs. The work is linear in the network, however many parts there are.
        """
        counter, (factors, indices) = self._counter, self._macs_of[resource]
        by_row = counter.by_row(keep)
        sizes = counter.sizes(by_row)
        macs = float(evaluate((factors, indices), sizes).sum())
        n = len(sizes)
        of = np.append(part, -1)[counter.flat]
        real = of >= 0
        pairs, more = np.unique(of[real] * max(len(by_row), 1) + counter.row_of[real], return_counts=True)
        row = pairs % max(len(by_row), 1)
        key = pairs // max(len(by_row), 1) * n + counter.dim_of[row]
        changed, start = np.unique(key, return_index=True)
        if not len(changed):
            return np.full(count, macs)
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
        return macs + np.bincount(which, delta, count)


def unlabelled(record: Interpretation, state: Iterable[State]) -> dict[str, tuple[int, int]]:
    """Return the parameters and buffers that carry no labels: elements, if it is a parameter, and bytes."""
    return {
        name: (t.numel() if is_parameter else 0, t.numel() * t.element_size())
        for name, t, is_parameter in state
        if name not in record.issued
    }
