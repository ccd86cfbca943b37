"""Run a network again with some parameters changed: only what depends on them, from activations that are remembered.

Candidates of a search differ from the network it is at in a few layers. What lies before these, or beside them, is the
same for all: it is computed once, and kept as far as memory allows. Nodes that write to their input write to a copy,
and who reads the input later reads what was written; where that cannot be told, the whole network runs every time.

What has gone is zero in the weights of a candidate. Once much has gone for good, a slim network runs in its place.
Where zeros still count, as in a layer norm over channels, every candidate is a slim network of its own, run in whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.building import build
from fxprune.cloning import all_named
from fxprune.coupling import Coupling
from fxprune.errors import RewriteError
from fxprune.running import Runner, ValuesRunner
from fxprune.slicing import Kept, kept_size, slice_tensor
from fxprune.tasks import evaluating, inputs_of, running_on
from fxprune.traced import copied
from fxprune.values import bind, clones, tensors_in
from fxprune.zeroing import zeros_suffice

logger = logging.getLogger(__name__)

OUTPUT = "output"
"""Name of the node that stands for what the network returns."""
NARROW = 0.8
"""The network that runs is made anew once at most this share of its multiply-accumulates is needed."""
Values = Mapping[str, torch.Tensor]


class Rerun:
    """A network on some batches, at some values of its parameters: all are of the dense shapes.

    Attributes:
        kept: which channels the network that runs has; None for all.
        work: multiply-accumulates of these runs, as a multiple of those of one run of the whole dense network.
        sharing: whether runs are in part at all.
    """

    def __init__(
        self, coupling: Coupling, batches: Iterable[Any], changes: Iterable[Iterable[str]], *, max_bytes: int = 2 << 30
    ) -> None:
        """Remember what the runs that are to come start from.

        Args:
            coupling: of the network; it is not changed.
            batches: what it runs on.
            changes: parameters and buffers that will change together, for every kind of run.
            max_bytes: activations may take so much memory; batches for which there is none are run in whole.
        """
        self.batches = list(batches)
        self.work = 0.0
        self._coupling = coupling
        self._changes = [frozenset(names) for names in changes]
        self._max_bytes = max_bytes
        self._narrows = True
        self._values: dict[str, torch.Tensor] = {}
        self._cut: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._widen()

    def _load(self, root: nn.Module, original: fx.Graph, *, in_part: bool = True) -> None:
        """Run this network from now on, at its own values, in part or always in whole."""
        self._root, self._names = root, _aliases(self._coupling, root)
        self._macs = _macs(self._coupling, self.kept)
        self._values, self._cut = {}, {}
        graph, plain = copied(original), None
        if in_part and self.batches:
            with self._quiet(), running_on(self.batches[0]):
                plain = _without_writes(root, graph, self._inputs(graph, self.batches[0]))
        self.sharing, self._writes = plain is not None, plain or {}
        self._graph = graph if self.sharing else copied(original)
        self._runner = _Rerunner(root, self._graph)
        self._nodes = list(self._graph.nodes)
        self._reads = {n.name: self._used(n) for n in self._nodes}
        self._plans: dict[Any, list[tuple[fx.Node, list[fx.Node]]]] = {}
        self._starts = self._frontier(self._changes)
        self._known: list[dict[str, Any]] = [{} for _ in self.batches]
        room = self._max_bytes
        for i in range(len(self.batches) if self.sharing else 0):
            found = self._run(i, {}, self._starts)
            room -= sum(t.numel() * t.element_size() for t in tensors_in(found))
            if room < 0:
                break
            self._known[i] = found

    def commit(self, values: Values, keep: np.ndarray | None = None) -> None:
        """Go over to other values of parameters and buffers.

        Args:
            values: all that differ from those of the network.
            keep: (channels,) which channels may still be needed: the others are zero from now on, and once they are
                many, they do not run any more. All without it.
        """
        if self.batches and self.zeros_do:
            self._narrow(np.ones(self._coupling.num_channels, dtype=bool) if keep is None else keep)
        for i, known in enumerate(self._known):
            if known:
                self._known[i] = known | self._run(i, values, self._starts)
        self._values = dict(values)

    def _narrow(self, keep: np.ndarray) -> None:
        """Go over to a network that has no more than the channels that may be needed, if it is much smaller."""
        costs = self._coupling.costs
        if (keep & ~self.keep).any():
            self._widen()
        if self._narrows and costs(keep).macs <= NARROW * costs(self.keep).macs:
            self._narrows = self._slim(keep)

    def _widen(self) -> None:
        """Go over to the whole network."""
        self.kept: Kept | None = None
        self._load(self._coupling.traced.root, self._coupling.traced.graph)

    def _slim(self, keep: np.ndarray, *, in_part: bool = True) -> bool:
        """Go over to the network of the channels `keep`; say whether it could be made."""
        try:
            slim = build(self._coupling, keep)
        except RewriteError as error:
            logger.info("candidates run at the dense network's width: %s", error)
            return False
        self.kept = Kept(np.append(keep, True))
        self._load(slim, slim.graph, in_part=in_part)
        return True

    def _alone(self, keep: np.ndarray | None) -> None:
        """Go over to the network of these channels and no others; to the whole one where it cannot be made."""
        if keep is None or keep.all() or not self._slim(keep, in_part=False):
            self._widen()

    @cached_property
    def zeros_do(self) -> bool:
        """Whether zeros in place of channels make the network without them."""
        return not self.batches or zeros_suffice(self._coupling, self.batches[0])

    @property
    def keep(self) -> np.ndarray:
        """(channels,) which channels the network that runs has."""
        return np.ones(self._coupling.num_channels, dtype=bool) if self.kept is None else self.kept.keep[:-1]

    def cut(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return what the network that runs has of a parameter or buffer."""
        if self.kept is None or name not in self._coupling.tensors:
            return value
        known = self._cut.get(name)
        if known is None or known[0] is not value:
            known = self._cut[name] = value, slice_tensor(value, self._coupling.tensors[name][1], self.kept)
        return known[1]

    def run(
        self, values: Values, wanted: Iterable[str] = (OUTPUT,), keep: np.ndarray | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield what nodes return, batch by batch.

        Args:
            values: all parameters and buffers that differ from those of the network. Those that are the same object as
                what was committed have not changed.
            wanted: names of nodes; `OUTPUT` for what the network returns.
            keep: (channels,) which channels the values leave; the others are zero. All without it.
        """
        if (keep is not None or self.kept is not None) and not self.zeros_do:
            self._alone(keep)
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
        with self._quiet(), running_on(self.batches[i]):
            runner = self._runner
            runner.start({name: self.cut(name, value) for name, value in values.items()})
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
            runner.start({})
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

    def _used(self, n: fx.Node) -> set[str]:
        if n.op not in ("call_module", "get_attr"):
            return set()
        names = [*(name for name, _, _ in self._coupling.traced.state), *self._names]
        target = str(n.target)
        return {self._names.get(name, name) for name in names if name == target or name.startswith(f"{target}.")}

    def _inputs(self, graph: fx.Graph, batch: Any) -> list[Any]:
        args, kwargs = inputs_of(batch)
        return bind(graph, args, kwargs)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with evaluating(self._root), torch.no_grad():
            yield


class _Rerunner(ValuesRunner):
    """Runs nodes by themselves."""

    def run_apart(self, n: fx.Node, written: Container[str]) -> Any:
        """Run a node; what it writes to is copied before."""
        saved = {source: self.env[source] for source in n.all_input_nodes if source.name in written}
        self.env.update({source: clones(value) for source, value in saved.items()})
        try:
            return self.run_node(n)
        finally:
            self.env.update(saved)


def _aliases(coupling: Coupling, root: nn.Module) -> dict[str, str]:
    """Return name -> the first name of the same tensor, for parameters and buffers of `root` with several."""
    named, first = dict(all_named(root)), dict[int, str]()
    every = [(name, named[name]) for name, _, _ in coupling.traced.state if name in named]
    every += named.items()
    for name, t in every:
        first.setdefault(id(t), name)
    return {name: first[id(t)] for name, t in every if first[id(t)] != name}


def _macs(coupling: Coupling, kept: Kept | None) -> dict[str, float]:
    """Return node -> what it takes with the channels `kept` (None: all), as a share of the dense network's macs."""
    found: dict[str, float] = {}
    dense = 0
    for w in coupling.record.work:
        sizes = [ids.shape[dim] for ids, dim in w.dims]
        here = sizes if kept is None else [kept_size(coupling.channels(ids), dim, kept.keep) for ids, dim in w.dims]
        found[w.node] = found.get(w.node, 0) + w.fixed * math.prod(here)
        dense += w.fixed * math.prod(sizes)
    return {name: macs / max(dense, 1) for name, macs in found.items()}


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
