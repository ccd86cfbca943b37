"""Run a traced graph on meta tensors that carry labels instead of values, node by node."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxprune import labels as algebra
from fxprune.atoms import FIXED
from fxprune.attending import Attending
from fxprune.calling import call_of, call_of_torch_function, is_identity, plain_calls
from fxprune.cloning import State, submodule
from fxprune.following import follow
from fxprune.labelling import NO_BUFFER, Labelling
from fxprune.lengths import CUTS, MAKES, dims_by_length, dims_viewed_apart, follows
from fxprune.records import Interpretation, Labelled
from fxprune.running import VALUES, MetaRunner
from fxprune.telling import POINTWISE
from fxprune.values import bind, tensors_in, to_meta

_PLAIN = {
    getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
    operator.mod, operator.eq, operator.neg,
}  # fmt: skip
"""Functions that make no ATen call on anything but tensors."""


_OWN = ("torch.nn.", "fxprune.")
"""Where classes of modules are at home that are no user's."""

_SHAPE_KEEPING = POINTWISE | {torch.ops.aten.native_batch_norm, torch.ops.aten.empty}
"""Ops whose result has the shape of what goes in, whatever that is; a batch norm asks for empty memory too."""


class InterpretationError(Exception):
    """A node raised; `node` names it, the cause is what it raised, `reads` an op that depends on data, if it is why."""

    def __init__(self, node: str, reads: str | None = None) -> None:
        super().__init__(node)
        self.node, self.reads = node, reads


class GraphRunner(MetaRunner):
    """Run a graph under `Labelling`, node by node."""

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, mode: Labelling) -> None:
        super().__init__(root, graph)
        self.mode = mode
        self._attending = Attending(mode)
        self._plain_calls = plain_calls()
        self._unfollowed: set[type[torch.nn.Module]] = set()
        """Classes of modules of which one was to be run, as others will probably be."""

    def run_all(self, values: Iterable[Any]) -> None:
        """Run all nodes; `values` are those of the placeholders."""
        self.args_iter = iter(values)
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            self.env[n] = self.run_node(n)
            self._hold_lengths(n)
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            if n.op == "placeholder":
                self._read(self.env[n])  # whoever calls the network holds its inputs meanwhile
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            if n.op == "get_attr":
                tensors = tensors_in(self.env[n])
                self.mode.record.nodes[n.name] = [
                    Labelled(tuple(t.shape), self.mode.labels(t), t.dtype) for t in tensors
                ]

    def _twin(self, value: torch.Tensor) -> torch.Tensor:
        return self.mode.twin(value)

    def _call(self, n: fx.Node) -> torch.Tensor | None:
        """Return the result of a common layer or operator without running it; None where it has to be run."""
        if n.op not in ("call_module", "call_function", "call_method"):
            return None
        operands = [self.env[a] if isinstance(a, fx.Node) else a for a in n.args]
        call = None
        if n.op != "call_module":
            function = getattr(torch.Tensor, str(n.target), None) if n.op == "call_method" else n.target
            kwargs = {key: self.env[a] if isinstance(a, fx.Node) else a for key, a in n.kwargs.items()}
            call = call_of_torch_function(function, tuple(operands), kwargs)
        elif self._plain_calls and len(operands) == 1 and not n.kwargs and isinstance(operands[0], torch.Tensor):
            module = submodule(self.module, str(n.target))
            if is_identity(module):
                self._read(operands[0])
                return operands[0]
            call = call_of(module, operands[0])
            if call is None and not type(module).__module__.startswith(_OWN):
                return self._follow(n, module, operands[0])
        if call is None:
            return None
        if len(operands) == 1 and call[0].overloadpacket in POINTWISE:
            self.mode.record.keeps_shape.add(n.name)
        return self.mode.call(*call)

    def _follow(self, n: fx.Node, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the result of a module of the user's that makes common calls only; None where it has to be run."""
        found = None if type(module) in self._unfollowed else follow(module, x)
        if found is None:
            self._unfollowed.add(type(module))
            return None
        value, made = found
        for (func, args), out in made:
            self.mode.enter(func, args, out)
        if all(func.overloadpacket in _SHAPE_KEEPING for (func, _), _ in made):
            self.mode.record.keeps_shape.add(n.name)
        return value

    def _read(self, value: Any) -> None:
        """Note that the memory of a value was needed up to now."""
        for t in tensors_in(value):
            buffer = getattr(t, "_buffer", None)
            if buffer is not None and buffer is not NO_BUFFER:
                buffer.dies = self.mode.record.steps

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Let `x[.., [2, 0, 1]]` know its positions: torch would make a meta tensor of the list."""
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(_positions(i) if isinstance(i, list) else i for i in items))
        return super().call_function(target, args, kwargs)

    def _is_plain(self, n: fx.Node) -> bool:
        """Say whether a node only hands on a value, asks for a size, or computes with numbers or containers."""
        if n.op in VALUES:
            return True
        if n.op == "call_method":
            return n.target in ("size", "dim")
        if n.op != "call_function" or n.target not in _PLAIN:
            return False
        if n.target is getattr:
            return n.args[1] in ("shape", "ndim", "dtype", "device")  # `x.real` and `x.T` are tensors
        return not any(isinstance(self.env[a], torch.Tensor) for a in n.all_input_nodes)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it returned."""
        mode = self.mode
        mode.ledger.node = n.name
        try:
            value = self._call(n)
            if value is not None:
                mode.record.nodes[n.name] = [Labelled(tuple(value.shape), mode.labels(value), value.dtype)]
                return value
            if n.op in ("get_attr", "call_module"):
                self.fetch_attr(str(n.target))  # its twins are no part of the graph: made outside the mode
            mode.calls.clear()
            if self._is_plain(n):
                value = super().run_node(n)
            else:
                with mode, self._attending:
                    value = super().run_node(n)
            if n.op == "call_module" and mode.calls and _SHAPE_KEEPING.issuperset(mode.calls):
                mode.record.keeps_shape.add(n.name)
        except Exception as error:
            value = self._kept_whole(n)
            if value is None:
                raise InterpretationError(n.name, _reading(mode.calls, error)) from error
        tensors = tensors_in(value)
        if n.op == "output":
            mode.read(tensors)
            for t in tensors:
                for d in range(t.ndim):
                    algebra.fix(mode.ledger, mode.labels(t), d, "is an output of the network")
        if n.op != "get_attr":  # a parameter takes its labels from what it is first used on
            mode.record.nodes[n.name] = [Labelled(tuple(t.shape), mode.labels(t), t.dtype) for t in tensors]
        if not tensors:
            mode.record.numbers[n.name] = value
        elif len(tensors) == 1 and (constant := mode.value(tensors[0])) is not None:
            mode.record.constants[n.name] = constant.numpy()
        if n.op == "placeholder":
            for t in tensors:
                mode.own(t)
        self._read(value)
        for node in n.all_input_nodes:
            self._read(self.env[node])
        return value

    def _hold_lengths(self, n: fx.Node) -> None:
        """Let nothing go of dims that a node cuts, or makes, by numbers that follow the size of the input."""
        mode, results = self.mode, tensors_in(self.env[n])
        known = mode.record.follows
        known[n.name] = follows(n, bool(results), mode.record.nodes, known)
        if n.op not in ("call_function", "call_method"):
            return
        x = self.env[n.args[0]] if n.args and isinstance(n.args[0], fx.Node) else None
        cut = dims_by_length(CUTS, n, x.ndim, known) if isinstance(x, torch.Tensor) else []
        if isinstance(x, torch.Tensor) and len(results) == 1:
            before, after = (Labelled(tuple(t.shape), mode.labels(t), t.dtype) for t in (x, results[0]))
            cut += dims_viewed_apart(n, before, after, known)
        made = [(t, dim) for t in results for dim in dims_by_length(MAKES, n, t.ndim, known)]
        if cut or made:
            self._hold_cut(x, cut, results)
            for t, dim in made:
                ids = mode.labels(t)[dim]
                if ids is not None and mode.ledger.is_constant(ids).any():
                    mode.hold(t, dim, "is as long as the size of the input says")
            mode.record.nodes[n.name] = [Labelled(tuple(t.shape), mode.labels(t), t.dtype) for t in results]

    def _hold_cut(self, x: Any, dims: Iterable[int], results: list[torch.Tensor]) -> None:
        """Let nothing go of some dims of a tensor, and of what was cut from them."""
        mode = self.mode
        for dim in dims:
            ids = mode.labels(x)[dim]
            if ids is None:
                continue
            algebra.fix(mode.ledger, mode.labels(x), dim, "is cut where the size of the input says")
            for t in results:
                for d, mine in enumerate(mode.labels(t)):
                    if mine is not None and np.isin(mine, ids[ids != FIXED]).any():
                        mode.hold(t, d, "is cut where the size of the input says")

    def _kept_whole(self, n: fx.Node) -> Any:
        """Return what a function of the user's that asks for values returns for zeros; all that reaches it must stay.

        None where the node calls something else, or the function does not return tensors for zeros either.
        """
        if not isinstance(n.target, FunctionType) or n.target.__module__.startswith("torch."):
            return None
        args, kwargs = self._value(n.args), self._value(n.kwargs)
        try:
            found = n.target(*pytree.tree_map(_zeros, args), **pytree.tree_map(_zeros, kwargs))
        except Exception:
            return None
        results = tensors_in(found)
        if not results or len(results) != len(pytree.tree_leaves(found)):
            return None
        reason = f"reaches {n.target.__name__}, a function that is kept whole and asks for values"
        self.mode.read(tensors_in((args, kwargs)))
        for t in tensors_in((args, kwargs)):
            for d in range(t.ndim):
                algebra.fix(self.mode.ledger, self.mode.labels(t), d, reason)
        self.mode.record.unknown.append((n.name, n.target.__name__))
        self.mode.record.whole.add(n.name)
        value = to_meta(found)
        for t in tensors_in(value):
            self.mode.own(t)
        return value


_READS_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _reading(calls: list[Any], error: Exception) -> str | None:
    """Return the op, of those called, that has failed because it returns a number, or a size, that depends on data."""
    if not calls or "meta" not in str(error).lower():
        return None
    tags = {tag for name in calls[-1].overloads() for tag in getattr(calls[-1], name).tags}
    return None if _READS_DATA.isdisjoint(tags) else str(calls[-1])


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _positions(items: list[int]) -> torch.Tensor:
    constant = torch.tensor(items, device="cpu")
    positions = torch.empty_like(constant, device="meta")
    positions._constant = constant  # pyright: ignore[reportAttributeAccessIssue]
    return positions


def interpret(
    root: torch.nn.Module, state: Iterable[State], graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Interpretation:
    """Run a graph on labels.

    Args:
        root: the module that holds the graph's parameters; not touched.
        state: the parameters and buffers that take part.
        graph: the graph.
        args: positional example inputs.
        kwargs: keyword example inputs.
    """
    mode = Labelling(state)
    with torch.no_grad():
        GraphRunner(root, graph, mode).run_all(bind(graph, to_meta(args), to_meta(kwargs)))
    return mode.record
