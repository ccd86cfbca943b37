"""An fx interpreter that runs a graph on the parts of a module, as the code that fx generates would."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxprune.recurrent import run_module


class Runner(fx.Interpreter):
    """Runs a graph node by node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Run `graph` on what it refers to in `root`."""
        super().__init__(nn.Module(), garbage_collect_values=False, graph=graph)  # pyright: ignore[reportArgumentType]
        self.module = root  # pyright: ignore[reportAttributeAccessIssue] (not above: it would list all modules in it)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module, or what stands in for it."""
        return run_module(self.fetch_attr(target), args, kwargs)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Look up arguments; functions may write to lists among them, which those of a graph do not allow."""
        return self._value(args)

    def _value(self, arg: Any) -> Any:
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
