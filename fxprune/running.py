"""An fx interpreter that runs a graph on the parts of a module, as the code that fx generates would."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxprune.calling import call_of_torch_function
from fxprune.cloning import clone, named_part, named_state
from fxprune.expecting import Expected
from fxprune.meta import OnMeta, meta_tensor
from fxprune.recurrent import run_module
from fxprune.telling import told

VALUES = ("placeholder", "get_attr", "output")
"""Nodes that hand on a value: no op runs there."""


class Runner(fx.Interpreter):
    """Runs a graph node by node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Run `graph` on what it refers to in `root`."""
        super().__init__(nn.Module(), garbage_collect_values=False, graph=graph)  # pyright: ignore[reportArgumentType]
        self.module = root  # pyright: ignore[reportAttributeAccessIssue] (not above: it would list all modules in it)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the values of `env`, without the notes for tracebacks that torch takes at each."""
        return getattr(self, n.op)(n.target, self._value(n.args), self._value(n.kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module, or what stands in for it; what only checks sizes has checked them when it was traced."""
        module = self.fetch_attr(target)
        return None if isinstance(module, Expected) else run_module(module, args, kwargs)

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
