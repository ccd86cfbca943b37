"""Where a network switches gradients on and off: kept in its graph, and passed over where sensitivities are measured.

`torch.no_grad` and the like ask for the mode that they find, and set it again in the end. Both are nodes, so that the
graph leaves the mode as it was, whichever that is: `torch.inference_mode` is kept as what it does to gradients. Where a
slim network raises in between, its code puts the mode back, as `with` would have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxprune.patching import Patch
from fxprune.sources import user_line

if TYPE_CHECKING:
    from fxprune.sizing import SizedTracer

_SET, _ASK = torch._C._set_grad_enabled, torch.is_grad_enabled
SWITCHES = frozenset({_SET, _ASK})
"""Functions of a graph that set whether gradients are wanted, or ask for it."""


WITHOUT_INFERENCE: Patch = (torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))
"""Lets `torch.inference_mode` do what it does to gradients, and nothing else."""


Code = Callable[[list[str]], list[str]]
"""Rewrites the lines of forward."""


def safe_code(graph: fx.Graph, rewrite: Code | None) -> Code:
    """Return what rewrites the lines of a graph's code after `rewrite`: the mode is put back where they raise."""
    before: Code = rewrite or list
    switches = any(n.target is _SET for n in graph.nodes)
    return (lambda lines: _safe(before(lines))) if switches else before


def _safe(lines: list[str]) -> list[str]:
    inside = [f"    {line}\n" for line in "".join(lines).splitlines()]
    restore = ["except BaseException:\n", "    torch._C._set_grad_enabled(_mode)\n", "    raise\n"]
    return ["_mode = torch._C.is_grad_enabled()\n", "try:\n", *inside, *restore]


class GradMode(int):
    """Whether gradients are wanted: a truth for Python, and a node for the graph."""

    node: fx.Node


def recorded(tracer: SizedTracer) -> list[Patch]:
    """Return what lets a trace record these switches."""

    def ask() -> bool | GradMode:
        if not tracer.recording:
            return _ASK()
        mode = GradMode(_ASK())
        mode.node = tracer.create_node("call_function", _ASK, (), {})
        tracer.spare.append(mode.node)
        return mode

    def switch(mode: Any) -> None:
        if tracer.recording:
            tracer.create_proxy("call_function", _SET, (mode,), {})
        _SET(int(mode) != 0)

    return [
        (torch, "is_grad_enabled", ask),
        (torch._C, "_set_grad_enabled", switch),
        WITHOUT_INFERENCE,
    ]


def left_out(tracer: SizedTracer) -> list[Patch]:
    """Return what lets a trace pass over `torch.autocast`, which no graph holds, and note where it is set."""
    kind = torch.amp.autocast_mode.autocast

    def instead_of(name: str) -> Any:
        plain = getattr(kind, name)

        def method(context: Any, *args: Any, **kwargs: Any) -> Any:
            if not tracer.recording:
                return plain(context, *args, **kwargs)
            if name == "__enter__":
                tracer.autocasts.append(user_line())
            return None

        return method

    return [(kind, name, instead_of(name)) for name in ("__init__", "__enter__", "__exit__")]


class Flowing(TorchFunctionMode):
    """Lets gradients flow through what a network does without: what a layer is worth is no matter of its training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, unless it is a switch."""
        return None if func is _SET else func(*args, **(kwargs or {}))
