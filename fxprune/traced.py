"""A network as a graph, whichever front end traced it."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _copy_attr
from torch.fx.node import map_arg

from fxprune.cloning import State, aliased_state, named_part, named_state
from fxprune.latencies import LatencyModel
from fxprune.sources import short_line

TRAINING = "fxprune_training"
"""Name of the submodule that answers whether the network is in training mode."""


class TrainingFlag(nn.Module):
    """Returns whether it is in training mode: stands for `self.training` in a traced graph."""

    def forward(self) -> bool:
        """Return `self.training`."""
        return self.training


Shares = str | tuple[tuple[tuple[str, ...], float], ...]
"""Over which combinations of tasks costs are counted: "mean", "max", or pairs of tasks and share."""


@dataclass(frozen=True)
class Traced:
    """A network as a graph. Made by `trace`.

    Attributes:
        model: the model it was traced from.
        root: a module of the model's structure that shares its parameters and buffers; the graph runs on it.
        graph: the fx graph.
        args: positional example inputs.
        kwargs: keyword example inputs.
        frontend: "symbolic_trace" or "export".
        one_path: forward takes another path in train() than in eval(); the graph is that of the model's mode.
        notes: what a user should know about this trace.
        sources: node -> file and line of the user's code.
        state: (name, tensor, is a parameter) of everything that takes part in forward.
        latency_model: what predicts how long it takes; None without one.
        combinations: over which combinations of its tasks costs are counted besides; None for none.
    """

    model: nn.Module = field(repr=False)
    root: nn.Module = field(repr=False)
    graph: fx.Graph = field(repr=False)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frontend: str
    one_path: bool = False
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    state: tuple[State, ...] = field(default=(), repr=False)
    latency_model: LatencyModel | None = field(default=None, repr=False)
    combinations: Shares | None = field(default=None, repr=False)

    @cached_property
    def module(self) -> fx.GraphModule:
        """A module that computes what the model computes and shares its parameters and buffers."""
        return fx.GraphModule(self.root, copy.deepcopy(self.graph), type(self.model).__name__)

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that takes part in forward."""
        return {name: tensor for name, tensor, _ in self.state}

    def source(self, node: str) -> str:
        """Return the user's source line of a node: `file.py:12: code`, in a notebook `In[3]:12: code`, or ""."""
        place = self.sources.get(node, "")
        path, _, line = place.rpartition(":")
        return f"{short_line(place)}: {linecache.getline(path, int(line)).strip()}" if path else ""

    def where(self, node: str) -> str:
        """Return the source line in brackets, ready to follow a node's name."""
        line = self.source(node)
        return f" ({line})" if line else ""


def taking_part(root: nn.Module, graph: fx.Graph) -> tuple[tuple[State, ...], list[str]]:
    """Return everything that a graph uses of a module, and the names of parameters that it does not use.

    A shared tensor has that of its names by which a `GraphModule` lists it: the first in the order of the graph.
    """
    targets = dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr"))
    used: dict[int, list[State]] = {}
    called = {"": False}

    def is_called(name: str) -> bool:
        if name not in called:
            called[name] = name in targets or is_called(name.rpartition(".")[0])
        return called[name]

    for item in aliased_state(root):
        if is_called(item[0].rpartition(".")[0]) or item[0] in targets:
            used.setdefault(id(item[1]), []).append(item)
    unused = [name for name, t, is_parameter in named_state(root) if is_parameter and id(t) not in used]
    order = _listed(root, targets) if any(len(items) > 1 for items in used.values()) else {}
    return tuple(min(items, key=lambda item: order.get(item[0], 0)) for items in used.values()), unused


def _listed(root: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    """Return the names of parameters and buffers -> their places in a `GraphModule` with these targets."""
    like = nn.Module()
    for target in targets:
        _copy_attr(root, like, target)
    return {name: i for i, (name, _, _) in enumerate(aliased_state(like))}


def used_state(root: nn.Module, graph: fx.Graph) -> tuple[State, ...]:
    """Return the parameters, buffers and constants that a graph uses, shared ones once, by the name it uses them by."""
    found: dict[int, State] = {}
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")):
        part = named_part(root, target)
        if isinstance(part, torch.Tensor):
            found.setdefault(id(part), (target, part, isinstance(part, nn.Parameter)))
        elif isinstance(part, nn.Module):
            for name, t, is_parameter in named_state(part):
                found.setdefault(id(t), (f"{target}.{name}", t, is_parameter))
    return tuple(found.values())


def left_out(unused: list[str]) -> list[str]:
    """Return a note on parameters that take no part in forward, if there are any."""
    shown = ", ".join(unused[:4]) + (", .." if len(unused) > 4 else "")
    return [f"{len(unused)} parameters take no part in forward and are left out: {shown}"] if unused else []


def attach(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a new node its arguments: `create_node` would search each for symbolic sizes, which are not met here."""
    if args:
        type(node).args.__set__(node, args)  # pyright: ignore[reportAttributeAccessIssue]
    if kwargs:
        type(node).kwargs.__set__(node, kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def copied(graph: fx.Graph) -> fx.Graph:
    """Copy a graph: `copy.deepcopy` without its detours."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    new.set_codegen(graph._codegen)
    twin: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        args, kwargs = map_arg((n.args, n.kwargs), twin.__getitem__)
        if n.op == "output":
            new.output(args[0])
            break
        node = twin[n] = new.create_node(n.op, n.target, name=n.name, type_expr=n.type)
        attach(node, args, kwargs)
        if n.meta:
            node.meta.update(n.meta)
    return new
