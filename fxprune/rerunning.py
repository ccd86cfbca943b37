"""Run a network again with some parameters changed: only what depends on them, from activations that are remembered.

Candidates of a search differ from the network it is at in a few layers. What lies before these, or beside them, is the
same for all: it is computed once, and kept as far as memory allows. Nodes that write to their input write to a copy,
and who reads the input later reads what was written; where that cannot be told, the whole network runs every time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from fxprune.coupling import Coupling
from fxprune.running import Runner
from fxprune.tasks import evaluating, inputs_of
from fxprune.traced import copied
from fxprune.values import bind, clones, tensors_in

OUTPUT = "output"
"""Name of the node that stands for what the network returns."""
Values = Mapping[str, torch.Tensor]


class Rerun:
    """A network on some batches, at some values of its parameters.

    Attributes:
        runs: how often it ran on all batches, in part or in whole.
        work: multiply-accumulates of these runs, as a multiple of those of one run of the whole dense network.
        sharing: whether runs are in part at all.
    """

    def __init__(
        self, coupling: Coupling, batches: Iterable[Any], changes: Iterable[Container[str]], *, max_bytes: int = 2 << 30
    ) -> None:
        """Remember what the runs that are to come start from.

        Args:
            coupling: of the network; it is not changed.
            batches: what it runs on.
            changes: parameters and buffers that will change together, for every kind of run.
            max_bytes: activations may take so much memory; batches for which there is none are run in whole.
        """
        self.batches = list(batches)
        self.runs, self.work = 0, 0.0
        self._root = coupling.traced.root
        self._names = _aliases(coupling)
        self._macs = _macs(coupling)
        self._values: dict[str, torch.Tensor] = {}
        graph, self._writes = copied(coupling.traced.graph), dict[str, set[str]]()
        with self._quiet():
            plain = _without_writes(self._root, graph, self._inputs(graph, self.batches[0])) if self.batches else {}
        self.sharing = plain is not None
        if plain is not None:
            self._writes = plain
        self._graph = graph if self.sharing else copied(coupling.traced.graph)
        self._nodes = list(self._graph.nodes)
        self._reads = {n.name: self._used(n, coupling) for n in self._nodes}
        self._plans: dict[Any, list[tuple[fx.Node, list[fx.Node]]]] = {}
        self._starts = self._frontier(changes)
        self._known: list[dict[str, Any]] = [{} for _ in self.batches]
        room = max_bytes if self.sharing else 0
        for i in range(len(self.batches)):
            found = self._run(i, {}, self._starts)
            room -= sum(t.numel() * t.element_size() for t in tensors_in(found))
            if room < 0:
                break
            self._known[i] = found

    @property
    def remembered(self) -> float:
        """Which share of the batches starts from remembered activations."""
        return sum(map(bool, self._known)) / max(len(self.batches), 1) if self._starts else 1.0

    def commit(self, values: Values) -> None:
        """Go over to other values of parameters and buffers: all that differ from those of the network."""
        for i, known in enumerate(self._known):
            if known:
                self._known[i] = known | self._run(i, values, self._starts)
        self._values = dict(values)

    def run(self, values: Values, wanted: Iterable[str] = (OUTPUT,)) -> Iterator[dict[str, Any]]:
        """Yield what nodes return, batch by batch.

        Args:
            values: all parameters and buffers that differ from those of the network. Those that are the same object as
                what was committed have not changed.
            wanted: names of nodes; `OUTPUT` for what the network returns.
        """
        self.runs += 1
        for i in range(len(self.batches)):
            yield self._run(i, values, tuple(wanted), count=True)

    def one(self, i: int, values: Values, wanted: Iterable[str]) -> dict[str, Any]:
        """Return what nodes return for one batch, as `run`; it does not count as one."""
        return self._run(i, values, tuple(wanted))

    def _run(self, i: int, values: Values, wanted: Sequence[str], *, count: bool = False) -> dict[str, Any]:
        known = self._known[i]
        changed = {
            name for name in values.keys() | self._values.keys() if values.get(name) is not self._values.get(name)
        }
        key = frozenset(self._names.get(name, name) for name in changed), tuple(wanted), bool(known)
        if key not in self._plans:
            self._plans[key] = self._plan(key[0], wanted, known)
        found: dict[str, Any] = {}
        with self._quiet():
            runner = _Rerunner(self._root, self._graph, values, self._names)
            given = self._inputs(self._graph, self.batches[i])
            places = [n.name for n in self._nodes if n.op == "placeholder"]
            inputs = dict(zip(places, given if self.sharing else clones(given), strict=True))
            for n, done in self._plans[key]:
                for source in n.all_input_nodes:
                    if source not in runner.env:
                        runner.env[source] = known[source.name]
                if n.op == "placeholder":
                    runner.env[n] = inputs[n.name]
                else:
                    runner.env[n] = runner.run_apart(n, self._writes.get(n.name, ()))
                if n.name in wanted:
                    value = runner.env[n]
                    value = self._graph.process_outputs(value) if n.op == "output" else value
                    found[n.name] = value if self.sharing else clones(value)
                for last in done:
                    runner.env.pop(last, None)
        if count:
            self.work += sum(self._macs.get(n.name, 0.0) for n, _ in self._plans[key]) / len(self.batches)
        return found | {name: known[name] for name in wanted if name not in found and name in known}

    def _plan(
        self, changed: Container[str], wanted: Sequence[str], known: Container[str]
    ) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Return the nodes to run, in order, each with those whose values are not needed any more."""
        dirty = self._dirty(changed)
        needed: set[fx.Node] = set()
        stack = [n for n in self._nodes if n.name in wanted]
        while stack:
            n = stack.pop()
            if n in needed or (n not in dirty and n.name in known):
                continue
            needed.add(n)
            stack += n.all_input_nodes
        nodes = [n for n in self._nodes if n in needed or not self.sharing]  # what writes may return nothing
        last = {source: n for n in nodes for source in [n, *n.all_input_nodes]}
        return [(n, [source for source in [n, *n.all_input_nodes] if last[source] is n]) for n in nodes]

    def _dirty(self, changed: Container[str]) -> set[fx.Node]:
        dirty: set[fx.Node] = set()
        for n in self._nodes:
            if any(name in changed for name in self._reads[n.name]) or any(s in dirty for s in n.all_input_nodes):
                dirty.add(n)
        return dirty

    def _frontier(self, changes: Iterable[Container[str]]) -> tuple[str, ...]:
        """Return the nodes that are not changed themselves, and are read by what is, for any kind of change."""
        found: set[str] = set()
        for names in changes:
            dirty = self._dirty({self._names.get(name, name) for name in names})  # pyright: ignore
            found |= {s.name for n in dirty for s in n.all_input_nodes if s not in dirty and s.op != "placeholder"}
        return tuple(n.name for n in self._nodes if n.name in found)

    def _used(self, n: fx.Node, coupling: Coupling) -> set[str]:
        if n.op not in ("call_module", "get_attr"):
            return set()
        names = [*(name for name, _, _ in coupling.traced.state), *self._names]
        target = str(n.target)
        return {self._names.get(name, name) for name in names if name == target or name.startswith(f"{target}.")}

    def _inputs(self, graph: fx.Graph, batch: Any) -> list[Any]:
        args, kwargs = inputs_of(batch)
        return bind(graph, args, kwargs)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with evaluating(self._root), torch.inference_mode(False), torch.no_grad():
            yield


class _Rerunner(Runner):
    """Runs nodes with other values of parameters and buffers."""

    def __init__(self, root: nn.Module, graph: fx.Graph, values: Values, names: Mapping[str, str]) -> None:
        super().__init__(root, graph)
        self._values = {names.get(name, name): value for name, value in values.items()}
        self._names = names

    def run_apart(self, n: fx.Node, written: Container[str]) -> Any:
        """Run a node; what it writes to is copied before."""
        saved = {source: self.env[source] for source in n.all_input_nodes if source.name in written}
        self.env.update({source: clones(value) for source, value in saved.items()})
        try:
            return self.run_node(n)
        finally:
            self.env.update(saved)

    def fetch_attr(self, target: str) -> Any:
        """Return what a node refers to."""
        name = self._names.get(target, target)
        return self._values[name] if name in self._values else super().fetch_attr(target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a module, on other values where it has some."""
        module, prefix = self.fetch_attr(target), f"{target}."
        names = [name for name in self._known(module, prefix) if self._names.get(name, name) in self._values]
        if not names:
            return super().call_module(target, args, kwargs)
        values = {name.removeprefix(prefix): self._values[self._names.get(name, name)] for name in names}
        return functional_call(module, values, args, kwargs, tie_weights=True)

    def _known(self, module: nn.Module, prefix: str) -> list[str]:
        return [prefix + name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _aliases(coupling: Coupling) -> dict[str, str]:
    """Return name -> the first name of the same tensor, for parameters and buffers with several."""
    first: dict[int, str] = {}
    state = [(name, t) for name, t, _ in coupling.traced.state]
    every = [*state, *coupling.traced.root.named_parameters(remove_duplicate=False)]
    for name, t in every:
        first.setdefault(id(t), name)
    return {name: first[id(t)] for name, t in every if first[id(t)] != name}


def _macs(coupling: Coupling) -> dict[str, float]:
    """Return node -> which share of the dense network's multiply-accumulates it takes."""
    found: dict[str, float] = {}
    for w in coupling.record.work:
        found[w.node] = found.get(w.node, 0) + w.fixed * math.prod(ids.shape[dim] for ids, dim in w.dims)
    total = max(sum(found.values()), 1)
    return {name: macs / total for name, macs in found.items()}


def _without_writes(root: nn.Module, graph: fx.Graph, inputs: list[Any]) -> dict[str, set[str]] | None:
    """Let every node read what it would if nothing were written in place; see which nodes write, by running them.

    Returns:
        Node -> inputs of it that it writes to, which are to be copied before; None where a node writes to a part of
        what is read later.
    """
    runner = Runner(root, graph)
    runner.args_iter = iter(clones(inputs))
    nodes, writes = list(graph.nodes), list[tuple[fx.Node, set[fx.Node]]]()
    for n in nodes:
        before = {s: [t._version for t in tensors_in(runner.env[s])] for s in n.all_input_nodes}
        runner.env[n] = runner.run_node(n)
        written = {s for s in n.all_input_nodes if before[s] != [t._version for t in tensors_in(runner.env[s])]}
        if written:
            writes.append((n, written))
    place = {n: i for i, n in enumerate(nodes)}
    homes = {n: [t.untyped_storage().data_ptr() for t in tensors_in(runner.env[n])] for n in nodes}
    for n, written in writes:
        hit = {home for s in written for home in homes[s]}
        result = runner.env[n]
        for member in nodes[: place[n]]:
            if hit.isdisjoint(homes[member]):
                continue
            later = [r for r in member.users if place[r] > place[n]]
            if later and not _same_place(result, runner.env[member]):
                return None
            for r in later:
                r.replace_input_with(member, n)
    return {n.name: {s.name for s in written} for n, written in writes}


def _same_place(a: Any, b: Any) -> bool:
    """Say whether two tensors are the same memory, seen in the same way."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
