"""Which nodes of a graph some of its outputs need: what they are computed from, and what writes to that.

A node that writes in place to memory that is read later, or to a parameter or buffer that is read at all (in the next
call, if not in this one), is needed whoever uses what it returns. Checks stay where what they look at does. Statistics
that a batch norm gathers in train mode are no reason to stay: one that several tasks call sees what is left of its
calls.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import node as fx_node

from fxprune.aliasing import hands_on, written
from fxprune.cloning import named_part, named_state, submodule
from fxprune.expecting import Expect, Expected
from fxprune.switching import SWITCHES

Memory = frozenset[Any]
"""What a node may share memory with: nodes that allocate, and numbers of storages of parameters and buffers."""

_SIZES = {"size", "dim", "numel", "sym_size", "sym_numel"}
_OF_SEVERAL = {torch.meshgrid, torch.broadcast_tensors}
"""Functions that return views of several inputs."""
_CONTEXTS = (fx_node._side_effectful_functions | SWITCHES) - {operator.setitem}
"""Functions that check something or switch something on or off."""


class Living:
    """Answers, for one graph, what some of its nodes need."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Look up which nodes may share memory.

        Args:
            root: the module that the graph runs on.
            graph: the graph.
        """
        self._root = root
        self._nodes = list(graph.nodes)
        self._place = {n: i for i, n in enumerate(self._nodes)}
        self._memory: dict[fx.Node, Memory] = {}
        for n in self._nodes:
            self._memory[n] = self._memory_of(n)
        self._writers = [(n, self._of(written(n, root))) for n in self._nodes if written(n, root)]
        self._checks = [n for n in self._nodes if self._is_check(n)]

    def needed(self, ends: Iterable[fx.Node]) -> set[fx.Node]:
        """Return these nodes and all that they need; inputs of the network are always among them."""
        ends = list(ends)
        found = {n for n in self._nodes if n.op == "placeholder"}
        fresh: list[fx.Node] = ends
        while fresh:
            self._add(found, fresh)
            last = self._last_reads(found, ends)
            fresh = [n for n, memory in self._writers if n not in found and self._is_read(n, memory, last)]
            fresh += [n for n in self._checks if n not in found and self._looks_at(n, found)]
        return found

    def _add(self, found: set[fx.Node], nodes: Iterable[fx.Node]) -> None:
        stack = list(nodes)
        while stack:
            n = stack.pop()
            if n not in found:
                found.add(n)
                stack += n.all_input_nodes

    def _last_reads(self, found: set[fx.Node], ends: Iterable[fx.Node]) -> dict[Any, int]:
        """Return where in the graph each memory is read last: at its end, if it is returned."""
        last = dict.fromkeys(self._of(ends), len(self._nodes))
        for n in found:
            for memory in self._of(n.all_input_nodes) | self._state(n):
                last[memory] = max(last.get(memory, -1), self._place[n])
        return last

    def _is_read(self, writer: fx.Node, memory: Memory, last: dict[Any, int]) -> bool:
        place = self._place[writer]
        return any(last.get(m, -1) > (-1 if isinstance(m, int) else place) for m in memory)

    def _of(self, nodes: Iterable[fx.Node]) -> Memory:
        return frozenset().union(*(self._memory[n] for n in nodes))

    def _memory_of(self, n: fx.Node) -> Memory:
        """Return what a node may share memory with: the first input, or any where that cannot be told."""
        if n.op == "get_attr":
            return self._state(n)
        sources: Iterable[fx.Node] = ()
        if n.op in ("call_module", "call_function", "call_method") and n.all_input_nodes:
            if self._is_whole(n):
                sources = n.all_input_nodes
            elif hands_on(n, self._root):
                sources = written(n, self._root) or n.all_input_nodes[:1]
        return self._of(sources) | {n}

    def _is_whole(self, n: fx.Node) -> bool:
        """Say whether a node calls Python that is not looked into, or makes a container of what goes in."""
        if n.op == "call_module":
            home = type(submodule(self._root, str(n.target))).__module__
            return not home.startswith(("torch.nn.", "fxprune."))
        own = isinstance(n.target, (FunctionType, type)) and not n.target.__module__.startswith("torch.")
        return n.op == "call_function" and (own or n.target in _OF_SEVERAL)

    def _state(self, n: fx.Node) -> Memory:
        """Return the storages of the parameters and buffers that a node names, or of the module that it calls."""
        if n.op not in ("get_attr", "call_module"):
            return frozenset()
        found = named_part(self._root, str(n.target))
        return frozenset(t.untyped_storage()._cdata for t in _tensors(found))

    def _is_check(self, n: fx.Node) -> bool:
        if n.op == "call_module":
            return isinstance(submodule(self._root, str(n.target)), (Expect, Expected))
        return n.op == "call_function" and n.target in _CONTEXTS and not written(n, self._root)

    def _looks_at(self, check: fx.Node, found: set[fx.Node]) -> bool:
        """Say whether a check can be made of what is needed anyway: by way of sizes and arithmetic on them."""
        seen, stack = set(), list(check.all_input_nodes)
        while stack:
            n = stack.pop()
            if n in found or n in seen:
                continue
            if not _is_size(n) and not self._is_check(n):
                return False
            seen.add(n)
            stack += n.all_input_nodes
        return True


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, nn.Module):
        yield from (t for _, t, _ in named_state(found))


def _is_size(n: fx.Node) -> bool:
    """Say whether a node asks for a size, or computes with numbers and decisions."""
    if n.op == "call_method":
        return n.target in _SIZES
    if isinstance(n.target, torch._ops.OpOverload):
        return n.target.overloadpacket.__name__ in _SIZES
    return n.op == "call_function" and getattr(n.target, "__module__", "") in ("_operator", "builtins", "math")
