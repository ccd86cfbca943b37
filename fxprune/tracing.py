"""From a module to an fx graph that behaves like it: signature, train and eval mode, dynamic sizes, source lines."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fxprune.attention import MultiheadAttention, make_traceable
from fxprune.cloning import clone, modules_in, named_part, named_state, plain_tensors, uncompiled, unused_name
from fxprune.errors import TraceError
from fxprune.expecting import Expect, Expected
from fxprune.exporting import exported
from fxprune.pausing import without_collector
from fxprune.recurrent import PACKED, is_packed, raised_packing
from fxprune.sizing import SizedTracer, Symbol
from fxprune.sources import short_line, user_line
from fxprune.traced import TRAINING, Traced, TrainingFlag, attach, left_out, taking_part
from fxprune.values import to_meta
from fxprune.watching import watched

_PLAIN = {int, float, str, bool, type(None)}


class _Flag(int):
    """A bool that remembers that it was asked: `self.training` while a module is traced."""

    asked: list[str]

    def __bool__(self) -> bool:
        self.asked.append(user_line())
        return int(self) != 0


class Tracer(SizedTracer):
    """Symbolic tracer that keeps default arguments, source lines, and what depends on training mode."""

    def __init__(
        self,
        fixed: Mapping[str, Any],
        inputs: Mapping[str, Any],
        device: torch.device,
        positional: int,
        named: Collection[str],
        training: bool,
    ) -> None:
        super().__init__(inputs, device, positional, named)
        self.fixed = fixed
        self.flag = _Flag(training)
        self.flag.asked = []
        self.sources: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep modules of torch.nn whole; of others batch norms, and stateless ones, that ask for `self.training`."""
        if isinstance(m, (MultiheadAttention, Expect, Expected)):
            return True
        if super().is_leaf_module(m, module_qualified_name) and not _is_users_own(m):
            return True
        code = getattr(type(m).forward, "__code__", None)
        if code is None or "training" not in code.co_names:
            return False
        stateless = not m._modules and all(p is None for p in m._parameters.values())
        return stateless or isinstance(m, nn.modules.batchnorm._BatchNorm)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a leaf, walk through the others; the stack of modules that torch notes at every node is not needed."""
        known = isinstance(m, Expect) and not isinstance(args[0], fx.Proxy)  # an argument that is fixed again
        made = m not in (self.submodule_paths or ())  # by forward: `nn.ReLU()(x)`
        if known or made or not self.recording:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            return forward(*args, **kwargs)
        result = self.create_proxy("call_module", path, args, kwargs)
        if isinstance(m, MultiheadAttention) and not m.asked_for_weights(*args, **kwargs):
            first = self.create_proxy("call_function", operator.getitem, (result, 0), {})
            return first, None  # which forward may compare with None: a symbolic value never is
        return result

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Note the source line of each node; what torch notes there besides is not needed."""
        if kind in ("placeholder", "output"):
            return super().create_node(kind, target, args, kwargs, name, type_expr)
        node = self.graph.create_node(kind, target, (), {}, name, type_expr)
        attach(node, args, kwargs)
        self.sources[node.name] = user_line()
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn `self.training`, handed to a function, into a node that asks for it."""
        kind = type(a)
        if kind is Symbol:
            return a.node
        if kind in _PLAIN or (kind is dict and not a):
            return a
        if kind is tuple:
            return tuple([self.create_arg(v) for v in a])
        if kind is _Flag:
            if TRAINING not in self.root._modules:
                self.added[TRAINING] = TrainingFlag()
            return self.create_node("call_module", TRAINING, (), {})
        if isinstance(a, dict) and is_dataclass(a):
            values = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
            return self.create_node("call_function", kind, (), values)
        return super().create_arg(a)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name.startswith("**"):
            given = self.inputs[name[2:]]
            self._fix(f"sorted({name[2:]})", self._call(sorted, proxy), sorted(given))
            return Named({key: self._item(proxy, key, key, value) for key, value in given.items()})
        if name.startswith("*"):
            given = self.inputs[name[1:]]
            self._fix(f"len({name[1:]})", self._call(len, proxy), len(given))
            return Several(self._item(proxy, i, f"{name[1:]}[{i}]", value) for i, value in enumerate(given))
        return self._fix(name, proxy, self.fixed[name]) if name in self.fixed else proxy

    def _item(self, given: fx.Proxy, key: Any, name: str, value: Any) -> Any:
        """Return one of the arguments whose number or names are open."""
        item = self._call(operator.getitem, given, key)
        return item if _has_tensors(value) else self._fix(name, item, value)

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        """Record a call that is left out again if nothing reads what it returns."""
        result = self.create_proxy("call_function", function, args, {})
        self.spare.append(result.node)
        return result

    def _fix(self, name: str, given: fx.Proxy, value: Any) -> Any:
        """Return the value of an argument, and let the graph check that it is so."""
        plain = "".join(c if c.isalnum() else "_" for c in name)
        # a slim network has that of another trace
        target = unused_name(self.root, f"fxprune_expect_{plain}", self.added)
        self.added[target] = Expect(name, value).train(bool(int(self.flag)))
        self.create_node("call_module", target, (given.node,), {})
        return value


class Several(tuple[Any, ...]):
    """Positional arguments of open number: a tuple to forward, and one argument to torch."""


class Named(dict[str, Any]):
    """Keyword arguments of open names: a dict to forward, and one argument to torch."""


def _is_users_own(module: nn.Module) -> bool:
    """Say whether a module of a class that `torch.nn.utils.parametrize` has made is a layer of the user's."""
    return type(module).__module__ == parametrize.__name__ and any(
        kind.__module__ == parametrize.__name__ and not kind.__bases__[0].__module__.startswith("torch.")
        for kind in type(module).__mro__
    )


_ADVICE = "Check that `model(*example_inputs)` runs; mark functions that cannot be traced with `torch.fx.wrap`."


@torch.inference_mode(False)
def trace(model: nn.Module, example_inputs: Any) -> Traced:
    """Trace a model into an fx graph.

    `torch.fx.symbolic_trace` is tried first, on a copy that shares the parameters; where it fails (Python that depends
    on data), `torch.export`. Arguments of `forward` that the examples leave at their default are fixed to it.

    Args:
        model: any module. It is neither run nor changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        TraceError: no example inputs, inputs that do not fit the signature, or neither front end can trace the model.
    """
    plain = uncompiled(model) if isinstance(model, nn.Module) else model
    traced = _traced(plain, *checked_inputs(plain, example_inputs))
    return traced if plain is model else replace(traced, notes=(_UNCOMPILED, *traced.notes))


_UNCOMPILED = (
    "torch.compile was taken off before tracing: names are those of the modules inside, without `_orig_mod`; compile "
    "the slim network"
)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    first = None
    for through in (True, False):
        try:
            return _symbolic(model, args, kwargs, through)
        except Exception as symbolic_error:
            first = first or symbolic_error
    assert first is not None
    try:
        return exported(model, args, kwargs)
    except Exception as export_error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced.\n"
            f"  torch.fx.symbolic_trace: {type(first).__name__}: {_first_line(first)}\n"
            f"  torch.export: {type(export_error).__name__}: {_first_line(export_error)}\n"
            + (f"Here {PACKED}." if raised_packing(first) else _ADVICE)
        ) from export_error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def checked_inputs(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments of a model's forward.

    Raises:
        TraceError: they hold no tensor, or do not fit the signature.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}, not a torch.nn.Module. Pass the module itself.")
    if is_packed(example_inputs):
        raise TraceError(f"{PACKED}.")
    if isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, dict):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    else:
        args, kwargs = (), {}
    if not _has_tensors((args, kwargs)):
        raise TraceError(
            f"no tensor in the example inputs ({type(example_inputs).__name__}). Pass a tensor, a tuple of positional "
            "inputs or a dict of keyword inputs, such as `torch.randn(1, 3, 224, 224)`."
        )
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"the example inputs do not fit `{type(model).__name__}.forward{inspect.signature(model.forward)}`: "
            f"{error}. Pass one example for every argument without a default."
        ) from error
    return args, kwargs


@without_collector
def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], through: bool) -> Traced:
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs)
    fixed = _fixed(signature, given.arguments)
    given.apply_defaults()
    device = next(t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    make = functools.partial(Tracer, fixed, to_meta(given.arguments), device, len(args), kwargs)
    root, graph, tracer = _trace_once(model, make, model.training, through)
    notes = []
    asked = list(dict.fromkeys(tracer.flag.asked))
    if asked and not _merge_modes(graph, _trace_once(model, make, not model.training, through)[1]):
        mode = "train" if model.training else "eval"
        lines = ", ".join(short_line(line) for line in asked[:3])
        notes.append(
            f"forward takes another path in the other mode ({lines}); the slim network follows the {mode}() path in "
            "both"
        )
    if any(n.op == "call_module" and n.target == TRAINING for n in graph.nodes):
        root.add_module(TRAINING, TrainingFlag().train(model.training))  # its own, or that of arguments merged
    one_path = bool(notes)
    if tracer.autocasts:
        lines = ", ".join(short_line(line) for line in dict.fromkeys(tracer.autocasts))
        notes.append(f"forward sets torch.autocast ({lines}); the slim network leaves it as it is set outside")
    if tracer.walked:
        lines = ", ".join(short_line(line) for line in dict.fromkeys(tracer.walked))
        notes.append(f"forward applies an autograd function to modules ({lines}); its backward is left out")
    state, unused = taking_part(root, graph)
    notes += left_out(unused)
    return Traced(model, root, graph, args, kwargs, "symbolic_trace", one_path, tuple(notes), tracer.sources, state)


def _fixed(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of forward that the examples leave at a default, or give as something but tensors."""
    fixed = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = given.get(name, parameter.default)
        if not _has_tensors(value):
            fixed[name] = value
    return fixed


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _guarded(modules: list[nn.Module]) -> tuple[dict[int, torch.Tensor], list[tuple[torch.Tensor, int]]]:
    """Copy what a forward that is traced may write to: buffers of modules that are no layers of torch.nn.

    Returns:
        id of a buffer -> its copy, and (tensor, version) of everything the trace will see.
    """
    copies: dict[int, torch.Tensor] = {}
    seen: list[tuple[torch.Tensor, int]] = []
    with torch.no_grad():
        for m in modules:
            seen += [(t, t._version) for t in m._parameters.values() if t is not None]
            if type(m).__module__.startswith("torch.nn."):
                seen += [(t, t._version) for t in m._buffers.values() if t is not None]
                continue
            for t in [*m._buffers.values(), *plain_tensors(m).values()]:
                if t is not None:
                    own = copies[id(t)] = t.clone()
                    seen.append((own, own._version))
    return copies, seen


def _trace_once(
    model: nn.Module, make: Callable[[bool], Tracer], training: bool, through: bool
) -> tuple[nn.Module, fx.Graph, Tracer]:
    copies, seen = _guarded([m for _, m in modules_in(model)])
    root = clone(model, copies)
    modules = list(modules_in(root))
    make_traceable(m for _, m in modules)
    tracer = make(training)
    tracer.submodule_paths = {m: name for name, m in modules}
    modes = [(vars(m), m.training) for _, m in modules]
    for attributes, mode in modes:
        if mode == model.training:
            attributes["training"] = tracer.flag
    with (
        _through_wrapped() if through else nullcontext(),
        watched((m for _, m in modules), tracer._autowrap_function_ids),
    ):
        graph = tracer.trace(root)
    _restore_buffers(modules, model, copies)
    written = {id(t) for t, version in seen if t._version != version}
    if written:
        names = [name for name, t, _ in named_state(root) if id(t) in written]
        raise TraceError(f"forward writes to {', '.join(map(repr, names[:3]))}, which a symbolic trace does not record")
    for attributes, mode in modes:
        attributes["training"] = mode
    graph._tracer_cls = fx.Tracer  # what unpickling a module of this graph calls
    return root, graph, tracer


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _restore_buffers(
    modules: list[tuple[str, nn.Module]], model: nn.Module, copies: Mapping[int, torch.Tensor]
) -> None:
    """Put back the buffers that forward assigned symbolic values to: `self.calls += 1` is in the graph as `iadd`.

    Raises:
        TraceError: another value was assigned, which the graph would forget.
    """
    for path, m in modules:
        for key, value in m._buffers.items():
            if isinstance(value, fx.Proxy):
                name = f"{path}.{key}" if path else key
                node = value.node
                while node.op == "call_function" and node.target in _IN_PLACE and isinstance(node.args[0], fx.Node):
                    node = node.args[0]
                if (node.op, node.target) != ("get_attr", name):
                    raise TraceError(f"forward assigns to {name!r}, which a symbolic trace does not record")
                own = named_part(model, name)
                m._buffers[key] = copies.get(id(own), own)


@contextmanager
def _through_wrapped() -> Iterator[None]:
    """Let a trace walk through the Python functions that `torch.fx.wrap` keeps whole: they hold sizes of their own."""
    table = _symbolic_trace._wrapped_fns_to_patch
    walked = {
        key: table.pop(key)
        for key, home in list(table.items())
        if isinstance(home.get(key[1]), FunctionType) and not home.get("__name__", "").startswith("torch.")
    }
    try:
        yield
    finally:
        table.update(walked)


def _same(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> bool:
    """Say whether two arguments are the same; `twin` maps the nodes of the second graph to those of the first."""
    if type(a) is not type(b):
        return False
    if isinstance(a, fx.Node):
        return twin.get(b) is a
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(v, w, twin) for v, w in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[key], twin) for key, v in a.items())
    return type(a) in _PLAIN and a == b


def _merge_modes(graph: fx.Graph, other: fx.Graph) -> bool:
    """Let arguments that differ between train and eval ask for the mode. False if the graphs differ otherwise."""
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    twin = {b: a for a, b in pairs}
    changes = []
    if len(graph.nodes) != len(other.nodes):
        return False
    for a, b in pairs:
        if (a.op, a.target) == (b.op, b.target) and _same(a.args, b.args, twin) and _same(a.kwargs, b.kwargs, twin):
            continue
        mine, spec = pytree.tree_flatten((list(a.args), dict(a.kwargs)))
        theirs, other_spec = pytree.tree_flatten((list(b.args), dict(b.kwargs)))
        theirs = [twin.get(v, v) if isinstance(v, fx.Node) else v for v in theirs]
        if (a.op, a.target, spec) != (b.op, b.target, other_spec):
            return False
        differ = [i for i, (v, w) in enumerate(zip(mine, theirs, strict=True)) if type(v) is not type(w) or v != w]
        if any(not isinstance(mine[i], (bool, _Flag)) for i in differ):
            return False
        if differ:
            changes.append((a, mine, spec, differ))
    for node, values, spec, differ in changes:
        with graph.inserting_before(node):
            flag = graph.call_module(TRAINING)
        args, kwargs = pytree.tree_unflatten([flag if i in differ else v for i, v in enumerate(values)], spec)
        node.args, node.kwargs = tuple(args), kwargs
    return True
