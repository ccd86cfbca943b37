"""Run a network over and over with a few weights changed: only from the first node on that reads any of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxprune.aliasing import written_state
from fxprune.running import ValuesRunner
from fxprune.tasks import evaluating, inputs_of
from fxprune.values import bind

Env = dict[fx.Node, Any]


class Replayer(ValuesRunner):
    """Runs parts of a network's graph with weights changed; those that are tied change together."""

    def __init__(self, module: fx.GraphModule) -> None:
        """Look up which nodes read each weight."""
        super().__init__(module, module.graph)
        self.whole = module.graph
        self.nodes = list(module.graph.nodes)
        self._first: dict[int, int] = {}
        self._written = written_state(module.graph, module)
        self._expires: list[list[fx.Node]] = [[] for _ in self.nodes]
        place = {n: i for i, n in enumerate(self.nodes)}
        for n in self.nodes[:-1]:
            self._expires[max(map(place.__getitem__, n.users), default=place[n])].append(n)
            if n.op not in ("call_module", "get_attr"):
                continue
            at = min(map(place.__getitem__, n.users if n.op == "get_attr" else [n]), default=len(self.nodes))
            for tensor in self.held(str(n.target)):
                self._first[tensor] = min(at, self._first.get(tensor, at))

    def first_reader(self, names: Iterable[str]) -> int:
        """Return the place of the first node that reads any of the parameters and buffers `names`.

        Buffers that the graph writes to change in every run.
        """
        changing = [*names, *self._written]
        return min((self._first.get(self.ids[name], 0) for name in changing), default=len(self.nodes) - 1)

    def run_part(self, values: Mapping[str, torch.Tensor], env: Env, start: int, end: int) -> None:
        """Run nodes on and into what is known; forget what is not read any more.

        Args:
            values: parameters and buffers that are changed: name -> value.
            env: node -> value of placeholders and of what has run before, but for attributes of the module.
            start: place of the first node.
            end: place after the last.
        """
        self.start(values)
        attributes = {n: self.run_node(n) for n in self.nodes if n.op == "get_attr"}
        env.update(attributes)
        self.env = env
        for i in range(start, end):
            node = self.nodes[i]
            if node.op not in ("get_attr", "placeholder"):
                env[node] = self.run_node(node)
            for gone in self._expires[i]:
                env.pop(gone, None)
        for node in attributes:
            env.pop(node, None)


class Replay:
    """A network on one batch, in eval mode, run as far as no weight has changed."""

    def __init__(self, replayer: Replayer, batch: Any) -> None:
        """Begin before the first node; nothing is run yet."""
        self._replayer = replayer
        self._batch = batch
        self._begin()

    def _begin(self) -> None:
        args, kwargs = pytree.tree_map(_own, inputs_of(self._batch))
        graph = self._replayer.whole
        holders = [n for n in self._replayer.nodes if n.op == "placeholder"]
        self._known: Env = dict(zip(holders, bind(graph, args, kwargs), strict=True))
        self._at = 0

    def outputs(self, values: Mapping[str, torch.Tensor]) -> Any:
        """Return what the network returns with some parameters and buffers changed: name -> value.

        What runs before the first of them is read is kept for the next call. It is copied: functions may write to what
        they are given.
        """
        replayer = self._replayer
        first, end = replayer.first_reader(values), len(replayer.nodes)
        with evaluating(replayer.module), torch.no_grad():
            if first < self._at:
                self._begin()
            if first > self._at:
                replayer.run_part({}, self._known, self._at, first)
                self._at = first
            env = dict(zip(self._known, copy.deepcopy(list(self._known.values())), strict=True))
            replayer.run_part(values, env, first, end)
        (found,) = env.values()
        return replayer.whole.process_outputs(found)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
