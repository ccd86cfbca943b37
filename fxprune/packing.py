"""Graphs as plain data, to be pickled: torch would write their code and trace it again, which not all code allows."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg

from fxprune.applying import applied


@dataclass(frozen=True, slots=True)
class _Ref:
    """Stands for a node in the arguments of others."""

    node: str


@dataclass(frozen=True, slots=True)
class _Named:
    """Stands for a function by its full name; torch has some that do not know where they are."""

    name: str


@dataclass(frozen=True, slots=True)
class _Applied:
    """Stands for the function that applies an autograd function."""

    kind: type[Any]


Packed = tuple[list[tuple[Any, ...]], CodeGen | None]
"""Op, target, name, args, kwargs and annotation of every node; and what writes the code of forward, if special."""


def pack(graph: fx.Graph) -> Packed:
    """Return what a graph is made of."""
    nodes = []
    for n in graph.nodes:
        args, kwargs = map_arg((n.args, dict(n.kwargs)), _reference)
        target = _packed(n.target) if n.op == "call_function" else n.target
        nodes.append((n.op, target, n.name, args, kwargs, n.type))
    return nodes, None if type(graph._codegen) is CodeGen else graph._codegen


def unpack(packed: Packed) -> fx.Graph:
    """Return the graph that was packed."""
    nodes, codegen = packed
    graph, known = fx.Graph(), dict[str, fx.Node]()
    if codegen is not None:
        graph.set_codegen(codegen)
    for op, target, name, args, kwargs, annotation in nodes:
        args, kwargs = map_aggregate((args, kwargs), lambda a: known[a.node] if isinstance(a, _Ref) else a)
        known[name] = graph.create_node(op, _unpacked(target), args, kwargs, name, annotation)
    return graph


def _reference(node: fx.Node) -> Any:
    return _Ref(node.name)


def _packed(target: Callable[..., Any]) -> Any:
    kind = getattr(target, "applies", None)
    if kind is not None and target is applied(kind):
        return _Applied(kind)
    name = _get_qualified_name(target)
    name = name if "." in name else f"builtins.{name}"
    return _Named(name) if _found(name) is target else target


def _unpacked(target: Any) -> Any:
    if isinstance(target, _Applied):
        return applied(target.kind)
    return pkgutil.resolve_name(target.name) if isinstance(target, _Named) else target


def _found(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError):
        return None
