"""Autograd functions of the user's: kept whole in a graph, so that their backward stays what it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from fxprune.patching import Patch
from fxprune.sources import user_line

if TYPE_CHECKING:
    from fxprune.sizing import SizedTracer

_PLAIN = (fx.Proxy, torch.Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)


@functools.cache
def applied(kind: type[Function]) -> Callable[..., Any]:
    """Return a function that applies an autograd function: what a graph calls."""

    def apply(*args: Any) -> Any:
        return kind.apply(*args)

    apply.__name__, apply.__qualname__, apply.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    vars(apply)["applies"] = kind
    return apply


def recorded(tracer: SizedTracer) -> list[Patch]:
    """Return what lets a trace record the autograd functions that are applied, each as one node.

    Those that are given modules or functions, as for checkpoints, are walked through, and lose their backward.
    """
    return [(kind, "forward", staticmethod(_recording(tracer, kind))) for kind in _kinds(Function)]


def _kinds(base: type[Function]) -> Iterator[type[Function]]:
    """Yield the classes derived from one that are no part of torch."""
    for kind in base.__subclasses__():
        if not kind.__module__.startswith("torch."):
            yield kind
        yield from _kinds(kind)


def _recording(tracer: SizedTracer, kind: type[Function]) -> Callable[..., Any]:
    """Return a forward that records a call with symbolic values; it is given a context, if there is no other place."""
    plain = kind.forward
    given = int(kind.setup_context is Function.setup_context)

    def forward(*args: Any) -> Any:
        inputs = args[given:]
        leaves = pytree.tree_leaves(inputs)
        if not tracer.recording or not any(isinstance(v, fx.Proxy) for v in leaves):
            return plain(*args)
        if all(isinstance(v, _PLAIN) for v in leaves):
            return tracer.create_proxy("call_function", applied(kind), inputs, {})
        tracer.walked.append(user_line())
        return plain(*args)

    return forward
