"""Parts of values, parameters and layers of several networks side by side.

A position of a dim of networks side by side has an id: its position in one network times the number of networks, plus
the number of the network. A part is an array of ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.cloning import clone, named_part, named_state
from fxprune.coupling import Coupling
from fxprune.labels import Labels, Shape, blank
from fxprune.literals import plain_name
from fxprune.resizing import Call, resize
from fxprune.traced import Traced

_SIZED = {"view", "reshape", "expand"}
"""Functions and methods whose arguments are sizes of what they return."""


def joined(members: np.ndarray) -> np.ndarray:
    """Return the ids of the positions that are members: (networks, positions) bool -> (members,)."""
    return np.flatnonzero(members.T.ravel())


def of_part(values: Sequence[torch.Tensor], dim: int, ids: np.ndarray) -> torch.Tensor:
    """Return a part of the values of several networks, each of the same shape, along a dim."""
    both = torch.stack(list(values), dim + 1).flatten(dim, dim + 1)
    return both.index_select(dim, torch.from_numpy(ids).to(both.device))


def side_by_side(weights: list[torch.Tensor], rows: np.ndarray, columns: np.ndarray | None) -> torch.Tensor:
    """Return the weight (rows, columns, *kernel) of a part: zero from one network to another."""
    count = len(weights)
    if columns is None:
        return of_part(weights, 0, rows)
    new = weights[0].new_zeros(len(rows), len(columns), *weights[0].shape[2:])
    for i, weight in enumerate(weights):
        r, c = np.flatnonzero(rows % count == i), np.flatnonzero(columns % count == i)
        own = weight[torch.from_numpy(rows[r] // count)][:, torch.from_numpy(columns[c] // count)]
        new[torch.from_numpy(r)[:, None], torch.from_numpy(c)] = own
    return new


def is_map(module: nn.Module) -> bool:
    """Say whether in a layer every output reads every input: it is linear, or a convolution of one group."""
    plain = module.groups == 1 if isinstance(module, nn.modules.conv._ConvNd) else type(module) is nn.Linear
    return plain and set(module._parameters) == {"weight", "bias"} and not module._modules and _unhooked(module)


def _unhooked(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)


def state_labels(coupling: Coupling, traced: Traced, name: str) -> tuple[Shape, Labels]:
    """Return shape and channels of a parameter or buffer, whichever of its names it is asked by."""
    tensor = named_part(traced.root, name)
    known = next((n for n, t, _ in traced.state if t is tensor), name)
    found = coupling.tensors.get(known)
    return (tuple(tensor.shape), blank(tensor.ndim)) if found is None else found


def moved(
    n: fx.Node, inputs: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray, count: int
) -> np.ndarray | str:
    """Return the ids of what a node makes of parts, or why they cannot be told.

    Args:
        n: the node.
        inputs: source -> its ids, and the channel of each position in one network.
        labels: the channel of each position of the result in one network.
        count: how many networks there are.
    """
    sources = [inputs[a.name] for a in n.all_input_nodes if a.name in inputs]
    if not sources:
        return "makes channels of nothing"
    ids, channels = sources[0]
    if plain_name(n) in ("cat", "concat", "concatenate"):
        listed = [inputs[a.name] for a in _listed(n) if a.name in inputs]
        if sum(len(c) for _, c in listed) == len(labels):
            starts = np.cumsum([0, *(len(c) for _, c in listed)])[:-1]
            return np.concatenate([i + start * count for (i, _), start in zip(listed, starts, strict=True)])
    if any(not np.array_equal(i, ids) or not np.array_equal(c, channels) for i, c in sources[1:]):
        return "takes channels in different orders"
    each = len(labels) // max(len(channels), 1)
    if each < 1 or not np.array_equal(np.repeat(channels, each), labels):
        return "moves channels in a way that is not followed"
    places = (ids // count)[:, None] * each + np.arange(each)
    return (places * count + (ids % count)[:, None]).ravel()


def _listed(n: fx.Node) -> list[fx.Node]:
    """Return the operands of a concatenation, each as often as it occurs."""
    tensors: Any = n.args[0] if n.args else n.kwargs["tensors"]
    return [a for a in tensors if isinstance(a, fx.Node)]


def sized_args(n: fx.Node, dim: int, size: int) -> tuple[Any, ...]:
    """Return the arguments of a node with the size of a dim of what it returns in place of the one of all channels."""
    if plain_name(n) not in _SIZED or len(n.args) < 2:
        return n.args
    sizes: list[Any] = list(n.args[1]) if isinstance(n.args[1], (tuple, list)) else list(n.args[1:])
    if dim < len(sizes) and type(sizes[dim]) is int and sizes[dim] > 1:
        sizes[dim] = size
    return (n.args[0], tuple(sizes)) if isinstance(n.args[1], (tuple, list)) else (n.args[0], *sizes)


def run_node(
    n: fx.Node, module: nn.Module | None, values: Mapping[str, Any], sized: tuple[int, int] | None = None
) -> Any:
    """Run a node on values, in eval mode; `sized` are a dim of what it returns and its size."""
    args = n.args if sized is None else sized_args(n, *sized)
    args, kwargs = map_arg((args, dict(n.kwargs)), lambda a: values[a.name])
    with torch.no_grad():
        if module is not None:
            return clone(module).eval()(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        function: Any = n.target
        return function(*args, **kwargs)


def part_of_module(
    coupling: Coupling,
    traced: Traced,
    roots: Sequence[nn.Module],
    name: str,
    ids: np.ndarray,
    labels: np.ndarray,
    written: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module | str:
    """Return a module that does to a part what those of several networks do to their channels, or why there is none.

    Args:
        coupling: of one network.
        traced: that network.
        roots: the modules that the networks run on.
        name: of the module in each.
        ids: the part.
        labels: the channel of each position of what it makes.
        written: state -> (.., positions * networks, ..) values that take the place of the networks' own.
    """
    modules = [named_part(root, name) for root in roots]
    tensors: dict[int, torch.Tensor] = {}
    for key, t, is_parameter in named_state(modules[0]):
        known = enumerate(state_labels(coupling, traced, f"{name}.{key}")[1])
        dim = next((d for d, at in known if at is not None and np.array_equal(at.ravel(), labels)), None)
        if dim is not None:
            own = (written or {}).get(f"{name}.{key}")
            values = [named_part(m, key) for m in modules]
            new = of_part(values, dim, ids) if own is None else own.index_select(dim, torch.from_numpy(ids)).to(t)
        elif t.is_floating_point():
            return f"holds {key!r}, which the channels of each network would need their own of"
        else:
            new = t.detach().clone()
        new = new.detach().clone()
        tensors[id(t)] = nn.Parameter(new, t.requires_grad) if is_parameter else new
    part = clone(modules[0], tensors)
    size = len(ids)

    def rows(dim: int, count: int) -> int:
        return size if count == len(labels) else count

    def kept(key: str, dim: int) -> np.ndarray:
        return np.ones(named_part(part, key).shape[dim], dtype=bool)

    if tensors or isinstance(part, nn.modules.batchnorm._NormBase):
        shape = (1, size, *[1] * len(getattr(part, "kernel_size", ())))
        resize(part, Call([shape], [shape], rows, kept))
    return part
