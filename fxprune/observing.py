"""What merging reads of calibration data: a number per channel, and labels of +1 and -1 for every task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fxprune.calibrating import samples_in
from fxprune.errors import PlanError
from fxprune.merging import Merger
from fxprune.running import Runner
from fxprune.splitting import MAP
from fxprune.subtasks import are_numbers, part_of, targets_of
from fxprune.tasks import evaluating, inputs_of
from fxprune.traced import Traced
from fxprune.values import bind


def features_of(merger: Merger, samples: int) -> dict[int, torch.Tensor]:
    """Return group -> (samples, networks, choices): the maximum over positions where a layer first reads a channel.

    Groups that no layer reads along a dim behind the first, of samples, are left out.

    Raises:
        PlanError: there are no batches, or a feature is not finite.
    """
    splits = merger.splits
    sources = [n.all_input_nodes[0].name for n in splits.networks[0].graph.nodes if splits.kinds.get(n.name) == MAP]
    read = {name: splits.dims[name] for name in dict.fromkeys(sources) if splits.dims.get(name, (0,))[0] > 0}
    if not read:
        return {}
    known = np.unique(np.concatenate([ids for _, ids in read.values()]))
    seen = [[_pooled(traced, batch, read) for batch in batches_of(merger, samples)] for traced in splits.networks]
    values = torch.stack([torch.cat([_by_channel(part, read, splits.coupling.num_channels) for part in parts])
                          for parts in seen], 1)[:samples]  # fmt: skip
    return {
        group.index: values[:, :, torch.from_numpy(group.cells[0])]
        for group in splits.coupling.groups()
        if splits.free[group.cells[0]].all() and np.isin(group.cells[0], known).all()
    }


def batches_of(merger: Merger, samples: int | None = None) -> Iterator[Any]:
    """Yield batches until there are so many samples.

    Raises:
        PlanError: there are none.
    """
    if not merger.batches:
        raise PlanError("this method reads data. Pass `calibration=` batches `(inputs, targets)`.")
    count = 0
    for batch in merger.batches:
        yield batch
        count += samples_in(batch)
        if samples is not None and count >= samples:
            return


def _pooled(traced: Traced, batch: Any, read: dict[str, tuple[int, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Run a network on a batch; return node -> (samples, positions along its dim of channels)."""
    runner, found = Runner(traced.root, traced.graph), {}
    args, kwargs = inputs_of(batch)
    with torch.no_grad(), evaluating(traced.root):
        runner.args_iter = iter(bind(traced.graph, args, kwargs))
        for n in traced.graph.nodes:
            if n.op == "output":
                break
            value = runner.env[n] = runner.run_node(n)
            if n.name in read:
                others = [d for d in range(1, value.ndim) if d != read[n.name][0]]
                found[n.name] = (value.amax(others) if others else value).double().cpu()
                _check_finite(found[n.name], f"what node {n.name!r}{traced.where(n.name)} returns")
    return found


def _by_channel(
    values: dict[str, torch.Tensor], read: dict[str, tuple[int, np.ndarray]], channels: int
) -> torch.Tensor:
    """Return (samples, channels): of every channel, what the first node that has it says."""
    count = len(next(iter(values.values())))
    found = torch.zeros(count, channels, dtype=torch.float64)
    known = np.zeros(channels, dtype=bool)
    for name, value in values.items():
        ids = read[name][1]
        fresh = np.flatnonzero(~known[ids])
        at = torch.from_numpy(ids[fresh]).expand(count, -1)
        new = torch.full_like(found, -torch.inf).scatter_reduce(1, at, value[:, torch.from_numpy(fresh)], "amax")
        found = torch.where(torch.isinf(new), found, new)
        known[ids] = True
    return found


def labels_of(merger: Merger, task: str, samples: int) -> torch.Tensor:
    """Return (samples, labels) of +1 and -1 for a task; see `methods.PAM`.

    Raises:
        PlanError: the batches have no targets, it is not known which are the task's, or they tell nothing.
    """
    found = [_target(merger, task, batch) for batch in batches_of(merger, samples)]
    values = torch.cat([t.detach().cpu() for t in found])[:samples]
    if not bool(values.isfinite().all()):
        raise PlanError(f"targets of task {task!r} are NaN or infinite. Leave out the samples that have such targets.")
    labels = binary(values)
    varies = (labels > 0).any(0) & (labels < 0).any(0)
    if not bool(varies.any()):
        raise PlanError(
            f"the targets of task {task!r} are alike in all of the {len(values)} samples that are read, so no channel "
            "tells of them. Shuffle the batches, or pass more of them, and raise `samples` of the method."
        )
    return labels[:, varies]


def _target(merger: Merger, task: str, batch: Any) -> torch.Tensor:
    targets = targets_of(batch)
    asked = merger.losses[task].target if merger.losses else None
    if asked is None and isinstance(targets, dict) and task in targets:
        return part_of(targets, task, "target")
    return part_of(targets, asked, "target")


def binary(target: torch.Tensor) -> torch.Tensor:
    """Return (samples, labels) of +1 and -1 for a target (samples, ..): see `methods.PAM`."""
    if target.dtype == torch.bool:
        return target.flatten(1).double() * 2 - 1 if target.ndim > 1 else target[:, None].double() * 2 - 1
    if are_numbers(target):
        classes = target[target >= 0].unique()
        is_class = target.reshape(len(target), 1, -1) == classes[:, None]
        if target.ndim == 1:
            return is_class[:, :, 0].double() * 2 - 1
        values = is_class.double().mean(2)
    else:
        values = target.double().reshape(len(target), target.shape[1] if target.ndim > 1 else 1, -1)
        if bool((values.abs() == 1).all()) and values.shape[2] == 1:
            return values[:, :, 0]
        values = values.mean(2)
    return torch.where(values > values.median(0).values, 1.0, -1.0).double()


def _check_finite(values: torch.Tensor, what: str) -> None:
    """Check that what was computed of calibration data is finite.

    Args:
        values: float64.
        what: they are, for the message.

    Raises:
        PlanError: it is not.
    """
    if not math.isfinite(float(values.sum())):
        raise PlanError(
            f"{what} is NaN or infinite on the calibration data. Leave out the samples that make it so, or look for "
            "the op that overflows."
        )
