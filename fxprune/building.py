"""A slim network from the channels that stay: parameters sliced, modules resized, literals re-derived, shapes told."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxprune import positions as positions  # its fixers enter the table
from fxprune.cloning import Cloner, submodule
from fxprune.closing import owner
from fxprune.coupling import Coupling
from fxprune.errors import RewriteError
from fxprune.expecting import Expected, answer
from fxprune.labels import Labels, Shape
from fxprune.lengths import follows, given_by
from fxprune.literals import FIXERS, as_before, plain_name
from fxprune.records import Labelled
from fxprune.resizing import Call, fits, resize, resizer_of
from fxprune.running import MetaRunner, Runner
from fxprune.slicing import Kept, kept_size, sliced_like
from fxprune.slimming import SlimModule, only_used
from fxprune.traced import copied
from fxprune.values import bind, tensors_in, to_meta


def build(coupling: Coupling, keep: np.ndarray) -> fx.GraphModule:
    """Build the slim network of the channels `keep` (channels,); something of every dim stays."""
    keep = np.append(keep, True)
    prediction = Prediction(coupling, keep)
    graph = copied(coupling.traced.graph)
    root = _sliced(coupling, graph, keep)
    _resize_modules(root, graph, prediction)
    _fix_literals(coupling, root, graph, prediction)
    return SlimModule(root, graph)


class Prediction:
    """Shapes and kept positions at every node of the slim network."""

    def __init__(self, coupling: Coupling, keep: np.ndarray) -> None:
        """Remember what stays: `keep` is (channels + 1,) bool, the last entry for fixed positions."""
        self.coupling = coupling
        self.keep = keep
        self._sizes: dict[tuple[int, int], int] = {}
        self._shapes: dict[str, list[Shape]] = {}
        self._known: dict[tuple[int, Shape], Shape] = {}
        """id of labels and dense shape, which many nodes share -> shape."""

    def shapes(self, node: str) -> list[Shape]:
        """Return the predicted shape of every tensor that a node returns."""
        found = self._shapes.get(node)
        if found is None:
            found = self._shapes[node] = [self._shape(t) for t in self.coupling.record.nodes.get(node, [])]
        return found

    def _shape(self, t: Labelled) -> Shape:
        key = id(t.labels), t.shape
        found = self._known.get(key)
        if found is None:
            sizes = zip(t.shape, t.labels, strict=True)
            found = tuple([n if ids is None else self._size(ids, d) for d, (n, ids) in enumerate(sizes)])
            self._known[key] = found
        return found

    def _size(self, ids: np.ndarray, dim: int) -> int:
        plain = ids.size == ids.shape[dim]
        key = (id(owner(ids)), -1) if plain else (id(ids), dim)
        found = self._sizes.get(key)
        if found is None:
            found = self._sizes[key] = kept_size(self.coupling.channels(ids), dim, self.keep)
        return found

    def kept(self, node: str, dim: int) -> np.ndarray | None:
        """Return (rows, size) bool: what stays along a dim, in every row that stays; None where it is unlabelled."""
        t = self.coupling.record.nodes[node][0]
        labels = self.coupling.to_channels(t.labels)
        ids = labels[dim]
        if ids is None:
            return None
        rows = np.moveaxis(self.keep[ids], dim, -1).reshape(-1, t.shape[dim])
        return rows[rows.any(axis=1)]

    def kept_of(self, module: str, name: str, dim: int) -> np.ndarray:
        """Return (size,) bool: which positions stay along a dim of a module's parameter, the same in all rows."""
        shape, labels = self.coupling.tensors[f"{module}.{name}"]
        ids = labels[dim]
        return np.ones(shape[dim], dtype=bool) if ids is None else self.keep[ids].ravel()

    def rows(self, node: str, dim: int, count: int) -> int:
        """Return how many of `count` equal rows of a dim keep anything."""
        kept = self.kept(node, dim)
        return count if kept is None else int(kept[0].reshape(count, -1).any(axis=1).sum())


def _sliced(coupling: Coupling, graph: fx.Graph, keep: np.ndarray) -> nn.Module:
    """Copy what the graph uses of the traced module with sliced parameters and buffers; tied ones stay tied."""
    labels: Mapping[str, Labels] = {name: ls for name, (_, ls) in coupling.tensors.items()}
    kept = Kept(keep)
    with torch.no_grad():
        sliced = {id(t): sliced_like(t, labels.get(name), kept) for name, t, _ in coupling.traced.state}
    root = coupling.traced.root
    return only_used(root, graph, Cloner(root, sliced))


def _resize_modules(root: nn.Module, graph: fx.Graph, prediction: Prediction) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in seen:
            seen.add(node.target)
            module = submodule(root, str(node.target))
            if resizer_of(type(module)) is None:
                continue
            sources = [source.name for source in node.all_input_nodes]
            inputs = [shape for source in sources for shape in prediction.shapes(source)]
            first = sources[0] if sources else ""
            rows, flags = partial(prediction.rows, first), partial(prediction.kept_of, str(node.target))
            resize(module, Call(inputs, prediction.shapes(node.name), rows, flags))


def _fix_literals(coupling: Coupling, root: nn.Module, graph: fx.Graph, prediction: Prediction) -> None:
    """Run the slim graph on meta tensors, fixing each node before it runs and checking its shapes after."""
    traced = coupling.traced
    fixer = _Fixer(root, graph, prediction)
    with torch.no_grad():
        fixer.run_all(bind(graph, to_meta(traced.args), to_meta(traced.kwargs)))
    if fixer.failed:
        lines = [f"  node {node!r}{traced.where(node)}: {reason}" for node, reason in fixer.failed.items()]
        raise RewriteError(
            "sizes in the graph cannot be rewritten:\n" + "\n".join(lines) + "\nFreeze them with "
            f"`couple(traced, freeze={dict.fromkeys(fixer.failed, 'cannot be rewritten')!r})` and plan again; "
            "`compile` does so by itself.",
            nodes=fixer.failed,
        )


_BROADCASTING = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, torch.add, torch.mul,
    torch.relu, torch.sigmoid, torch.nn.functional.relu,
}  # fmt: skip


class _Fixer(MetaRunner):
    """Runs the slim graph on meta copies of what it uses; is the `Context` that fixers ask."""

    def __init__(self, root: nn.Module, graph: fx.Graph, prediction: Prediction) -> None:
        super().__init__(root, graph)
        self.prediction = prediction
        self.record = prediction.coupling.record
        self.failed: dict[str, str] = {}
        self._follows = dict(self.record.follows)

    def run_all(self, values: list[Any]) -> None:
        """Go through all nodes; `values` are the placeholders'. A certain node has no value until it is asked for."""
        self.args_iter = iter(values)
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            value = self.run_node(n)
            if value is not None or not self.prediction.shapes(n.name):
                self.env[n] = value

    def run_node(self, n: fx.Node) -> Any:
        """Fix a node, run it and compare its shapes with the prediction; None where they are certain."""
        predicted = self.prediction.shapes(n.name)
        if n.name in self.record.whole:
            return self._stand_in(n)
        try:
            if not predicted and self._is_dense_size(n):
                n.graph.erase_node(n)
                return None
            self._fix(n)
            if self._certain(n, predicted):
                return None
            for source in n.all_input_nodes:
                self._at(source)
            value = self.run_on_meta(n)
        except Exception as error:
            self._fail(n, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            return self._stand_in(n)
        found = [tuple(t.shape) for t in tensors_in(value)]
        if found != predicted:
            self._fail(n, f"shape {found} after the rewrite, {predicted} predicted")
            return self._stand_in(n)
        return value

    def _is_dense_size(self, n: fx.Node) -> bool:
        """Say whether a node expects a size that is another one in the slim network: no input will ever give it."""
        module = submodule(self.module, str(n.target)) if n.op == "call_module" else None
        return isinstance(module, Expected) and answer(module.value, self.value(n.args[0])) != module.value

    def _fail(self, n: fx.Node, reason: str) -> None:
        """Note what went wrong at a node: a module that is called at several has one size for all of them."""
        shared = [m for m in n.graph.nodes if m.op == n.op == "call_module" and m.target == n.target]
        self.failed |= {m.name: reason for m in shared or [n]}

    def _fix(self, n: fx.Node) -> None:
        if n.op in ("call_function", "call_method"):
            fixer = FIXERS.get(plain_name(n))
            if fixer is not None:
                fixer(self, n)
            elif self.prediction.shapes(n.name):
                self._pin_numbers(n)

    def _certain(self, n: fx.Node, predicted: list[Shape]) -> bool:
        """Say whether the shape of a common op can be told without running it, and is the predicted one."""
        if n.name in self.record.keeps_shape and self._inputs(n) == predicted:
            return True
        if n.op == "call_module":
            return fits(submodule(self.module, str(n.target)), self._inputs(n), predicted)
        if n.op == "call_function" and n.target in _BROADCASTING and len(predicted) == 1:
            inputs = self._inputs(n)
            return all(shape == predicted[0] for shape in inputs) or np.broadcast_shapes(*inputs) == predicted[0]
        return False

    def _inputs(self, n: fx.Node) -> list[Shape]:
        """Return the shapes of the tensors that go in, each node's once: they were found to be as predicted."""
        return [shape for source in n.all_input_nodes for shape in self.prediction.shapes(source.name)]

    def _at(self, n: fx.Node) -> Any:
        """Return the value of a node that was run, or what stands in for it."""
        if n not in self.env:
            self.env[n] = self._stand_in(n)
        return self.env[n]

    def _pin_numbers(self, n: fx.Node) -> None:
        """Keep numbers that were computed from a size, and now would differ, at their dense value."""

        def pin(arg: Any) -> Any:
            if isinstance(arg, fx.Node) and isinstance(self.env.get(arg), (int, float)):
                return as_before(self, n, arg)
            return arg

        if any(isinstance(self.env.get(source), (int, float)) for source in n.all_input_nodes):
            n.args, n.kwargs = map_aggregate((n.args, n.kwargs), pin)

    def _stand_in(self, n: fx.Node) -> Any:
        """Return tensors of the predicted shapes."""
        seen = self.record.nodes.get(n.name, [])
        shapes = self.prediction.shapes(n.name)
        tensors = [torch.empty(shape, dtype=t.dtype, device="meta") for shape, t in zip(shapes, seen, strict=True)]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    # what fixers ask

    def value(self, arg: Any) -> Any:
        """Return what an argument evaluates to in the slim network."""
        return pytree.tree_map(lambda a: self._at(a) if isinstance(a, fx.Node) else a, arg)

    def dense(self, arg: Any) -> Any:
        """Return what a number or constant was in the dense network; None for tensors whose values are not known."""
        if not isinstance(arg, fx.Node):
            return arg
        if arg.name in self.record.numbers:
            return self.record.numbers[arg.name]
        return self.record.constants.get(arg.name)

    def insert(self, at: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a node in front of another, and return it."""
        with at.graph.inserting_before(at):
            node = at.graph.call_function(function, args)
        self.env[node] = Runner.run_node(self, node)
        self._follows[node.name] = follows(node, False, self.record.nodes, self._follows)
        return node

    def follows(self, arg: Any) -> bool:
        """Say whether a number follows the size of the input."""
        return given_by(arg, self._follows)

    def shapes(self, node: fx.Node) -> list[Shape]:
        """Return the predicted shapes of what a node returns."""
        return self.prediction.shapes(node.name)

    def dense_shape(self, node: fx.Node) -> Shape:
        """Return the dense shape of the tensor that a node returns."""
        return self.record.nodes[node.name][0].shape

    def kept(self, node: fx.Node, dim: int) -> np.ndarray | None:
        """Return what stays along a dim, in every row that stays."""
        shape = self.dense_shape(node)
        return self.prediction.kept(node.name, dim % len(shape))

    def stays(self, node: fx.Node, dim: int) -> bool:
        """Say whether nothing goes along a dim."""
        kept = self.kept(node, dim)
        return kept is None or bool(kept.all())

    def rows(self, node: fx.Node, dim: int, count: int) -> int:
        """Return how many of `count` equal rows of a dim stay."""
        return self.prediction.rows(node.name, dim, count)
