"""The graph of several networks in one: a shared part of every layer, and a part of each task's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.assigning import SHARED, Sharing
from fxprune.cloning import Cloner, clone, named_part
from fxprune.errors import RewriteError
from fxprune.outputs import returned, set_returned
from fxprune.parting import joined, moved, of_part, part_of_module, side_by_side, sized_args, state_labels
from fxprune.slicing import copied_like
from fxprune.slimming import SlimModule, only_used
from fxprune.splitting import COMMON, MAP, PART, Splits
from fxprune.traced import used_state
from fxprune.unmet import drop_unmet


@dataclass(frozen=True, slots=True)
class Value:
    """What a node of one network is in a part: a node, and the ids of its channels; None where it has none."""

    node: fx.Node
    ids: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Wired:
    """A layer of the merged network: its name, that in the networks, and the ids of what it makes and reads.

    `columns` is None where it reads what all networks read, or works channel by channel.
    """

    name: str
    layer: str
    rows: np.ndarray
    columns: np.ndarray | None


class Wiring:
    """Builds the graph, node by node of the networks."""

    def __init__(self, splits: Splits, tasks: tuple[str, ...], sharing: Sharing) -> None:
        """Merge.

        Args:
            splits: what can be shared.
            tasks: names, one per network.
            sharing: who has what; what cannot be shared is each task's own.
        """
        self.splits, self.sharing = splits, sharing
        self.names = ("shared", *tasks)
        self.wired: list[Wired] = []
        self._count = len(tasks)
        self._first = splits.networks[0]
        self._graph = fx.Graph(tracer_cls=self._first.graph._tracer_cls)
        self._graph.set_codegen(self._first.graph._codegen)
        self._holder = nn.Module()
        self._holder.training = self._first.root.training
        self._cloners = [_cloner(t.root, t.graph) for t in splits.networks]
        self._common: dict[str, fx.Node] = {}
        self._values: dict[str, dict[int, Value]] = {}
        self._modules: dict[tuple[Any, ...], str] = {}

    def build(self) -> SlimModule:
        """Return the merged network."""
        for n in self._first.graph.nodes:
            if n.op == "output":
                self._output()
            elif self.splits.kinds[n.name] == COMMON:
                self._common[n.name] = self._copy(n, "common", 0, {a: self._common[a.name] for a in n.all_input_nodes})
            else:
                self._values[n.name] = self._visit(n)
        for n in reversed(list(self._graph.nodes)):
            if n.op == "get_attr" and not n.users:
                self._graph.erase_node(n)
        self._graph.lint()
        merged = SlimModule(only_used(self._holder, self._graph, Cloner(self._holder, None)), self._graph, "Merged")
        drop_unmet(merged, self._first)
        return merged

    def _visit(self, n: fx.Node) -> dict[int, Value]:
        kind = self.splits.kinds[n.name]
        if kind == MAP:
            return self._map(n)
        if kind == PART:
            made = {part: self._part(n, part) for part in range(self._count + 1)}
            return {part: value for part, value in made.items() if value is not None}
        return {t + 1: Value(self._copy(n, self.names[t + 1], t, self._arguments(n, t + 1)), None)
                for t in range(self._count)}  # fmt: skip

    def _arguments(self, n: fx.Node, part: int) -> dict[fx.Node, Any]:
        """Return what a node's inputs are in a part: a number is the same in the shared part."""
        found = {}
        for a in n.all_input_nodes:
            if a.name in self._common:
                found[a] = self._common[a.name]
                continue
            values = self._values[a.name]
            value = values.get(part)
            if value is None and self._is_number(a):
                value = next(iter(values.values()))
            if value is not None:
                found[a] = value.node
        return found

    def _is_number(self, n: fx.Node) -> bool:
        return not self.splits.coupling.at(n.name)

    def _copy(self, n: fx.Node, home: str, network: int, inputs: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Copy a node of one network as it is, with what it calls."""
        target: Any = n.target
        if n.op in ("call_module", "get_attr"):
            root = self.splits.networks[network].root
            key = (home, str(n.target))
            if key not in self._modules:
                found = named_part(root, str(n.target))
                cloner = self._cloners[network]
                new = cloner.clone(found) if isinstance(found, nn.Module) else found
                new = cloner.tensor(found) if isinstance(found, torch.Tensor) else new
                self._modules[key] = _put(self._holder, f"{home}.{n.target}", new)
            target = self._modules[key]
        args, kwargs = map_arg((n.args, dict(n.kwargs)), inputs.__getitem__) if n.op != "placeholder" else (n.args, {})
        name = n.name if home == "common" else f"{n.name}_{home}"
        return self._graph.create_node(n.op, target, args, kwargs, name, n.type)

    def _part(self, n: fx.Node, part: int) -> Value | None:
        """Make a node's part: None where nothing of it is there."""
        home, inputs = self.names[part], self._arguments(n, part)
        if n.name not in self.splits.dims:
            missing = any(a not in inputs for a in n.all_input_nodes)
            return None if missing else Value(self._copy(n, home, max(part - 1, 0), inputs), None)
        dim, labels = self.splits.dims[n.name]
        if n.op == "get_attr":
            return self._state(n, part, dim, joined(self.sharing.parts[:, labels] == part))
        sources = {
            a.name: (value.ids, self.splits.dims[a.name][1])
            for a in n.all_input_nodes
            if a.name in self._values and (value := self._values[a.name].get(part)) is not None
            and value.ids is not None
        }  # fmt: skip
        if not sources:
            return None
        whole = {a: np.array([], dtype=np.int64) for a in n.all_input_nodes if a.name in self.splits.dims}
        sources = {a.name: sources.get(a.name, (ids, self.splits.dims[a.name][1])) for a, ids in whole.items()}
        ids = moved(n, sources, labels, self._count)
        if isinstance(ids, str):
            raise RewriteError(f"node {n.name!r} {ids}, in the part of {home!r}.")
        target: Any = n.target
        if n.op == "call_module":
            target = self._part_module(str(n.target), part, ids, labels)
        args = sized_args(n, dim, len(ids))
        args, kwargs = map_arg(_there((args, dict(n.kwargs)), inputs), inputs.__getitem__)
        return Value(self._graph.create_node(n.op, target, args, kwargs, f"{n.name}_{home}", n.type), ids)

    def _part_module(self, name: str, part: int, ids: np.ndarray, labels: np.ndarray) -> str:
        key = (part, name, ids.tobytes())
        if key not in self._modules:
            roots = [t.root for t in self.splits.networks]
            new = part_of_module(self.splits.coupling, self._first, roots, name, ids, labels, self.sharing.written)
            if isinstance(new, str):
                raise RewriteError(f"module {name!r} {new}.")
            self._modules[key] = _put(self._holder, f"{self.names[part]}.{name}", new)
            self.wired.append(Wired(self._modules[key], name, ids, None))
        return self._modules[key]

    def _state(self, n: fx.Node, part: int, dim: int, ids: np.ndarray) -> Value | None:
        if not len(ids):
            return None
        own = self.sharing.written.get(str(n.target))
        values = [named_part(t.root, str(n.target)) for t in self.splits.networks]
        index = torch.from_numpy(ids)
        new = of_part([v.detach() for v in values], dim, ids) if own is None else own.index_select(dim, index)
        new = copied_like(values[0], new.to(values[0]))
        target = _put(self._holder, f"{self.names[part]}.{n.target}", new)
        return Value(self._graph.create_node("get_attr", target, (), {}, f"{n.name}_{self.names[part]}"), ids)

    def _map(self, n: fx.Node) -> dict[int, Value]:
        """Make the parts of a layer: each reads what is shared and its own, the shared part what is shared."""
        source = n.all_input_nodes[0]
        found: dict[int, Value] = {}
        for part in range(self._count + 1):
            rows = self._rows(n, part)
            read = self._read(n, source, part)
            if not len(rows) or read is None:
                continue
            node, columns = read
            name = self._layer(str(n.target), part, rows, columns)
            self.wired.append(Wired(name, str(n.target), rows, columns))
            made = self._graph.create_node("call_module", name, (node,), {}, f"{n.name}_{self.names[part]}", n.type)
            found[part] = Value(made, rows if n.name in self.splits.dims else None)
        return found

    def _rows(self, n: fx.Node, part: int) -> np.ndarray:
        """Return the ids of what a layer makes in a part."""
        if n.name in self.splits.dims:
            return joined(self.sharing.parts[:, self.splits.dims[n.name][1]] == part)
        t = self.splits.coupling.at(n.name)[0]
        module = named_part(self._first.root, str(n.target))
        size = t.shape[-1] if isinstance(module, nn.Linear) else t.shape[len(t.shape) - module.weight.ndim + 1]
        return np.arange(size if part else 0) * self._count + part - 1

    def _read(self, n: fx.Node, source: fx.Node, part: int) -> tuple[fx.Node, np.ndarray | None] | None:
        """Return what a layer reads in a part, and the ids of that; None where it reads nothing."""
        if source.name in self._common:
            return self._common[source.name], None
        values = self._values[source.name]
        if source.name not in self.splits.dims:
            shape, _ = state_labels(self.splits.coupling, self._first, f"{n.target}.weight")
            turned = isinstance(named_part(self._first.root, str(n.target)), nn.modules.conv._ConvTransposeNd)
            ids = np.arange(shape[0] if turned else shape[1]) * self._count + part - 1
            return (values[part].node, ids) if part else None
        there = [values[p] for p in dict.fromkeys((SHARED, part)) if p in values]
        if not there:
            return None
        ids = np.concatenate([v.ids for v in there if v.ids is not None])
        if len(there) == 1:
            return there[0].node, ids
        dim = self.splits.dims[source.name][0]
        both = [v.node for v in there]
        return self._graph.create_node(
            "call_function", torch.cat, (both, dim), {}, f"{n.name}_{self.names[part]}_in"
        ), ids

    def _layer(self, name: str, part: int, rows: np.ndarray, columns: np.ndarray | None) -> str:
        """Return the name of a layer from some ids to others, made where it is not there."""
        key = (part, name, rows.tobytes(), None if columns is None else columns.tobytes())
        if key in self._modules:
            return self._modules[key]
        layers: list[Any] = [named_part(t.root, name) for t in self.splits.networks]
        turned = isinstance(layers[0], nn.modules.conv._ConvTransposeNd)
        weights = [m.weight.detach().transpose(0, 1) if turned else m.weight.detach() for m in layers]
        written = self.sharing.written.get(f"{name}.weight")
        if written is None:
            weight = side_by_side(weights, rows, columns)
        else:
            written = written.transpose(0, 1) if turned else written
            weight = written.to(weights[0])[torch.from_numpy(rows)]
            weight = weight if columns is None else weight[:, torch.from_numpy(columns)]
        weight = (weight.transpose(0, 1) if turned else weight).contiguous()
        if weights[0].ndim == 4 and layers[0].weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        tensors = {id(layers[0].weight): copied_like(layers[0].weight, weight)}
        if layers[0].bias is not None:
            own = self.sharing.written.get(f"{name}.bias")
            index = torch.from_numpy(rows)
            bias = of_part([m.bias.detach() for m in layers], 0, rows) if own is None else own[index]
            tensors[id(layers[0].bias)] = copied_like(layers[0].bias, bias.to(layers[0].bias))
        new = clone(layers[0], tensors)
        if isinstance(new, nn.Linear):
            new.out_features, new.in_features = new.weight.shape
        else:
            new.out_channels, new.in_channels = weight.shape[:2] if not turned else weight.shape[:2][::-1]
        self._modules[key] = _put(self._holder, f"{self.names[part]}.{name}", new)
        return self._modules[key]

    def _output(self) -> None:
        """Let the graph return task -> what its network returns."""
        value = returned(self._first.graph)

        def own(part: int) -> Any:
            at = lambda a: self._common.get(a.name) or self._values[a.name][part].node  # noqa: E731
            return pytree.tree_map_only(fx.Node, at, value)

        self._graph.output(None)
        set_returned(self._graph, {task: own(t + 1) for t, task in enumerate(self.names[1:])})


def _there(args: Any, inputs: Mapping[fx.Node, Any]) -> Any:
    """Return arguments without the nodes, in lists of them, of which nothing is there."""
    if isinstance(args, (tuple, list)):
        left = [_there(a, inputs) for a in args if not isinstance(a, fx.Node) or a in inputs]
        return left if isinstance(args, list) else tuple(left)
    if isinstance(args, dict):
        return {key: _there(a, inputs) for key, a in args.items()}
    return args


def _cloner(root: nn.Module, graph: fx.Graph) -> Cloner:
    """Return what copies modules of a network, its parameters and buffers included."""
    held = {id(t): copied_like(t, t.detach().clone()) for _, t, _ in used_state(root, graph)}
    return Cloner(root, held)


def _put(holder: nn.Module, name: str, value: Any) -> str:
    """Put a module, parameter, buffer or constant at a name, or at another where that is taken; return the name."""
    *path, last = name.split(".")
    for key in path:
        if key not in holder._modules:
            plain = nn.Module()
            plain.training = holder.training
            holder._modules[key] = plain
        found = holder._modules[key]
        assert found is not None
        holder = found
    taken = {*holder._modules, *holder._parameters, *holder._buffers, *vars(holder)}
    fresh, i = last, 1
    while fresh in taken:
        fresh, i = f"{last}_{i}", i + 1
    if isinstance(value, nn.Module):
        holder._modules[fresh] = value
    elif isinstance(value, nn.Parameter):
        holder.register_parameter(fresh, value)
    elif isinstance(value, torch.Tensor):
        holder.register_buffer(fresh, value, persistent=True)
    else:
        setattr(holder, fresh, value)
    return ".".join([*path, fresh])
