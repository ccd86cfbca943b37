"""What the calls of a graph read and write, in elements, for any choice of channels; and so how long they take."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import fx

from fxprune.errors import PlanError
from fxprune.labels import extents
from fxprune.latencies import LatencyModel
from fxprune.products import Sizes, evaluate, products
from fxprune.records import Interpretation, Term

Timed = tuple[LatencyModel, fx.Graph]
"""A latency model, and the graph whose latency it is to tell."""


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call something."""
    return [n for n in graph.nodes if n.op.startswith("call_")]


class Operands:
    """Elements that go into each call, parameters and constants not counted, and that come out."""

    def __init__(self, sizes: Sizes, record: Interpretation, graph: fx.Graph) -> None:
        """Look up the sizes of all tensors that calls read and write."""
        calls = calls_of(graph)
        self.names = [n.name for n in calls]
        read = [
            (i, term)
            for i, n in enumerate(calls)
            for source in n.all_input_nodes
            if source.op != "get_attr"
            for term in _made_by(record, source)
        ]
        written = [(i, term) for i, n in enumerate(calls) for term in _made_by(record, n)]
        self._sides = [
            (np.array([i for i, _ in side], dtype=np.int64), products(sizes, [term for _, term in side]))
            for side in (read, written)
        ]

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Return (2, calls) elements that go in and that come out, at the sizes of all dims."""
        count = len(self.names)
        return np.array([np.bincount(of, evaluate(terms, sizes), count) for of, terms in self._sides])


def _made_by(record: Interpretation, n: fx.Node) -> list[Term]:
    return [
        (math.prod([size for size, ids in zip(t.shape, t.labels, strict=True) if ids is None]), extents(t.labels))
        for t in record.nodes.get(n.name, [])
    ]


def check_model(
    model: LatencyModel, record: Interpretation, to_channels: Callable[[np.ndarray], np.ndarray], graph: fx.Graph
) -> None:
    """Check that a latency model was measured on a network, at the same sizes.

    Args:
        model: to check.
        record: of the dense network.
        to_channels: from atoms to channels.
        graph: of the network.

    Raises:
        PlanError: it was not: at which node they differ.
    """
    sizes = Sizes(to_channels)
    operands = Operands(sizes, record, graph)
    dense = np.append([rows.shape[1] for rows in sizes.rows], 1).astype(np.int64)
    mine = {
        name: tuple(both) for name, both in zip(operands.names, operands(dense).T.astype(int).tolist(), strict=True)
    }
    known = {name: (op.inputs, op.outputs) for op in model.ops for name in op.nodes}
    for name in dict.fromkeys([*mine, *known]):
        if mine.get(name) != known.get(name):
            raise PlanError(
                f"the latency model is of another network, or of example inputs of another size: at node {name!r} it "
                f"has {known.get(name, 'nothing')} elements in and out, here are {mine.get(name, 'none')}. Measure one "
                "of this network by `fxprune.LatencyModel.measure(traced)`."
            )


class Timing:
    """Microseconds of a network as a function of the sizes of all dims."""

    def __init__(self, sizes: Sizes, record: Interpretation, model: LatencyModel, graph: fx.Graph) -> None:
        """Find every call in the model.

        Raises:
            PlanError: the model does not know one.
        """
        self._operands = Operands(sizes, record, graph)
        place = {name: i for i, name in enumerate(model.nodes)}
        unknown = [name for name in self._operands.names if name not in place]
        if unknown:
            raise PlanError(
                f"the latency model does not know node {unknown[0]!r}: it is of another network. Measure one of this "
                "network by `fxprune.LatencyModel.measure(traced)`."
            )
        self._times = model.at([place[name] for name in self._operands.names])

    def __call__(self, sizes: np.ndarray) -> int:
        """Return what the network takes, in whole microseconds."""
        return self._times.whole(*self._operands(sizes))
