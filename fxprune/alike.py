"""Networks of one topology: compared node by node, and told where they first differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize

from fxprune.cloning import named_part
from fxprune.errors import PlanError
from fxprune.traced import Traced


def check_alike(networks: Mapping[str, Traced]) -> None:
    """Check that networks do the same, node by node, with parameters of the same shapes.

    Raises:
        PlanError: two of them differ; the message names the first node at which they do.
    """
    (first, traced), *others = networks.items()
    for name, other in others:
        found = _difference(traced, other)
        if found is not None:
            node, what = found
            raise PlanError(
                f"{first!r} and {name!r} are not of one topology: at node {node!r}{other.where(node)} {what}. "
                "Networks that are merged must be built by the same code, with the same sizes."
            )


def _difference(a: Traced, b: Traced) -> tuple[str, str] | None:
    """Return the node of `b` at which two networks first differ, and in what; None where they do not."""
    twin: dict[fx.Node, fx.Node] = {}
    ours, theirs = list(a.graph.nodes), list(b.graph.nodes)
    for n, m in zip(ours, theirs, strict=False):
        if n.op != m.op or (n.op != "call_module" and n.op != "get_attr" and not _same(n.target, m.target)):
            return m.name, f"one has {_said(n)}, the other {_said(m)}"
        args, kwargs = map_arg((m.args, m.kwargs), twin.get)
        if not _same((n.args, n.kwargs), (args, kwargs)):
            return m.name, f"the arguments are {n.args} {dict(n.kwargs)} in one, {m.args} {dict(m.kwargs)} in the other"
        if n.op in ("call_module", "get_attr"):
            what = _other_part(named_part(a.root, str(n.target)), named_part(b.root, str(m.target)))
            if n.target != m.target or what:
                return m.name, what or f"one uses {n.target!r}, the other {m.target!r}"
        twin[m] = n
    if len(ours) != len(theirs):
        return theirs[min(len(ours), len(theirs)) - 1].name, f"one ends after {len(ours)} nodes, the other goes on"
    return None


def _said(n: fx.Node) -> str:
    return f"{n.op} {n.target if isinstance(n.target, str) else getattr(n.target, '__name__', n.target)}"


def _same(a: Any, b: Any) -> bool:
    """Say whether two arguments are the same, containers and slices looked into."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return a is b or bool(a == b)


def _other_part(a: Any, b: Any) -> str:
    """Say in what two modules or tensors differ besides their values; "" where they do not."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if (a.shape, a.dtype) == (b.shape, b.dtype) else f"one is {_sized(a)}, the other {_sized(b)}"
    if not (isinstance(a, nn.Module) and isinstance(b, nn.Module)):
        return "" if type(a) is type(b) else f"one is a {type(a).__name__}, the other a {type(b).__name__}"
    if _kind(a) != _kind(b):
        return f"one is a {type(a).__name__}, the other a {type(b).__name__}"
    if repr(a) != repr(b):
        return f"one is {a}, the other {b}"
    mine, yours = ({name: _sized(t) for name, t in m.state_dict().items()} for m in (a, b))
    name = next((name for name in {**mine, **yours} if mine.get(name) != yours.get(name)), None)
    return "" if name is None else f"{name!r} is {mine.get(name)} in one, {yours.get(name)} in the other"


def _kind(module: nn.Module) -> Any:
    """Return the class of a module; of one that `torch.nn.utils.parametrize` has made, the class it was made of."""
    return type(module).__bases__ if parametrize.is_parametrized(module) else type(module)


def _sized(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
