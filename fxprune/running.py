"""An fx interpreter that runs a graph on the parts of a module, as the code that fx generates would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.calling import call_of_torch_function
from fxprune.cloning import all_named, clone, named_part, named_state
from fxprune.expecting import Expected
from fxprune.meta import OnMeta, meta_tensor
from fxprune.recurrent import run_module
from fxprune.switching import SWITCHES
from fxprune.telling import told
from fxprune.values import Bound

VALUES = ("placeholder", "get_attr", "output")
"""Nodes that hand on a value: no op runs there."""
FILLED = {"full": 1, "full_like": 1, "new_full": 2}
"""Plain name of a target that fills a tensor with one value -> which argument is the value."""


class Runner(Bound):
    """Runs a graph node by node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Run `graph` on what it refers to in `root`."""
        super().__init__(nn.Module(), garbage_collect_values=False, graph=graph)  # pyright: ignore[reportArgumentType]
        self.module = root  # pyright: ignore[reportAttributeAccessIssue] (not above: it would list all modules in it)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the values of `env`, without the notes for tracebacks that torch takes at each."""
        return getattr(self, n.op)(n.target, self._value(n.args), self._value(n.kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, unless it switches gradients, which no run of ours node by node is for."""
        return False if target in SWITCHES else super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module; what only checks sizes has checked them when it was traced."""
        module = self.fetch_attr(target)
        return None if isinstance(module, Expected) else self.run_module(module, args, kwargs)

    def run_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module."""
        return module(*args, **kwargs)

    def _value(self, arg: Any) -> Any:
        """Look up arguments; functions may write to lists among them, which those of a graph do not allow."""
        if isinstance(arg, fx.Node):
            return self.env[arg]
        if isinstance(arg, list):
            return [self._value(a) for a in arg]
        if type(arg) is tuple:
            return tuple([self._value(a) for a in arg])
        if isinstance(arg, dict):
            return {key: self._value(a) for key, a in arg.items()}
        if isinstance(arg, slice):
            return slice(self._value(arg.start), self._value(arg.stop), self._value(arg.step))
        if isinstance(arg, tuple):  # a named one
            return type(arg)(*(self._value(a) for a in arg))
        return arg


class ValuesRunner(Runner):
    """Runs a graph on other values of parameters and buffers: on copies of modules, made once for the same values.

    Attributes:
        ids: name of a parameter or buffer -> id of the tensor; shared ones have several names.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Run `graph` on what it refers to in `root`, for a start on the values there."""
        super().__init__(root, graph)
        self.ids = {name: id(t) for name, t in all_named(root)}
        self._held: dict[str, list[int]] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._copies: dict[str, tuple[dict[int, torch.Tensor], Any]] = {}

    def start(self, values: Mapping[str, torch.Tensor]) -> None:
        """Forget what has run; run on these values from now on, by the names of parameters and buffers."""
        self.env = {}
        self._values = {self.ids[name]: value for name, value in values.items()}

    def held(self, target: str) -> list[int]:
        """Return the ids of the parameters and buffers that a node refers to by `target`."""
        if target not in self._held:
            part = named_part(self.module, target)
            tensors = [t for _, t, _ in named_state(part)] if isinstance(part, nn.Module) else [part]
            self._held[target] = [id(t) for t in tensors]
        return self._held[target]

    def fetch_attr(self, target: str) -> Any:
        """Return what a node refers to, with the values of this run."""
        part = super().fetch_attr(target)
        mine = {i: self._values[i] for i in self.held(target) if i in self._values}
        if not mine:
            return part
        if isinstance(part, torch.Tensor):
            return mine[id(part)]
        known = self._copies.get(target)
        if known is None or known[0].keys() != mine.keys() or any(known[0][i] is not t for i, t in mine.items()):
            known = self._copies[target] = mine, clone(part, mine)
        return known[1]


class MetaRunner(Runner):
    """Runs a graph on meta tensors, with meta copies of the parameters and buffers it uses."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Run `graph` on what it refers to in `root`, which must not change from then on."""
        super().__init__(root, graph)
        self._mode = OnMeta()
        self._twins: dict[int, torch.Tensor] = {}
        self._meta: dict[str, Any] = {}

    def run_on_meta(self, n: fx.Node) -> Any:
        """Run one node on the values of `env`, without gradients."""
        known = self._told(n)
        if known is not None:
            return known
        if n.op in ("get_attr", "call_module"):
            self.fetch_attr(str(n.target))  # outside of the mode, which would take part in making each twin
        if n.op in VALUES:
            return Runner.run_node(self, n)
        with torch.no_grad(), self._mode:
            return Runner.run_node(self, n)

    def _told(self, n: fx.Node) -> Any:
        """Return what a function or method that is one common ATen call returns; None where it has to be run."""
        if n.op not in ("call_function", "call_method"):
            return None
        function = getattr(torch.Tensor, str(n.target), None) if n.op == "call_method" else n.target
        call = call_of_torch_function(function, self._value(n.args), self._value(n.kwargs))
        out = None if call is None else told(*call, {})
        return out[0] if isinstance(out, tuple) else out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a function."""
        return super().call_function(target, *_with_a_number(getattr(target, "__name__", ""), args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a method."""
        return super().call_method(target, *_with_a_number(str(target), args, kwargs))

    def run_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module, or what stands in for it where tensors have no data."""
        return run_module(module, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        """Return what a node refers to, with its tensors on the meta device."""
        if target not in self._meta:
            found = named_part(self.module, target)
            if isinstance(found, torch.Tensor):
                found = self._twin(found)
            elif isinstance(found, nn.Module):
                found = clone(found, {id(t): self._twin(t) for _, t, _ in named_state(found)})
            self._meta[target] = found
        return self._meta[target]

    def _twin(self, value: torch.Tensor) -> torch.Tensor:
        found = self._twins.get(id(value))
        if found is None:
            found = self._twins[id(value)] = meta_tensor(value)
        return found


def _with_a_number(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call; what a tensor is filled with has no value on the meta device, and any will do.

    Integers may be positions, which matter.
    """
    at = FILLED.get(name, len(args))
    value = args[at] if at < len(args) else kwargs.get("fill_value")
    if name not in FILLED or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return args, kwargs
    if at < len(args):
        return (*args[:at], 0.0, *args[at + 1 :]), kwargs
    return args, {**kwargs, "fill_value": 0.0}
