"""What networks side by side can share: dims whose channels can be told apart, and what each node does with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.aliasing import origin, written
from fxprune.cloning import named_part, named_state
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.labels import Labels
from fxprune.parting import is_map, joined, moved, of_part, part_of_module, run_node, state_labels
from fxprune.running import Runner
from fxprune.tasks import evaluating
from fxprune.traced import TRAINING, Traced
from fxprune.values import bind, tensors_in

COMMON, WHOLE, PART, MAP = "common", "whole", "part", "map"
"""What a node is: computed once for all networks; by each network as a whole; channel by channel, for each part on its
own; or a layer that reads channels and makes others."""

DIFFERS = "differs from network to network, or may once they are trained"
"""Why what is read of a network is its own."""


@dataclass(frozen=True, slots=True)
class Splits:
    """What can be told apart in networks of one topology.

    Attributes:
        networks: one per task.
        coupling: of the first; that of the others is the same.
        free: (channels,) which can be shared.
        kinds: node -> `COMMON`, `WHOLE`, `PART` or `MAP`.
        dims: node -> the dim of its value along which channels are told apart, and the channel of each position.
        held: node -> why the channels that it reads or makes are each network's own.
    """

    networks: tuple[Traced, ...]
    coupling: Coupling
    free: np.ndarray
    kinds: Mapping[str, str]
    dims: Mapping[str, tuple[int, np.ndarray]]
    held: Mapping[str, str]


def find_splits(networks: Sequence[Traced], coupling: Coupling) -> Splits:
    """Find which channels of networks of one topology can be shared: of all nodes they reach, each can work on a part.

    Whether a node can is what it does: run on half of the channels of two networks side by side, on random values, it
    must return that half of what it returns on all.
    """
    free = ~coupling.is_frozen & ~coupling.entangled & coupling.has_site
    common = _common(networks, coupling, free)
    trial = _Trial(networks, coupling, common)
    held = {rows.node: "makes rows of channels that are balanced" for rows in coupling.rows}
    while True:
        found = trial.first_obstacle(free)
        if found is None:
            held |= dict.fromkeys(_first_apart(networks, coupling, trial), DIFFERS)
            return Splits(tuple(networks), coupling, free, trial.kinds, trial.dims, held)
        node, reason, channels = found
        held.setdefault(node, reason)
        free = free.copy()
        free[channels] = False


def _common(networks: Sequence[Traced], coupling: Coupling, free: np.ndarray) -> set[str]:
    """Return the nodes that depend on the inputs, and on what is the same in all networks, alone."""
    graph, root = networks[0].graph, networks[0].root
    others = {n.name for n in graph.nodes if n.op != "get_attr"}
    origins = [origin(a, root, others) for n in graph.nodes for a in written(n, root)]
    changed = {a.target for a in origins if a is not None}
    found: set[str] = set()
    for n in graph.nodes:
        if n.op == "output" or n.target in changed or any(source.name not in found for source in n.all_input_nodes):
            continue
        if n.op in ("get_attr", "call_module") and not _is_same(n, networks, coupling, free):
            continue
        found.add(n.name)
    return found


def _is_same(n: fx.Node, networks: Sequence[Traced], coupling: Coupling, free: np.ndarray) -> bool:
    """Say whether what a node reads of the networks is nothing, or the same in all, and has no channels to share."""
    if n.target == TRAINING:
        return False
    states = [_state_at(n, traced) for traced in networks]
    has_channels = any(_has_some(t.labels, free) for t in coupling.at(n.name))
    return not states[0] or (not has_channels and all(_are_equal(values) for values in zip(*states, strict=True)))


def _state_at(n: fx.Node, traced: Traced) -> list[Any]:
    """Return what a node reads of a network: the value, or the parameters and buffers of the module."""
    part = named_part(traced.root, str(n.target))
    return [part] if n.op == "get_attr" else [t for _, t, _ in named_state(part)]


def _has_some(labels: Labels, free: np.ndarray) -> bool:
    return any(ids is not None and free[ids[ids >= 0]].any() for ids in labels)


def _are_equal(values: Sequence[Any]) -> bool:
    """Say whether values are tensors that are equal, and not trained."""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not v.requires_grad]
    return len(tensors) == len(values) and all(torch.equal(tensors[0], t) for t in tensors[1:])


def _first_apart(networks: Sequence[Traced], coupling: Coupling, trial: _Trial) -> Iterator[str]:
    """Yield the nodes at which networks come apart before there are channels, so that no layer behind shares any."""
    for n in networks[0].graph.nodes:
        if trial.kinds.get(n.name) != MAP or n.name not in trial.dims:
            continue
        before, seen = list(n.all_input_nodes), set()
        while before:
            a = before.pop()
            if trial.kinds[a.name] != COMMON and a not in seen:
                seen.add(a)
                before += a.all_input_nodes
        made = [t.labels for a in seen if a.op != "get_attr" for t in coupling.at(a.name)]
        if not any(ids is not None for labels in made for ids in labels):
            yield from (a.name for a in seen if all(trial.kinds[b.name] == COMMON for b in a.all_input_nodes))


class _Trial:
    """Tries every node on a part of its channels."""

    def __init__(self, networks: Sequence[Traced], coupling: Coupling, common: set[str]) -> None:
        self._roots = [networks[0].root, networks[1].root]
        self._traced, self._coupling, self._common = networks[0], coupling, common
        self._generator = torch.Generator().manual_seed(0)
        half = torch.rand(2, coupling.num_channels, generator=self._generator) < 0.6
        self._half = half.numpy()
        self._env = _values(networks[0], common)
        self.kinds: dict[str, str] = {}
        self.dims: dict[str, tuple[int, np.ndarray]] = {}
        self._numbers: dict[str, tuple[Any, Any]] = {}
        self._ids: dict[str, np.ndarray] = {}

    def first_obstacle(self, free: np.ndarray) -> tuple[str, str, np.ndarray] | None:
        """Return the first node that cannot work on a part, why, and the channels that are each network's own then."""
        self.kinds, self.dims, self._numbers, self._ids = {}, {}, {}, {}
        for n in self._traced.graph.nodes:
            if n.op == "output":
                continue
            reason = self._visit(n, free)
            if reason is not None:
                named = [n.name, *(source.name for source in n.all_input_nodes if source.name not in self._common)]
                labels = [ids for name in named for t in self._coupling.at(name) for ids in t.labels if ids is not None]
                labels += [ids for name in named for ids in self._behind(name)]
                channels = np.unique(np.concatenate([ids.ravel() for ids in labels]))
                return n.name, reason, channels[channels >= 0]
        return None

    def _behind(self, name: str) -> list[np.ndarray]:
        """Return the channels of the tensors that a number was computed from."""
        if name not in self._numbers:
            return []
        node = next(n for n in self._traced.graph.nodes if n.name == name)
        found = [self.dims[source.name][1] for source in node.all_input_nodes if source.name in self.dims]
        return found + [ids for source in node.all_input_nodes for ids in self._behind(source.name)]

    def _visit(self, n: fx.Node, free: np.ndarray) -> str | None:
        """Say what a node is; None, or why it cannot be with these channels free."""
        tensors = self._coupling.at(n.name)
        open_dims = [
            [d for d, ids in enumerate(t.labels) if ids is not None and free[ids[ids >= 0]].any()] for t in tensors
        ]
        reads = [source.name for source in n.all_input_nodes if source.name in self.dims]
        numbers = [source.name for source in n.all_input_nodes if source.name in self._numbers]
        if n.name in self._common:
            self.kinds[n.name] = COMMON
            return None
        if not reads and not numbers and not any(open_dims):
            self.kinds[n.name] = WHOLE
            return None
        if any(open_dims):
            if len(tensors) > 1:
                return "returns several tensors"
            if len(open_dims[0]) > 1:
                return "has channels along several dims"
            d = open_dims[0][0]
            ids = tensors[0].labels[d]
            if ids is None or ids.size != tensors[0].shape[d] or (ids < 0).any():
                return "has rows of different channels"
            self.dims[n.name] = (d, ids.ravel())
        if n.op == "get_attr":
            self.kinds[n.name] = PART
            self._ids[n.name] = self._chosen(self.dims[n.name][1])
            return None
        if n.op == "call_module" and is_map(named_part(self._roots[0], str(n.target))):
            return self._map(n)
        if not any(open_dims) and tensors:
            varying = [name for name in numbers if self._numbers[name][0] != self._numbers[name][1]]
            if reads or varying:
                return "mixes channels"
            self.kinds[n.name] = WHOLE
            return None
        return self._part(n, reads)

    def _map(self, n: fx.Node) -> str | None:
        """Check the dims of a layer that mixes channels."""
        self.kinds[n.name] = MAP
        module = named_part(self._roots[0], str(n.target))
        source = n.all_input_nodes[0]
        if len(n.all_input_nodes) != 1 or n.kwargs or len(n.args) != 1:
            return "is called with more than one input"
        (shape, rows, columns) = self._map_labels(n)
        for name, mine, size in ((n.name, rows, shape[0]), (source.name, columns, shape[1])):
            d, ids = self.dims.get(name, (None, None))
            t = self._coupling.at(name)[0]
            at = len(t.shape) - 1 if isinstance(module, nn.Linear) else len(t.shape) - len(shape) + 1
            if ids is not None and (d != at or mine is None or not np.array_equal(mine.ravel(), ids)):
                return "has a weight whose channels are not those of what it reads and makes"
            if t.shape[at] != size:
                return "has a weight whose sizes are not those of what it reads and makes"
        if n.name in self.dims:
            self._ids[n.name] = self._chosen(self.dims[n.name][1])
        return None

    def _map_labels(self, n: fx.Node) -> tuple[tuple[int, ...], Any, Any]:
        shape, labels = state_labels(self._coupling, self._traced, f"{n.target}.weight")
        turned = isinstance(named_part(self._roots[0], str(n.target)), nn.modules.conv._ConvTransposeNd)
        rows, columns = (labels[1], labels[0]) if turned else (labels[0], labels[1])
        sizes = (shape[1], shape[0]) if turned else shape[:2]
        return (*sizes, *shape[2:]), rows, columns

    def _part(self, n: fx.Node, reads: list[str]) -> str | None:
        """Check that a node does to a part of its channels what it does to all."""
        self.kinds[n.name] = PART
        for a in n.all_input_nodes:
            known = a.name in self._common or a.name in reads or a.name in self._numbers
            if not known and tensors_in(self._env[a.name]):
                return f"takes {a.name!r}, which each network has its own of, along"
        try:
            return self._compare(n, reads)
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            return f"does not run on a part of the channels ({type(error).__name__}: {said})"

    def _compare(self, n: fx.Node, reads: list[str]) -> str | None:
        """Run a node on a part of the channels of two networks, and compare with that part of what it does on all."""
        inputs = {name: self._random(name) for name in reads}
        known = {a.name: self._env[a.name] for a in n.all_input_nodes}
        whole, cut = ({**known, **{name: both[i] for name, both in self._numbers.items()}} for i in range(2))
        dense = [
            run_node(n, self._module(n, i), whole | {name: v[i].clone() for name, v in inputs.items()})
            for i in range(2)
        ]
        part = cut | {name: of_part(v, self.dims[name][0], self._ids[name]) for name, v in inputs.items()}
        if n.name not in self.dims:
            found = run_node(n, self._module(n, 0), part)
            if tensors_in(found):
                return "mixes channels"
            self._numbers[n.name] = (dense[0], found)
            return None
        dim, labels = self.dims[n.name]
        ids = moved(n, {name: (self._ids[name], self.dims[name][1]) for name in reads}, labels, 2)
        if isinstance(ids, str):
            return ids
        module = self._module(n, 0)
        if module is not None:
            module = part_of_module(self._coupling, self._traced, self._roots, str(n.target), ids, labels)
            if isinstance(module, str):
                return module
        found = run_node(n, module, part, (dim, len(ids)))
        if not isinstance(found, torch.Tensor):
            return "returns a container"
        expected = of_part(dense, dim, ids)
        if found.shape != expected.shape:
            return "holds a size that does not follow its channels"
        if not torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
            return "mixes channels"
        self._ids[n.name] = ids
        return None

    def _module(self, n: fx.Node, i: int) -> nn.Module | None:
        return named_part(self._roots[i], str(n.target)) if n.op == "call_module" else None

    def _chosen(self, channels: np.ndarray) -> np.ndarray:
        """Return the ids of about half of the channels of two networks, at least of one."""
        ids = joined(self._half[:, channels])
        return ids if len(ids) else np.arange(len(channels)) * 2

    def _random(self, name: str) -> list[torch.Tensor]:
        """Return random values for a node of two networks."""
        like = self._env[name]
        if not like.is_floating_point():
            return [like, like.roll(1, self.dims[name][0])]
        return [
            (0.5 + torch.rand(like.shape, generator=self._generator, dtype=torch.float64)).to(like) for _ in range(2)
        ]


def _values(traced: Traced, common: set[str]) -> dict[str, Any]:
    """Return the value of every node on the example inputs, in eval mode.

    Raises:
        PlanError: something of the network's own is written to what depends on the inputs alone.
    """
    runner = Runner(traced.root, traced.graph)
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in bind(traced.graph, traced.args, traced.kwargs)]
    found: dict[str, Any] = {}
    with torch.no_grad(), evaluating(traced.root):
        runner.args_iter = iter(args)
        for n in traced.graph.nodes:
            if n.op == "output":
                break
            inputs = [(a, t) for a in n.all_input_nodes if a.name in common for t in tensors_in(found[a.name])]
            versions = [t._version for _, t in inputs]
            value = runner.run_node(n)
            if n.op == "get_attr" and isinstance(value, torch.Tensor):
                value = value.clone()  # nodes may write to it
            found[n.name] = runner.env[n] = value
            for (a, t), version in zip(inputs, versions, strict=True):
                if t._version != version and n.name not in common:
                    raise PlanError(
                        f"node {n.name!r}{traced.where(n.name)} writes to {a.name!r}, which all networks read. Write "
                        "`x = x + y` in place of `x += y` there."
                    )
    return found
