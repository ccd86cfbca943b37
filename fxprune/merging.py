"""Merging: several trained networks over the same input become one network of several tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx, nn

from fxprune.alike import check_alike
from fxprune.assigning import SHARED, Sharing
from fxprune.coupling import couple
from fxprune.errors import PlanError
from fxprune.slimming import SlimModule
from fxprune.splitting import COMMON, MAP, Splits, find_splits
from fxprune.tasks import Task, check_batches
from fxprune.tracing import trace
from fxprune.wiring import Wired, Wiring


@dataclass(frozen=True, slots=True)
class Merger:
    """Networks that are to be merged, as a method sees them.

    Attributes:
        tasks: their names.
        splits: what can be told apart.
        batches: calibration data, None without.
        losses: task -> what it is judged by, None without.
    """

    tasks: tuple[str, ...]
    splits: Splits
    batches: list[Any] | None
    losses: Mapping[str, Task] | None

    def separate(self) -> np.ndarray:
        """Return (networks, channels) parts in which every channel is its own task's."""
        own = np.arange(1, len(self.tasks) + 1)[:, None]
        return np.repeat(own, self.splits.coupling.num_channels, axis=1)

    def shared(self) -> np.ndarray:
        """Return (networks, channels) parts in which every channel that can be is shared."""
        parts = self.separate()
        parts[:, self.splits.free] = SHARED
        return parts

    def side_by_side(self) -> tuple[SlimModule, list[Wired]]:
        """Return a network in which all that can be shared is, and its layers; it computes what the networks do."""
        wiring = Wiring(self.splits, self.tasks, Sharing(settled(self.splits, self.shared())))
        return wiring.build(), wiring.wired


class MergeMethod(Protocol):
    """What `merge` asks of a method."""

    def share_out(self, merger: Merger) -> Sharing:
        """Return who has which channel."""
        ...


@torch.inference_mode(False)
def merge(
    networks: Mapping[str, nn.Module],
    calibration: Iterable[Any] | None = None,
    *,
    method: MergeMethod,
    example_inputs: Any,
    tasks: Mapping[str, Task] | None = None,
) -> fx.GraphModule:
    """Merge trained networks of one topology into one network of several tasks.

    Every layer gets a shared part and a part of each task's own. The shared part reads what is shared; what is a task's
    own reads that and its own. `select_tasks` leaves out the parts that some tasks do not need.

    Channels can be shared where every node they reach works on each alone, and linear layers and convolutions make and
    read them. Others, such as those that a layer norm takes a statistic over, are each task's own; the nodes that say
    so are in `merged.meta["fxprune_held"]`, node -> reason, besides the networks' outputs. Buffers and frozen
    parameters that are equal in all networks, and have no such channels, are read by all.

    Args:
        networks: task -> network, two or more; none is touched. Names are those of outputs and of modules.
        calibration: batches `(inputs, targets)`, for methods that read data.
        method: `methods.Separate()`, `methods.Shared()`, `methods.PAM(alpha=..)` or `methods.MTZ(share=..)`.
        example_inputs: as for `compile`, of every network alike.
        tasks: task -> `Task`, for methods that differentiate losses. Losses are called as `loss(outputs, batch)`, with
            what that task's network returns.

    Returns:
        A network that returns a dict, task -> what its network returns. Modules are called `shared.conv1`, `seg.conv1`.

    Raises:
        PlanError: the networks differ (the message says at which node), or the method lacks its data, or cannot use it.
        TraceError: a network cannot be traced.

    Source: He et al., Pruning-Aware Merging for Efficient Multitask Inference (KDD 2021).
    """
    _check_names(networks, tasks)
    if isinstance(method, type) or not callable(getattr(method, "share_out", None)):
        raise PlanError(f"the method is {method!r}, which does not merge. Pass `methods.Separate()`.")
    if calibration is not None:
        check_batches(calibration)
    traced = {task: trace(network, example_inputs) for task, network in networks.items()}
    check_alike(traced)
    splits = find_splits(list(traced.values()), couple(next(iter(traced.values()))))
    merger = Merger(tuple(networks), splits, None if calibration is None else list(calibration), tasks)
    sharing = method.share_out(merger)
    merged = Wiring(splits, merger.tasks, Sharing(settled(splits, sharing.parts), sharing.written)).build()
    merged.meta["fxprune_held"] = dict(splits.held)
    return merged


def _check_names(networks: Mapping[str, nn.Module], tasks: Mapping[str, Task] | None) -> None:
    if not isinstance(networks, Mapping) or len(networks) < 2:
        raise PlanError('two networks or more are merged. Pass `{"seg": net_a, "depth": net_b}`.')
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name in networks:
        plain = isinstance(name, str) and name.isidentifier() and not iskeyword(name)
        if not plain or name in ("shared", "common") or hasattr(module, name):
            raise PlanError(
                f"{name!r} cannot name a task here, for it becomes an attribute of the merged module. Use a Python "
                "name that is no keyword, that no `torch.fx.GraphModule` has, and other than 'shared' and 'common'."
            )
    if tasks is not None and (set(tasks) != set(networks) or not all(isinstance(t, Task) for t in tasks.values())):
        raise PlanError(f"tasks are {list(tasks)}, networks {list(networks)}. Pass a `Task` for each network.")


def settled(splits: Splits, parts: np.ndarray) -> np.ndarray:
    """Return parts in which every layer has something to read.

    What cannot be shared is its own network's. Where a task is left nothing of what a layer reads, one channel of its
    network is its own; what a layer makes of nothing shared is not shared.

    Args:
        splits: what can be shared.
        parts: (networks, channels).
    """
    count = len(splits.networks)
    own = np.arange(1, count + 1)[:, None]
    parts = np.where(splits.free, parts, own)
    maps = [n for n in splits.networks[0].graph.nodes if splits.kinds.get(n.name) == MAP]
    while True:
        before = parts.copy()
        for n in maps:
            source = n.all_input_nodes[0].name
            read, made = splits.dims.get(source), splits.dims.get(n.name)
            for t in range(count):
                if read is not None and not np.isin(parts[:, read[1]], (SHARED, t + 1)).any():
                    parts[t, read[1][0]] = t + 1
            if made is None or splits.kinds[source] == COMMON:
                continue
            if read is None or not (parts[:, read[1]] == SHARED).any():
                mine = parts[:, made[1]]
                parts[:, made[1]] = np.where(mine == SHARED, own, mine)
        if np.array_equal(before, parts):
            return parts
