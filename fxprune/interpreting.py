"""Run a traced graph on meta tensors that carry labels instead of values.

A `TorchDispatchMode` sees every ATen call, whatever composite function it came from, and asks the rule table what
becomes of the labels. An fx interpreter around it says which node is running.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune import labels as algebra
from fxprune.atoms import Ledger
from fxprune.calling import call_of, call_of_function, plain_calls
from fxprune.cloning import State, clone, named_state, submodule
from fxprune.labels import Extent, Labels, Shape
from fxprune.rules import Op, lookup

MAX_CONSTANT = 1 << 22
"""Integer constants of up to this many elements are computed, so that indexing with them can be followed."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A tensor seen at a node: its shape, what its positions are called, and its dtype."""

    shape: Shape
    labels: Labels
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-accumulates at one node: `fixed` times the kept size of each labelled dim."""

    node: str
    fixed: int
    dims: tuple[Extent, ...]


@dataclass(slots=True)
class Buffer:
    """One allocation: the step that made it and the last that reads it. Dims without labels are in `fixed` bytes."""

    fixed: int
    dims: tuple[Extent, ...]
    born: int
    dies: int


@dataclass(slots=True)
class Interpretation:
    """All that one run has recorded."""

    ledger: Ledger
    issued: dict[str, tuple[Shape, Labels, int, bool]] = field(default_factory=dict)
    """Parameter or buffer -> shape, labels, bytes per element, is a parameter; in order of first use."""
    named_at: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer -> the node that used it first."""
    nodes: dict[str, list[Labelled]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """Node -> what it returned, where that is no tensor."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Node -> the values of the constant integer tensor that it returned."""
    work: list[Work] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    steps: int = 0


def meta_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, strides and class (parameter or not) on the meta device."""
    twin = torch.empty_like(value, device="meta", requires_grad=False)
    return torch.nn.Parameter(twin, requires_grad=False) if isinstance(value, torch.nn.Parameter) else twin


_aten = torch.ops.aten
_UNDEFINED = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.randint, _aten.randperm}
"""Ops whose integers are not the same at every call."""
_FLOAT_POINTWISE = {
    _aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.mul, _aten.mul_, _aten.div, _aten.div_, _aten.relu, _aten.relu_,
    _aten.sigmoid, _aten.sigmoid_, _aten.tanh, _aten.gelu, _aten.silu, _aten.silu_, _aten.hardswish, _aten.hardswish_,
    _aten.hardsigmoid, _aten.hardsigmoid_, _aten.hardtanh, _aten.hardtanh_, _aten.leaky_relu, _aten.leaky_relu_,
    _aten.elu, _aten.elu_, _aten.sqrt, _aten.rsqrt, _aten.exp, _aten.neg,
}  # fmt: skip
"""Ops whose result, for floating operands of one dtype, has that dtype and the broadcast shape: no kernel is asked."""


def _pointwise_meta(func: Any, args: Any) -> Any:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    first = tensors[0]
    if any(t.dtype != first.dtype for t in tensors[1:]) or not first.is_floating_point():
        return func(*args)
    shape = first.shape
    if any(t.shape != shape for t in tensors[1:]):
        shape = torch.Size(np.broadcast_shapes(*[t.shape for t in tensors]))
    if func._schema.is_mutable:
        return first if shape == first.shape else func(*args)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _convolution_meta(
    x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> torch.Tensor:
    rank = w.ndim - 2
    stride, padding, dilation, extra = (
        list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation, extra)
    )
    channels = w.shape[0] // groups if transposed else w.shape[1]
    if x.ndim != w.ndim or x.shape[1] != channels * groups:
        return torch.ops.aten.convolution.default(x, w, b, stride, padding, dilation, transposed, extra, groups)
    space = []
    for i in range(rank):
        n, reach = x.shape[2 + i], dilation[i] * (w.shape[2 + i] - 1)
        if transposed:
            space.append((n - 1) * stride[i] - 2 * padding[i] + reach + extra[i] + 1)
        else:
            space.append((n + 2 * padding[i] - reach - 1) // stride[i] + 1)
    out = w.shape[1] * groups if transposed else w.shape[0]
    return torch.empty((x.shape[0], out, *space), dtype=x.dtype, device="meta")


def _batch_norm_meta(x: torch.Tensor, training: bool) -> tuple[torch.Tensor, ...]:
    same = torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else torch.empty_like(x)
    size = x.shape[1] if training else 0
    return same, *(torch.empty(size, dtype=x.dtype, device="meta") for _ in range(2))


def _mean_meta(x: torch.Tensor, dims: Any, keepdim: bool = False) -> torch.Tensor:
    gone = {d % x.ndim for d in dims or ()}
    if not gone or len(gone) != len(dims) or min(dims) < -x.ndim or max(dims) >= x.ndim or not x.is_floating_point():
        return torch.ops.aten.mean.dim(x, dims, keepdim)
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _addmm_meta(bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    usual = (
        x.ndim == w.ndim == 2
        and x.shape[1] == w.shape[0]
        and bias.shape == w.shape[1:]
        and bias.dtype == x.dtype == w.dtype
    )
    return (
        torch.empty((x.shape[0], w.shape[1]), dtype=x.dtype, device="meta")
        if usual
        else torch.ops.aten.addmm.default(bias, x, w)
    )


@functools.cache
def _returns_fresh(func: Any) -> bool:
    """Say whether an op computes new tensors and touches none of its arguments."""
    schema = func._schema
    return (
        func is not _aten._unsafe_view.default  # a view, whatever its schema says
        and not schema.is_mutable
        and bool(schema.returns)
        and all(r.alias_info is None and str(r.type) == "Tensor" for r in schema.returns)
        and all(a.alias_info is None for a in schema.arguments)
    )


def _call_key(func: Any, args: Any) -> Any:
    """Describe a call by what its result's shape depends on; None where that cannot be told cheaply."""
    key: list[Any] = [func]
    for a in args:
        if isinstance(a, torch.Tensor):
            key += [a.shape, a.dtype]
        elif isinstance(a, (int, float, bool, type(None))):
            key.append(a)
        elif isinstance(a, (list, tuple)) and all(type(v) in (int, bool) for v in a):
            key.append(tuple(a))
        else:
            return None
    if any(isinstance(a, torch.Tensor) and not a.is_contiguous() for a in args):
        return None
    return tuple(key)


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Say whether an op makes tensors out of none, on a device that it is told."""
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def on_meta(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let an op that is told a device, or makes tensors, use the meta device."""
    if kwargs.get("device") is not None or _makes_tensors(func):
        return {**kwargs, "device": "meta"}
    return kwargs


class OnMeta(TorchDispatchMode):
    """Keep on the meta device what forward sends elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op on the meta device."""
        return func(*args, **on_meta(func, kwargs or {}))


class Labelling(TorchDispatchMode):
    """Carry labels through every ATen call."""

    def __init__(self, state: Iterable[State]) -> None:
        """Know the parameters and buffers; they are met as they are, or as their twins on the meta device."""
        super().__init__()
        self.record = Interpretation(Ledger())
        self.ledger = self.record.ledger
        self._origin = {id(item[1]): item for item in state}
        self._state_labels: dict[str, Labels] = {}
        self._twins: dict[int, torch.Tensor] = {}
        self._returned: dict[Any, tuple[bool, list[tuple[torch.Size, torch.dtype]]]] = {}
        self._rules: dict[Any, Any] = {}

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands for a parameter or buffer on the meta device."""
        origin = self._origin.get(id(tensor))
        if origin is None:
            return tensor
        found = self._twins.get(id(tensor))
        if found is None:
            found = self._twins[id(tensor)] = meta_tensor(tensor)
            self._origin[id(found)] = origin
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one ATen call on meta tensors and label what comes out."""
        kwargs = on_meta(func, kwargs or {})
        out = self._run(func, args, kwargs)
        results = tensors_in(out)
        inputs = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        if results:
            self._fold(func, args, kwargs, results, inputs)
            self._label(Op(func, out, self), args, kwargs, results, inputs)
            self._account(func, results, inputs)
        return out

    def call(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor:
        """Label one ATen call on floating tensors without going through the dispatcher; return its first result."""
        out = self._run(func, args, {})
        results = [out] if isinstance(out, torch.Tensor) else list(out)
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        self._label(Op(func, out, self), args, {}, results, inputs)
        self._account(func, results, inputs)
        return results[0]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on meta tensors, or remember what it returned for tensors of these shapes."""
        if kwargs:
            return func(*args, **kwargs)
        if func.overloadpacket in _FLOAT_POINTWISE:
            return _pointwise_meta(func, args)
        if func is _aten.native_batch_norm.default:
            return _batch_norm_meta(args[0], args[5])
        if func is _aten.mean.dim:
            return _mean_meta(*args)
        if func is _aten.addmm.default:
            return _addmm_meta(*args)
        if func is _aten.convolution.default:
            return _convolution_meta(*args)
        key = _call_key(func, args) if _returns_fresh(func) else None
        if key is None:
            return func(*args)
        known = self._returned.get(key)
        if known is None:
            out = func(*args)
            if type(out) is torch.Tensor:
                self._returned[key] = (False, [(out.shape, out.dtype)])
            elif all(type(t) is torch.Tensor for t in out):
                self._returned[key] = (True, [(t.shape, t.dtype) for t in out])
            return out
        several, described = known
        made = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in described]
        return tuple(made) if several else made[0]

    # what rules ask for

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor; issue fresh ones to a parameter that is met for the first time."""
        origin = self._origin.get(id(tensor))
        found = getattr(tensor, "_labels", None) if origin is None else self._state_labels.get(origin[0])
        if found is not None:
            return found
        if origin is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return algebra.blank(tensor.ndim)
        return self.name(tensor, algebra.issue(self.ledger, tuple(tensor.shape)))

    def pristine(self, tensor: torch.Tensor) -> bool:
        """Say whether this is a parameter about whose labels nothing has been said yet."""
        origin = self._origin.get(id(tensor))
        return origin is not None and origin[0] not in self._state_labels

    def name(self, tensor: torch.Tensor, labels: Labels) -> Labels:
        """Give a parameter nothing has been said about yet its labels, and return them."""
        name, original, is_parameter = self._origin[id(tensor)]
        self.record.issued[name] = (tuple(tensor.shape), labels, original.element_size(), is_parameter)
        self.record.named_at[name] = self.ledger.node
        self._state_labels[name] = labels
        return labels

    def constant(self, shape: Shape) -> np.ndarray:
        """Issue fresh atoms for channels made of a constant, which can be cut anywhere."""
        atoms = self.ledger.fresh(shape)
        self.ledger.mark(atoms)
        return atoms

    def count(self, fixed: int, dims: tuple[Extent, ...]) -> None:
        """Record multiply-accumulates."""
        self.record.work.append(Work(self.ledger.node, fixed, dims))

    def value(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return the known value of a constant integer tensor."""
        if tensor is None or tensor.is_floating_point() or tensor.is_complex():
            return None
        if tensor.device.type != "meta":
            return tensor
        found = getattr(tensor, "_constant", None)
        if found is None and id(tensor) in self._origin:
            original = self._origin[id(tensor)][1]
            found = original.detach().cpu() if original.device.type != "meta" else None
        return found

    # what happens at every call

    def _fold(self, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Compute integer constants: ops on known integers only, and ops that make integers from nothing."""
        if any(t.is_floating_point() or t.is_complex() or t.numel() > MAX_CONSTANT for t in results):
            return
        known = {id(t): self.value(t) for t in inputs}
        if any(v is None for v in known.values()) or func._schema.is_mutable or func.overloadpacket in _UNDEFINED:
            return
        args, kwargs = pytree.tree_map(lambda a: known[id(a)] if isinstance(a, torch.Tensor) else a, (args, kwargs))
        out = func(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
        values = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        for result, value in zip(results, values, strict=True):
            if result.shape == value.shape and value.device.type == "cpu":
                result._constant = value  # pyright: ignore[reportAttributeAccessIssue]

    def _label(self, op: Op, args: Any, kwargs: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        known = op.func in self._rules
        rule = self._rules[op.func] if known else self._rules.setdefault(op.func, lookup(op.func))
        if rule is None:
            reached = [t for t in inputs if any(ids is not None for ids in self.labels(t))]
            for t in reached:
                for d in range(t.ndim):
                    algebra.fix(self.ledger, self.labels(t), d, f"reaches {op.name}, which has no rule")
            if reached:
                self.record.unknown.append((self.ledger.node, op.name))
            labels: list[Labels] = [algebra.blank(t.ndim) for t in results]
        else:
            found = rule(op, *args, **kwargs)
            labels = found if isinstance(found, list) else [found]
        for tensor, mine in zip(results, labels, strict=True):
            shape = tensor.shape
            if len(mine) != len(shape) or any(
                ids is not None and ids.shape[d] != shape[d] for d, ids in enumerate(mine)
            ):
                raise RuntimeError(f"the rule of {op.name} returned labels that do not fit shape {tuple(shape)}")
            origin = self._origin.get(id(tensor))
            if origin is None:
                tensor._labels = mine  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self._state_labels[origin[0]] = mine

    def _account(self, func: Any, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Keep the books of memory: who was allocated when, who was read last when."""
        step = self.record.steps = self.record.steps + 1
        fresh = _returns_fresh(func)
        owners: dict[int, Buffer] = {}
        for t in inputs:
            buffer = _NO_BUFFER if id(t) in self._origin else getattr(t, "_buffer", None)
            if buffer is None:
                continue
            if buffer is not _NO_BUFFER:
                buffer.dies = step
            if not fresh:
                owners[t.untyped_storage()._cdata] = buffer
        for t in results:
            if id(t) not in self._origin and t.numel():
                self.own(t, None if fresh else owners.get(t.untyped_storage()._cdata))

    def own(self, tensor: torch.Tensor, buffer: Buffer | None = None) -> None:
        """Give a tensor its allocation: that of the tensor it is a view of, or a new one."""
        if buffer is None:
            labels = self.labels(tensor)
            fixed = tensor.element_size()
            for n, ids in zip(tensor.shape, labels, strict=True):
                fixed *= n if ids is None else 1
            buffer = Buffer(fixed, algebra.extents(labels), self.record.steps, self.record.steps)
            self.record.buffers.append(buffer)
        tensor._buffer = buffer  # pyright: ignore[reportAttributeAccessIssue]


_NO_BUFFER = Buffer(0, (), 0, 0)
"""Stands for the storage of parameters, which is counted apart."""


class InterpretationError(Exception):
    """A node raised; `node` names it, the cause is what it raised."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class GraphRunner(fx.Interpreter):
    """Run a graph under `Labelling`, node by node."""

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, mode: Labelling) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=graph)  # pyright: ignore[reportArgumentType]
        self.module = root  # pyright: ignore[reportAttributeAccessIssue] (not above: it would list all modules in it)
        self.mode = mode
        self._plain_calls = plain_calls()
        self._meta: dict[str, Any] = {}

    def run_all(self, values: Iterable[Any]) -> None:
        """Run all nodes; `values` are those of the placeholders."""
        self.args_iter = iter(values)
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            self.env[n] = self.run_node(n)
        for n in self.graph.nodes:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            if n.op == "get_attr":
                tensors = tensors_in(self.env[n])
                self.mode.record.nodes[n.name] = [
                    Labelled(tuple(t.shape), self.mode.labels(t), t.dtype) for t in tensors
                ]

    def fetch_attr(self, target: str) -> Any:
        """Return what a node refers to, with its tensors on the meta device."""
        if target not in self._meta:
            found = super().fetch_attr(target)
            if isinstance(found, torch.Tensor):
                found = self.mode.twin(found)
            elif isinstance(found, torch.nn.Module):
                found = clone(found, {id(t): self.mode.twin(t) for _, t, _ in named_state(found)})
            self._meta[target] = found
        return self._meta[target]

    def _call(self, n: fx.Node) -> torch.Tensor | None:
        """Return the result of a common layer or operator without running it; None where it has to be run."""
        if n.op not in ("call_module", "call_function") or n.kwargs:
            return None
        operands = [self.env[a] if isinstance(a, fx.Node) else None for a in n.args]
        call = None
        if n.op == "call_function":
            call = call_of_function(n.target, operands)
        elif self._plain_calls and len(operands) == 1 and isinstance(operands[0], torch.Tensor):
            call = call_of(submodule(self.module, str(n.target)), operands[0])
        return None if call is None else self.mode.call(*call)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Let `x[.., [2, 0, 1]]` know its positions: torch would make a meta tensor of the list."""
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(_positions(i) if isinstance(i, list) else i for i in items))
        return super().call_function(target, args, kwargs)

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
            with mode:
                value = super().run_node(n)
        except Exception as error:
            raise InterpretationError(n.name) from error
        tensors = tensors_in(value)
        if n.op == "output":
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
        for node in [n, *n.all_input_nodes]:
            for t in tensors_in(self.env.get(node, value if node is n else None)):
                buffer = getattr(t, "_buffer", None)
                if buffer is not None and buffer is not _NO_BUFFER:
                    buffer.dies = mode.record.steps
        return value


def _positions(items: list[int]) -> torch.Tensor:
    constant = torch.tensor(items, device="cpu")
    positions = torch.empty_like(constant, device="meta")
    positions._constant = constant  # pyright: ignore[reportAttributeAccessIssue]
    return positions


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value: containers and dataclasses included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in (int, float, bool, str, type(None)):
        return []
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


def to_meta(value: Any) -> Any:
    """Copy example inputs to the meta device, remembering the values of small integer tensors."""

    def move(t: Any) -> Any:
        return torch.empty_like(t, device="meta", requires_grad=False) if isinstance(t, torch.Tensor) else t

    return pytree.tree_map(move, value)


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


def bind(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Lay example inputs out in the order of the graph's placeholders, defaults included."""
    if isinstance(graph._codegen, _PyTreeCodeGen):
        return pytree.arg_tree_leaves(*args, **kwargs)
    values = []
    for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        if i < len(args):
            values.append(args[i])
        elif node.target in kwargs:
            values.append(kwargs[node.target])
        elif node.args:
            values.append(node.args[0])
        elif str(node.target).startswith("*"):
            values.append({} if str(node.target).startswith("**") else ())
        else:
            raise TypeError(f"missing input {node.target!r}")
    return values
