"""Torch-Pruning on one network of the zoo, and a check of its result that does not ask Torch-Pruning.

The check finds what every parameter of the pruned network kept by looking its random values up in the original, and
compares the pruned network in float64 with the original in which all other positions are absent: the reference that
fxprune's own results have to equal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.coupling import Coupling
from fxprune.masking import AbsentIsNaN, InFloat64
from fxprune.plans import Plan
from fxprune.verifying import masked_copy, relative_error, run_in

RATIO = 1 - 0.5**0.5  # a share r of the channels leaves about (1 - r) ** 2 of the macs
NEAR = 64  # what is first in a pruned dim was among the first of the original
LINES = 8  # of a parameter, looked up in turn until the values of one occur once


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors in a network's output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def output_layers(coupling: Coupling) -> list[str]:
    """Return the names of the modules whose channels are outputs of the network: not to be pruned."""
    ends = {node.name for node in coupling.traced.graph.nodes if node.op == "output"}
    channels = [frozen.channels for frozen in coupling.frozen if frozen.node in ends]
    if not channels:
        return []
    last = np.concatenate(channels)
    owners = (s.name.rpartition(".")[0] for s in coupling.sites if s.dim == 0 and np.isin(s.channels, last).any())
    return list(dict.fromkeys(owners))


def prune(model: nn.Module, inputs: tuple[Tensor, ...], ignored: Sequence[str]) -> dict[str, float]:
    """Prune a model in place to about half its macs, by magnitude; return the seconds of each stage.

    Args:
        model: any module.
        inputs: example inputs.
        ignored: names of the modules to leave as they are; the last linear layer where there are none.
    """
    layers = [model.get_submodule(name) for name in ignored]
    if not layers:
        layers += [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    heads, examples = _heads(model), cast(Any, inputs)  # declared as a tensor, and more is taken
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=examples,
        importance=tp.importance.MagnitudeImportance(p=2),
        global_pruning=False,
        isomorphic=False,
        pruning_ratio=RATIO,
        ignored_layers=layers,
        num_heads=heads,
        in_channel_groups={},  # its defaults are shared between pruners
        out_channel_groups={},
        output_transform=leaves,
    )
    built = time.perf_counter()
    pruner.step()
    stepped = time.perf_counter()
    _repair(model, heads)
    return {"graph": built - start, "step": stepped - built}


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the layers that make queries, keys and values, with their heads, as a user has to list them."""
    found: dict[nn.Module, int] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # fused, the scale would follow the size of the slim heads
        if isinstance(module, nn.MultiheadAttention):
            found[module] = module.num_heads
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            found[module.qkv] = module.num_heads
    return found


def _repair(model: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Correct the sizes that attention modules of timm remember, as Torch-Pruning's examples do."""
    module: Any
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv in heads:
            module.num_heads = heads[qkv]
            module.head_dim = qkv.out_features // (3 * heads[qkv])
            module.attn_dim = qkv.out_features // 3


def error(model: nn.Module, slim: nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> float | None:
    """Return how far a pruned network is from the masked original, relative, in float64.

    Args:
        model: the original.
        slim: the pruned network; it is changed to float64.
        inputs: example inputs.
        plan: any plan for the original, whose positions are replaced.

    Returns:
        The error of the worst output, or None where it cannot be told what a parameter kept.
    """
    kept = kept_positions(model, slim)
    if kept is None:
        return None
    masked = masked_copy(model, dataclasses.replace(plan, kept=kept))
    expected = leaves(run_in(AbsentIsNaN(), masked, inputs, {}))
    found = leaves(run_in(InFloat64(), slim.double(), inputs, {}))
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def kept_positions(model: nn.Module, slim: nn.Module) -> dict[tuple[str, int], np.ndarray] | None:
    """Return (parameter, dim) -> the positions that a pruned network kept, or None where that cannot be told."""
    short = {**dict(slim.named_parameters(remove_duplicate=False)), **dict(slim.named_buffers())}
    kept: dict[tuple[str, int], np.ndarray] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in short or short[name].ndim != tensor.ndim:
            return None
        if short[name].shape != tensor.shape:
            found = _lines(tensor.detach().numpy(), short[name].detach().numpy())
            if found is None:
                return None
            kept |= {(name, dim): positions for dim, positions in found.items()}
    return kept


def _lines(dense: np.ndarray, slim: np.ndarray) -> dict[int, np.ndarray] | None:
    """Return dim -> the positions at which the values of `slim` are in `dense`; of dim 1, by row where rows differ."""
    found = {dim: _along(dense, slim, dim) for dim in range(dense.ndim) if slim.shape[dim] != dense.shape[dim]}
    every = [found.get(dim, np.arange(size)) for dim, size in enumerate(dense.shape)]
    if np.array_equal(dense[np.ix_(*every)], slim):
        return found
    if 1 not in found:
        return None
    every[1] = np.arange(dense.shape[1])
    rows = dense[np.ix_(*every)]
    by_row = [_along(a, b, 0) for a, b in zip(rows, slim, strict=True)]
    if all(np.array_equal(a[at], b) for a, at, b in zip(rows, by_row, slim, strict=True)):
        return found | {1: np.stack(by_row)}
    return None


def _along(dense: np.ndarray, slim: np.ndarray, dim: int) -> np.ndarray:
    """Return where along a dim the values of `slim` are; zeros where no line of it has values that occur once."""
    near = dense[tuple(slice(None) if d == dim else slice(NEAR) for d in range(dense.ndim))]
    lines = np.moveaxis(slim, dim, 0).reshape(slim.shape[dim], -1)
    for number in range(min(LINES, lines.shape[1])):
        found = _line(near, lines[:, number], dim)
        if found is not None:
            return found
    return np.zeros(slim.shape[dim], dtype=np.int64)


def _line(dense: np.ndarray, values: np.ndarray, dim: int) -> np.ndarray | None:
    """Return where along a dim the values of one line are: chance puts some elsewhere too, most are on that line."""
    order = np.argsort(values)
    place = np.minimum(np.searchsorted(values[order], dense), len(values) - 1)
    at = np.stack(np.nonzero(values[order][place] == dense), axis=1)
    if not len(at):
        return None
    other, count = np.unique(np.delete(at, dim, axis=1), axis=0, return_counts=True)
    line = at[(np.delete(at, dim, axis=1) == other[np.argmax(count)]).all(axis=1)]
    which = order[place[tuple(line.T)]]
    if not np.array_equal(np.sort(which), np.arange(len(values))):
        return None
    return line[np.argsort(which), dim]


def runs(slim: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run a pruned network once; what it raises is the caller's to note."""
    with torch.no_grad():
        slim(*inputs)
