"""What a network returns, taken apart: the names of its outputs, and the part of it that some of them make."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxprune.errors import PlanError, TraceError
from fxprune.living import Living
from fxprune.traced import copied

Path = tuple[str, ...]


class _Gone:
    """Stands for a part of an output that was not asked for."""


GONE = _Gone()


def parts_of(value: Any) -> dict[str, Any] | None:
    """Return name -> part: keys of a dict, fields of a dataclass, positions of a tuple or list; None for a leaf.

    A node of a graph that makes a dataclass or a named tuple counts as one.
    """
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, fx.Node):
        return _fields(value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return {str(i): part for i, part in enumerate(value)}
    return None


def _fields(node: fx.Node) -> dict[str, Any] | None:
    """Return the parts of the dataclass or named tuple that a node makes; None where it makes none."""
    kind = node.target
    if node.op != "call_function" or not isinstance(kind, type):
        return None
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif hasattr(kind, "_fields"):
        names = [str(i) for i in range(len(node.args))]
    else:
        return None
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def returned(graph: fx.Graph) -> Any:
    """Return what a graph returns: containers of nodes.

    Raises:
        TraceError: the graph packs its outputs in a way of its own.
    """
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    codegen = graph._codegen
    if type(codegen) is CodeGen:
        return node.args[0]
    if type(codegen) is not _PyTreeCodeGen:
        raise TraceError(
            f"the graph packs its outputs by a {type(codegen).__name__}, which cannot be taken apart. Trace the "
            "network with `fxprune.trace(model, example_inputs)`."
        )
    spec = codegen.pytree_info.out_spec
    leaves = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
    return node.args[0] if spec is None else pytree.tree_unflatten(list(leaves), spec)


def set_returned(graph: fx.Graph, value: Any) -> None:
    """Let a graph return other containers of its nodes."""
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen) and codegen.pytree_info.out_spec is not None:
        leaves, spec = pytree.tree_flatten(value)
        graph.set_codegen(_PyTreeCodeGen(codegen.pytree_info._replace(out_spec=spec)))
        value = tuple(leaves)
    node.args = (value,)


def outputs_of(value: Any, path: Path = ()) -> list[Path]:
    """Return where the outputs are: one path for every leaf that is computed."""
    parts = parts_of(value)
    if parts is None:
        return [path] if isinstance(value, fx.Node) else []
    return [found for name, part in parts.items() for found in outputs_of(part, (*path, name))]


def tasks_of(value: Any) -> list[str]:
    """Return the names of the tasks of a network: the parts of the outermost container that has several."""
    path: Path = ()
    while True:
        parts = {name: part for name, part in (parts_of(value) or {}).items() if outputs_of(part)}
        if len(parts) != 1:
            return [named((*path, name)) for name in parts]
        ((name, value),) = parts.items()
        path = (*path, name)


def named(path: Path) -> str:
    """Return the name of an output or of a container of some: `aux.0` for the first of what is called `aux`."""
    return ".".join(path)


def checked_tasks(value: Any, tasks: Iterable[str | int]) -> tuple[str, ...]:
    """Return the names of tasks in the order of the network, each once.

    Args:
        value: what the network returns, containers of nodes.
        tasks: names of outputs, or of containers of some; positions of a tuple may be whole numbers.

    Raises:
        PlanError: no task, one that there is not, or a network with one output.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise PlanError(f"the tasks are {tasks!r}. Pass a list of names: `[{tasks!r}]`.")
    asked = [str(task) for task in tasks]
    paths = outputs_of(value)
    if len(paths) < 2:
        raise PlanError(
            "the network has one output only, so there is nothing to select. Tasks are told apart by the keys of a "
            "dict, the fields of a dataclass or the positions of a tuple that `forward` returns."
        )
    known = dict.fromkeys(named(path[: i + 1]) for path in paths for i in range(len(path)))
    there = ", ".join(repr(named(path)) for path in paths)
    if not asked:
        raise PlanError(f"no task was asked for. The outputs of the network are {there}.")
    unknown = [task for task in asked if task not in known]
    if unknown:
        raise PlanError(f"the network has no task {unknown[0]!r}. Its outputs are {there}.")
    return tuple(name for name in known if name in asked)


def selected(value: Any, tasks: Collection[str], graph: fx.Graph, path: Path = ()) -> Any:
    """Return the part of what a graph returns that some tasks make; `GONE` where nothing is left.

    Dicts lose the other keys. In tuples, lists and dataclasses, None takes the place of the others, so that every
    output keeps its name.

    Args:
        value: containers of nodes of the graph.
        tasks: names, as `checked_tasks` returns them.
        graph: is given a new node for every dataclass or named tuple that it makes.
        path: where `value` is.
    """
    if named(path) in tasks:
        return value
    parts = parts_of(value)
    left = {name: selected(part, tasks, graph, (*path, name)) for name, part in (parts or {}).items()}
    return GONE if all(part is GONE for part in left.values()) else _rebuilt(value, left, graph)


def _rebuilt(value: Any, left: Mapping[str, Any], graph: fx.Graph) -> Any:
    """Return a container like `value` of what is left of its parts."""
    filled = {name: None if part is GONE else part for name, part in left.items()}
    if isinstance(value, fx.Node):
        with graph.inserting_after(value):
            if dataclasses.is_dataclass(value.target):
                return graph.call_function(value.target, (), filled)  # pyright: ignore[reportArgumentType]
            return graph.call_function(value.target, tuple(filled.values()))  # pyright: ignore[reportArgumentType]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **filled)
    if isinstance(value, dict):
        kept = {key: left[str(key)] for key in value if left[str(key)] is not GONE}
        if type(value).__module__.startswith("torch.fx."):
            return kept
        new = copy.copy(value)
        new.clear()
        new.update(kept)
        return new
    if hasattr(value, "_fields"):
        return type(value)(*filled.values())
    return list(filled.values()) if isinstance(value, list) else tuple(filled.values())


def of_tasks(root: nn.Module, graph: fx.Graph, tasks: tuple[str, ...]) -> fx.Graph:
    """Return the graph of some tasks, named as `checked_tasks` does, with the nodes that they need; a new one."""
    graph = copied(graph)
    value = selected(returned(graph), tasks, graph)
    set_returned(graph, value)
    needed = Living(root, graph).needed(_nodes_in(value))
    for n in reversed(list(graph.nodes)):
        if n.op != "output" and n not in needed:
            graph.erase_node(n)
    return graph


def _nodes_in(value: Any) -> list[fx.Node]:
    """Return the nodes that are somewhere in a container, dataclasses included."""
    if isinstance(value, fx.Node):
        return [value]
    return [n for part in (parts_of(value) or {}).values() for n in _nodes_in(part)]
