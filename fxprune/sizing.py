"""Symbolic values that know their sizes while a graph is recorded: Python may branch and loop on sizes.

Where Python asks for the truth of a comparison of sizes, for a length or for a whole number, what that value is
computed from is run on tensors without data, on the example inputs. Everything else stays dynamic, and where another
input could give another answer, the graph checks it when it runs. The values of tensors are never known.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import operator
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.fx import proxy
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from fxprune import applying, switching
from fxprune.cloning import modules_in, named_state
from fxprune.expecting import NUMBERS, Expected
from fxprune.patching import Patch, patched
from fxprune.running import MetaRunner
from fxprune.sources import user_line

_FACTORIES = ("tensor", "arange", "linspace", "eye", "zeros", "ones", "full", "empty", "rand", "randn")
_LIMITS = ("finfo", "iinfo")
_STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_CONSTANTS = (torch.Tensor, torch.ScriptObject, pytree.TreeSpec)
_UNPACK = dis.opmap["UNPACK_SEQUENCE"]


class Symbol(fx.Proxy):
    """A symbolic value that knows its length, or its value where that is a number computed from sizes."""

    tracer: SizedTracer
    _glances: ClassVar[dict[tuple[int, int], list[_Check]]] = {}
    """Where whole numbers were asked for last, by frame and instruction, and the checks that were added."""

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call; its parser may have looked at numbers among the arguments, which decided nothing."""
        if Symbol._glances:
            frame = sys._getframe(1)
            for check in Symbol._glances.get((id(frame), frame.f_lasti), ()):
                check.take_back()
            Symbol._glances.clear()
        return super().__torch_function__(orig_method, types, args, kwargs)

    def __getattr__(self, k: str) -> Any:
        found = Attribute(self, k)
        return self.tracer.number(found) if k == "ndim" and _is_users(sys._getframe(1)) else found

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __iter__(self) -> Iterator[Any]:
        """Return as many items as the caller unpacks, which its code says, or as there are."""
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if code[at] == _UNPACK and (at < 2 or code[at - 2] != dis.EXTENDED_ARG):
            items = range(code[at + 1])
            return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in items])
        return self.tracer.iter(self)

    def __len__(self) -> int:
        return self.tracer.count(self)

    def __index__(self) -> int:
        value = self.tracer.number(self).__index__()
        frame = sys._getframe(1)
        here = id(frame), frame.f_lasti
        Symbol._glances = {here: [*Symbol._glances.get(here, ()), *self.tracer.latest]}
        return value

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})


class Attribute(proxy.Attribute, Symbol):
    """An attribute of a symbolic value, such as its shape, or a method of it."""

    def __getattr__(self, k: str) -> Attribute:
        return Attribute(self, k)


class Stored(Symbol):
    """A parameter or buffer that forward has found in a list of them. Its dtype and device are what they were."""

    def __init__(self, node: fx.Node, tracer: SizedTracer, value: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.dtype, self.device, self.requires_grad = value.dtype, value.device, value.requires_grad

    def is_floating_point(self) -> bool:
        """Say whether its dtype is a floating one."""
        return self.dtype.is_floating_point


def _is_users(frame: FrameType) -> bool:
    """Say whether a frame runs code that is no part of torch or fxprune, or `torch.jit.isinstance`, called by such."""
    home = frame.f_globals.get("__name__", "")
    return home == "torch._jit_internal" or not home.startswith(("torch.", "fxprune."))


@dataclass(frozen=True, slots=True)
class _Check:
    """A check in the graph that a size is what it was."""

    key: Any
    node: fx.Node
    added: dict[str, nn.Module]
    asked: set[Any]

    def take_back(self) -> None:
        """Remove it."""
        self.node.graph.erase_node(self.node)
        del self.added[str(self.node.target)]
        self.asked.discard(self.key)


class SizedTracer(fx.Tracer):
    """A symbolic tracer whose values know their sizes.

    Attributes:
        inputs: the arguments of forward by name, on the meta device.
        device: where they really are.
        positional: how many of them the examples give by position.
        named: those that the examples give by name.
        recording: modules that are called are recorded; not so while sizes are looked up.
        added: modules of the tracer's own by name; they join the root afterwards, which forward may iterate over.
        spare: nodes that are left out again if nothing reads them.
        latest: the check that the last answer has added, if any.
        autocasts: lines of the user's code that set `torch.autocast`, which no graph holds.
        walked: lines of the user's code that apply an autograd function whose backward the graph does not hold.
    """

    proxy_buffer_attributes = True
    _module: nn.Module

    def __init__(
        self, inputs: Mapping[str, Any], device: torch.device, positional: int, named: Collection[str]
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.device = device
        self.positional = positional
        self.named = named
        self.recording = True
        self.added: dict[str, nn.Module] = {}
        self.autocasts: list[str] = []
        self.walked: list[str] = []
        self.spare: list[fx.Node] = []
        self._sizes: _Sizes | None = None
        self._names: dict[int, tuple[str, torch.Tensor]] | None = None
        self._stored: dict[str, Stored] = {}
        self.latest: list[_Check] = []
        self._asked: set[Any] = set()
        self._count = 0
        self._looked_up = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node in a value that knows its sizes."""
        return Symbol(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return what stands for a parameter or buffer, or itself while sizes are looked up."""
        if not self.recording or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._name_of(attr_val)
        if not name:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _name_of(self, tensor: torch.Tensor) -> str:
        """Return the name of a parameter or buffer; empty for any other tensor."""
        if self._names is None:
            self._names = {id(t): (name, t) for name, t, _ in named_state(self.root)}
        name, known = self._names.get(id(tensor), ("", None))
        return name if known is tensor else ""

    def _listed(self) -> Patch:
        """Return what lets forward list parameters and buffers as symbolic values."""
        plain = nn.Module._named_members

        def named_members(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            for key, value in plain(module, *args, **kwargs):
                name = self._name_of(value) if self.recording else ""
                if name and name not in self._stored:
                    node = self.create_node("get_attr", name, (), {})
                    self.spare.append(node)
                    self._stored[name] = Stored(node, self, value)
                yield key, self._stored[name] if name else value

        return nn.Module, "_named_members", named_members

    def count(self, obj: fx.Proxy) -> int:
        """Return how many items the example inputs give a tuple, a list or a tensor."""
        value = self._value(obj)
        if not isinstance(value, (tuple, list, dict, torch.Tensor)):
            raise TypeError(f"node {obj.node.name!r} is counted, and is a {type(value).__name__}")
        return len(value) if isinstance(value, torch.Size) else self._expect(obj, len(value))

    def number(self, obj: fx.Proxy) -> Any:
        """Return the number that the example inputs give a value computed from sizes."""
        value = self._value(obj)
        if not isinstance(value, NUMBERS):
            raise TraceError(f"Python asks for the value of node {obj.node.name!r}, which depends on the data")
        return self._expect(obj, value)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth that the example inputs give a value computed from sizes."""
        value = self._value(obj)
        if isinstance(value, torch.Tensor):
            raise TraceError(f"Python asks for the truth of node {obj.node.name!r}, which depends on the data")
        return self._expect(obj, bool(value))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a value whose number of items the example inputs tell."""
        items = range(self.count(obj))
        return iter([self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in items])

    def keys(self, obj: fx.Proxy) -> Any:
        """Return the keys of a dict."""
        value = self._value(obj)
        return list(value) if isinstance(value, dict) else super().keys(obj)

    def _is_instance(self) -> Patch:
        """Return what tells code of the user's that a symbolic value is of the type that the example inputs give it."""
        plain = builtins.isinstance

        def isinstance(obj: Any, kind: Any) -> bool:
            found = plain(obj, kind)
            if found or not plain(obj, Symbol):
                return found
            if not self.recording or not _is_users(sys._getframe(1)):
                return False
            try:
                return plain(self._value(obj), kind)
            except Exception:  # its value depends on the data
                return False

        return builtins, "isinstance", isinstance

    def _value(self, obj: fx.Proxy) -> Any:
        if self._sizes is None:
            self._sizes = _Sizes(self)
        with self._looking_up():
            return self._sizes.of(obj.node)

    @contextmanager
    def _looking_up(self) -> Iterator[None]:
        was, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = was

    def _expect(self, obj: fx.Proxy, value: Any) -> Any:
        """Let the graph check that it is so, once."""
        key = (obj.node, type(value), value)
        self.latest = []
        if key not in self._asked:
            self._count += 1
            while f"fxprune_expected_{self._count}" in self.root._modules:  # of an earlier trace
                self._count += 1
            target = f"fxprune_expected_{self._count}"
            self.added[target] = Expected(value, user_line())
            node = self.create_node("call_module", target, (obj.node,), {})
            self._asked.add(key)
            self.latest.append(_Check(key, node, self.added, self._asked))
        return value

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module; what makes tensors out of sizes is recorded too, and what tells the limits of a dtype."""
        _LazyGraphModule.force_recompile(root)
        self._module = root
        makers = [(torch, name, _recorded(getattr(torch, name))) for name in (*_FACTORIES, *_LIMITS)]
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),  # which forward may leave switched
            patched(
                [
                    *makers,
                    self._listed(),
                    self._is_instance(),
                    *applying.recorded(self),
                    *switching.recorded(self),
                    *switching.left_out(self),
                ]
            ),
        ):
            graph = super().trace(type(root).forward, concrete_args)  # of a module, torch would visit all that is in it
        for node in reversed(self.spare):
            if not node.users:
                graph.erase_node(node)
        for name, module in self.added.items():
            root.add_module(name, module)
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return what calls forward as the examples do; no more arguments. Symbols are in the order of its signature.

        The module is the one that is traced, in place of an empty one that torch has made.
        """
        self.root = self._module
        plain = inspect.unwrap(root_fn)  # a decorator hides the names
        signature = inspect.signature(plain)
        given: list[Any] = [self.root]
        named: dict[str, Any] = {}
        for i, p in enumerate([*signature.parameters.values()][1:]):
            value = self._proxy_placeholder(_STARS.get(p.kind, "") + p.name, concrete_args, signature, plain)
            if p.kind is p.VAR_POSITIONAL:
                given += value
            elif p.kind is p.VAR_KEYWORD:
                named |= value
            elif i < self.positional and p.kind is not p.KEYWORD_ONLY:
                given.append(value)
            elif p.name in self.named:
                named[p.name] = value

        @functools.wraps(plain)
        def call() -> Any:
            return root_fn(*given, **named)

        return call, []

    def create_arg(self, a: Any) -> Any:
        """Know by its name a tensor that is a plain attribute of a module; these are looked up where one is met."""
        if isinstance(a, switching.GradMode):
            return a.node
        if isinstance(a, torch.Tensor) and (name := self._name_of(a)):
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, _CONSTANTS) and not self._looked_up:
            self._looked_up = True
            for path, module in modules_in(self.root):
                for key, value in vars(module).items():
                    if isinstance(value, _CONSTANTS):
                        self.tensor_attrs.setdefault(value, f"{path}.{key}" if path else key)
        with self._looking_up() if isinstance(a, _CONSTANTS) else nullcontext():  # torch lists all buffers
            return super().create_arg(a)


@functools.cache
def _recorded(function: Any) -> Any:
    """Return a function that is recorded where symbolic values are among its arguments."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        symbol = next((a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, fx.Proxy)), None)
        if symbol is None:
            return function(*args, **kwargs)
        return symbol.tracer.create_proxy("call_function", function, args, kwargs)

    return record


class _Sizes(MetaRunner):
    """Runs what a trace has recorded so far, as far as it is asked for."""

    def __init__(self, tracer: SizedTracer) -> None:
        super().__init__(tracer.root, tracer.graph)
        self._added, self._inputs, self._device = tracer.added, tracer.inputs, tracer.device

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node."""
        stack = [node]
        while stack:
            n = stack[-1]
            missing = [m for m in n.all_input_nodes if m not in self.env]
            stack += missing
            if not missing:
                stack.pop()
                if n not in self.env:
                    self.env[n] = self.run_on_meta(n)
        return self.env[node]

    def fetch_attr(self, target: str) -> Any:
        """Return what a node refers to on the meta device, in eval mode."""
        if target in self._added:
            return self._added[target]
        found = super().fetch_attr(target)
        return found.eval() if isinstance(found, nn.Module) else found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function; a tensor's device is the real one."""
        if target is getattr and args[1] == "device":
            return self._device
        return super().call_function(target, args, kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an example input."""
        return self._inputs[str(target).lstrip("*")]
