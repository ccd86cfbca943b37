"""The coupled sets that Torch-Pruning finds, and those of a `Coupling`, in one comparable form.

A position is ``(name, dim, index)``: one slice of one parameter or buffer. A partition is the set of all
sets of positions that leave together. Both functions leave out what may not go, so that equal partitions
mean equal coupling:

* positions tied to an output of the model: the last layer's channels;
* the in-group dim of depthwise convs, which has size 1.

The in-group dim of other grouped convs is different in each conv group: its index here is the conv's
input channel (for transposed convs its output channel), not the index in the weight.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import torch_pruning as tp
from networkx.utils import UnionFind
from torch import nn
from torch.utils import _pytree as pytree
from torch_pruning import ops
from torch_pruning.dependency.group import Group

Position = tuple[str, int, int]
Partition = frozenset[frozenset[Position]]

OUTPUT: Position = ("", 0, 0)  # stands for every output of the model
KIND = ops.OPTYPE
PER_CHANNEL = (KIND.BN, KIND.GN, KIND.IN, KIND.LN, KIND.PRELU)


class Site(Protocol):
    """What is read of an `fxprune` site."""

    name: str
    dim: int
    channels: np.ndarray


def torch_pruning_sets(model: nn.Module, example_inputs: Any) -> Partition:
    """Return the coupled sets of positions that Torch-Pruning's dependency graph holds for ``model``.

    Args:
        model: Any module; a copy is traced, in eval mode, with every parameter trainable (the graph is
            read from autograd).
        example_inputs: A tensor or a tuple of tensors.

    Returns:
        One frozenset of positions per channel.

    Raises:
        NotImplementedError: A kind of layer whose channels are not a dim of its parameters (attention, LSTM).
    """
    model = copy.deepcopy(model).requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs, output_transform=_mark_outputs, ignored_params=[], verbose=False
    )
    names = {module: name for name, module in model.named_modules()}
    names |= {parameter: name for name, parameter in model.named_parameters()}
    union: UnionFind = UnionFind()
    for root in [m for m in graph.module2node if isinstance(m, (ops.TORCH_CONV, nn.Linear))]:
        _join_group(union, graph, root, names)
    return _partition(union)


def coupling_sets(sites: Iterable[Site], model: nn.Module) -> Partition:
    """Return the coupled sets of positions of ``coupling.sites``; ``model`` tells which convs are grouped."""
    union: UnionFind = UnionFind()
    for site in sites:
        owner, _, _ = site.name.rpartition(".")
        for index, channel in enumerate(_flat_channels(site, model.get_submodule(owner))):
            if channel >= 0:
                union.union((site.name, site.dim, index), ("channel", -1, channel))
    return _partition(union)


def describe_difference(ours: Partition, theirs: Partition, limit: int = 3) -> str:
    """Say in a few lines which sets only one side has; empty where the partitions are equal."""
    lines = [f"{len(ours)} sets against {len(theirs)}"] if ours != theirs else []
    for title, extra in (("only ours", ours - theirs), ("only theirs", theirs - ours)):
        for group in sorted(map(sorted, extra))[:limit]:
            lines.append(f"{title}: " + ", ".join(f"{name}[dim {dim}]={index}" for name, dim, index in group))
    return "\n".join(lines)


def _mark_outputs(outputs: Any) -> list[torch.Tensor]:
    """Add an op after each output, so that Torch-Pruning gives it a node of its own."""
    return [leaf * 1 for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _join_group(union: UnionFind, graph: tp.DependencyGraph, root: nn.Module, names: dict[Any, str]) -> None:
    """Join every position that goes together with an output channel of ``root``."""
    pruner: Any = graph.get_pruner_of_module(root)
    channels = range(pruner.get_out_channels(root))
    # Merging drops a position's second root channel, and with it the tie between the two.
    with mock.patch.object(Group, "add_and_merge", Group.add_dep):
        group = graph.get_pruning_group(root, pruner.prune_out_channels, list(channels))
    anchors = [tuple(_positions(group[0].dep, graph, names, index)) for index in channels]
    for item in group.items:
        for index, channel in zip(item.idxs, item.root_idxs, strict=True):
            union.union(*anchors[channel], *_positions(item.dep, graph, names, index))


def _positions(dep: Any, graph: tp.DependencyGraph, names: dict[Any, str], index: int) -> Iterator[Position]:
    """Yield the positions that one step of a Torch-Pruning group removes for one index."""
    module, kind = dep.target.module, dep.target.type
    if kind is KIND.OUTPUT:
        yield OUTPUT
        return
    if kind is KIND.PARAMETER:
        yield names[module], dep.target.pruning_dim % module.ndim, index
        return
    for attribute, dim in _sites(module, kind, graph.is_out_channel_pruning_fn(dep.handler)):
        if isinstance(getattr(module, attribute, None), torch.Tensor):
            yield f"{names[module]}.{attribute}", dim, index


def _sites(module: Any, kind: Any, out: bool) -> list[tuple[str, int]]:
    """Return (attribute, dim) of what Torch-Pruning slices in a module of this kind."""
    if kind is KIND.DEPTHWISE_CONV:
        return [("weight", 0), ("bias", 0)]
    if kind is KIND.CONV:
        dim = int(out == module.transposed)
        return [("weight", dim), ("bias", 0)] if out else [("weight", dim)]
    if kind is KIND.LINEAR:
        return [("weight", 0), ("bias", 0)] if out else [("weight", 1)]
    if kind is KIND.EMBED:
        return [("weight", 1)]
    if kind is KIND.PRELU and module.num_parameters == 1:
        return []
    if kind in PER_CHANNEL:
        dim = len(module.normalized_shape) - 1 if kind is KIND.LN else 0
        return [(attribute, dim) for attribute in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
        raise NotImplementedError(f"{type(module).__name__}: its channels are not a dim of its parameters")
    return []


def _flat_channels(site: Site, owner: nn.Module) -> list[int]:
    """Return the channel at each position of a site, the conv groups of a grouped weight one after the other."""
    channels = np.asarray(site.channels)
    groups = getattr(owner, "groups", 1)
    if groups > 1 and site.name.endswith("weight") and site.dim == 1:
        if channels.shape[-1] == 1 or channels.ndim == 1:
            return []
        return channels[:: len(channels) // groups].reshape(-1).tolist()
    return channels.reshape(-1).tolist()


def _partition(union: UnionFind) -> Partition:
    """Return the union's classes without what reaches an output, and without the names of channels."""
    classes: defaultdict[Any, set[Position]] = defaultdict(set)
    for position in union:
        classes[union[position]].add(position)
    kept = (members for members in classes.values() if OUTPUT not in members)
    return frozenset(frozenset(p for p in members if p[1] >= 0) for members in kept)
