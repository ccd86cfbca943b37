"""Run a network over and over with a few weights changed: only from the first node on that reads any of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune.cloning import named_part, named_state
from fxprune.running import Runner
from fxprune.tasks import evaluating, inputs_of
from fxprune.values import bind

Env = dict[fx.Node, Any]


class Replayer(nn.Module):
    """Runs parts of a network's graph, in eval mode, with weights changed."""

    def __init__(self, module: fx.GraphModule) -> None:
        """Look up which node is the first to read each weight."""
        super().__init__()
        self.module = module
        self.nodes = list(module.graph.nodes)
        self._runner = _Caller(module, module.graph)
        place = {n: i for i, n in enumerate(self.nodes)}
        self._expires: list[list[fx.Node]] = [[] for _ in self.nodes]
        for n in self.nodes[:-1]:
            self._expires[max(map(place.__getitem__, n.users), default=place[n])].append(n)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._ids = {name: id(tensor) for name, tensor in named}
        self._first: dict[int, int] = {}
        for n in self.nodes:
            readers = n.users if n.op == "get_attr" else [n]
            for tensor in _read_by(module, n):
                at = min(map(place.__getitem__, readers), default=len(self.nodes))
                self._first[id(tensor)] = min(at, self._first.get(id(tensor), at))

    def first_reader(self, names: Iterable[str]) -> int:
        """Return the place of the first node that reads any of the parameters and buffers `names`."""
        places = (self._first.get(self._ids.get(name, 0), 0) for name in names)
        return min(places, default=len(self.nodes) - 1)

    def run(self, values: Mapping[str, torch.Tensor], env: Env, start: int, end: int) -> None:
        """Run the nodes from `start` until before `end`, on and into what is known in `env`; forget what is not read.

        Args:
            values: parameters and buffers that are changed: name -> value.
            env: node -> value of placeholders and of what has run before, but for attributes of the module.
            start: place of the first node.
            end: place after the last.
        """
        changed = {f"module.{name}": value for name, value in values.items()}
        with evaluating(self.module), torch.no_grad():
            functional_call(self, changed, (env, start, end), tie_weights=True)

    def forward(self, env: Env, start: int, end: int) -> None:
        """Run nodes, as `run` does, on the weights as they are."""
        attributes = {n: self._runner.run_node(n) for n in self.nodes if n.op == "get_attr"}
        env.update(attributes)
        self._runner.env = env
        for i in range(start, end):
            node = self.nodes[i]
            if node.op not in ("get_attr", "placeholder"):
                env[node] = self._runner.run_node(node)
            for gone in self._expires[i]:
                env.pop(gone, None)
        for node in attributes:
            env.pop(node, None)


class Replay:
    """A network on one batch, run as far as no weight has changed."""

    def __init__(self, replayer: Replayer, batch: Any) -> None:
        """Begin before the first node; nothing is run yet."""
        self._replayer = replayer
        self._batch = batch
        self._begin()

    def _begin(self) -> None:
        args, kwargs = pytree.tree_map(_own, inputs_of(self._batch))
        graph = self._replayer.module.graph
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
        if first < self._at:
            self._begin()
        replayer.run({}, self._known, self._at, first)
        self._at = first
        env = dict(zip(self._known, copy.deepcopy(list(self._known.values())), strict=True))
        replayer.run(values, env, first, end)
        (found,) = env.values()
        return replayer.module.graph.process_outputs(found)


class _Caller(Runner):
    """Calls every module itself: there are data."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fetch_attr(target)(*args, **kwargs)


def _read_by(module: nn.Module, node: fx.Node) -> list[torch.Tensor]:
    """Return the parameters and buffers that a node reads."""
    if node.op not in ("call_module", "get_attr"):
        return []
    found = named_part(module, str(node.target))
    if isinstance(found, nn.Module):
        return [tensor for _, tensor, _ in named_state(found)]
    return [found] if isinstance(found, torch.Tensor) else []


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
