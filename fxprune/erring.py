"""Merging by second-order errors: what each channel of networks side by side costs each task if it goes.

Side by side, with all that can be shared in shared layers, networks are one network like any other. Its moments say
which channels repeat what others tell, whichever network these are of: those go, and the rest makes up for them. Then
every task reads what is left of all networks, and what the plain removal of a channel costs a task says whether it
needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.assigning import SHARED, Sharing, regrouped
from fxprune.calibrating import calibrate
from fxprune.calibrations import Calibration
from fxprune.cloning import named_part
from fxprune.correcting import corrections
from fxprune.coupling import Coupling, couple
from fxprune.criteria.joint import joint_paths
from fxprune.errors import PlanError
from fxprune.merging import Merger, settled
from fxprune.parting import state_labels
from fxprune.paths import RemovalPath
from fxprune.probing import Probe, measured
from fxprune.splitting import MAP
from fxprune.tasks import Task
from fxprune.tracing import trace
from fxprune.wiring import Wired

DAMPING = 1e-4
"""What is added to moments before they are inverted, as a share of their mean diagonal: little, so that what is the
same in two networks counts as the same."""
SAMPLES = 32
"""How many samples losses are measured on."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """Networks side by side.

    Attributes:
        coupling: of the network that they are.
        state: its parameters and buffers, which change as others make up for what goes.
        wired: where its layers come from.
        home: (channels, 2) which network each channel of it is of, and its channel there; -1 for those of none.
    """

    coupling: Coupling
    state: dict[str, torch.Tensor]
    wired: list[Wired]
    home: np.ndarray


def share_by_errors(merger: Merger, alpha: float | Mapping[str, float]) -> Sharing:
    """Return who has which channel, with weights that make up for those that go and for what is cut.

    Args:
        merger: the networks.
        alpha: what the channels of a group that go may add to the loss of a task, relative; and again those that a task
            is not given. Second-order estimates, scaled to what is measured on some samples. A number, or group name ->
            number.

    Raises:
        PlanError: there are no batches or no tasks.
    """
    if merger.losses is None or merger.batches is None:
        raise PlanError("errors are those of tasks' losses, on data. Pass `calibration=` and `tasks=`.")
    tasks = {name: Task(_of(task, name)) for name, task in merger.losses.items()}
    beside = _beside(merger)
    bound = _bounds(merger, beside, alpha)
    calibration = calibrate(beside.coupling, merger.batches, tasks)
    gone = _repeating(beside, calibration, bound)
    _correct(beside, calibration, ~gone)
    calibration = calibrate(beside.coupling, merger.batches, tasks)
    needless = _needless(beside, calibration, bound)
    parts = settled(merger.splits, _parts(merger, beside, needless | gone))
    return Sharing(parts, _written(merger, beside, calibration, parts))


def _repeating(beside: _Beside, calibration: Calibration, bound: np.ndarray) -> np.ndarray:
    """Return (channels,) which go, as others make up for them: until that costs a task more than the group's bound."""
    gone = np.zeros(beside.coupling.num_channels, dtype=bool)
    paths = joint_paths(beside.coupling, calibration, damping=DAMPING, chunk=np.inf)
    for path in _measured(beside, calibration, [p for p in paths if bound[p.group] >= 0], compensate=True):
        cost = np.cumsum(path.errors, axis=0).max(axis=1)
        gone[path.choices[cost <= bound[path.group]]] = True
    return gone


def _needless(beside: _Beside, calibration: Calibration, bound: np.ndarray) -> np.ndarray:
    """Return (tasks, channels) which a task can do without: those that cost it least, up to the group's bound."""
    found = np.zeros((len(calibration.losses), beside.coupling.num_channels), dtype=bool)
    plain = [p for p in joint_paths(beside.coupling, calibration, compensate=False) if bound[p.group] >= 0]
    for t in range(len(found)):
        paths = []
        for path in plain:
            errors = path.errors[:, t]
            found[t, path.choices[errors == 0]] = True
            order = np.argsort(errors, kind="stable")
            order = order[errors[order] > 0]
            paths.append(RemovalPath(path.group, path.choices[order], path.errors[order], path.takes))
        for path in _measured(beside, calibration, [p for p in paths if len(p.choices)], compensate=False):
            cost = np.cumsum(path.errors[:, t])
            found[t, path.choices[cost <= bound[path.group]]] = True
    return found


def _measured(
    beside: _Beside, calibration: Calibration, paths: list[RemovalPath], *, compensate: bool
) -> list[RemovalPath]:
    """Return paths of one channel at a time with their errors scaled up to what was measured where that is more."""
    paths = [p for p in paths if p.choices.shape[1] == 1]
    probe = Probe(beside.coupling, calibration, samples=SAMPLES, damping=DAMPING, compensate=compensate)
    found = []
    for told, seen in zip(paths, measured(probe, paths), strict=True):
        total = np.maximum(np.cumsum(told.errors, axis=0), np.cumsum(seen.errors, axis=0))
        found.append(replace(told, errors=np.diff(total, axis=0, prepend=0)))
    return found


def _of(task: Task, name: str) -> Any:
    return lambda outputs, batch: task(outputs[name], batch)


def _beside(merger: Merger) -> _Beside:
    module, wired = merger.side_by_side()
    first = merger.splits.networks[0]
    coupling = couple(trace(module, first.args or first.kwargs))
    home = np.full((coupling.num_channels, 2), -1)
    state = coupling.traced.by_name
    for w in wired:
        for key, dim, channels in _labelled(merger, w, state):
            mine = coupling.tensors[f"{w.name}.{key}"][1][dim] if f"{w.name}.{key}" in coupling.tensors else None
            if mine is not None and channels is not None:
                network, place = w.rows % len(merger.tasks), w.rows // len(merger.tasks)
                home[mine.ravel()] = np.stack([network, channels[place]], 1)
    return _Beside(coupling, state, wired, home)


def _labelled(
    merger: Merger, w: Wired, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, int, np.ndarray | None]]:
    """Yield the parameters and buffers of a layer: key, dim of what it makes, channel of each position there."""
    splits = merger.splits
    module = named_part(splits.networks[0].root, w.layer)
    turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
    for name, value in state.items():
        key = name.removeprefix(f"{w.name}.")
        if key == name or not value.is_floating_point():
            continue
        _, labels = state_labels(splits.coupling, splits.networks[0], f"{w.layer}.{key}")
        dim = 1 if turned and value.ndim > 1 else 0
        ids = labels[dim]
        yield key, dim, None if ids is None else ids.ravel()


def _bounds(merger: Merger, beside: _Beside, alpha: float | Mapping[str, float]) -> np.ndarray:
    """Return (groups,) the bound of each group of the networks side by side; -inf where nothing may go."""
    base, readable = merger.splits.coupling.groups(), _read_by_known(merger)
    name_of = {int(c): group.name for group in base for cell in group.cells for c in cell}
    found = []
    for group in beside.coupling.groups():
        name = name_of.get(int(beside.home[group.cells[0][0], 1]))
        free = name is not None and bool(readable[beside.home[group.cells[0], 1]].all())
        bound = alpha.get(name or "", -np.inf) if isinstance(alpha, Mapping) else alpha
        found.append(bound if free else -np.inf)
    return np.array(found)


def _read_by_known(merger: Merger) -> np.ndarray:
    """Return (channels,) which can be shared, but for those that layers read of which there are no moments."""
    splits = merger.splits
    found = splits.free.copy()
    for n in splits.networks[0].graph.nodes:
        source = n.all_input_nodes[0].name if splits.kinds.get(n.name) == MAP else ""
        module = named_part(splits.networks[0].root, str(n.target)) if source in splits.dims else None
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            found[splits.dims[source][1]] = False
    return found


def _correct(beside: _Beside, calibration: Calibration, keep: np.ndarray) -> None:
    """Let what stays make up for what goes, in place; what went is read no more."""
    changes = list(corrections(beside.coupling, calibration.moments, np.append(keep, True), DAMPING, beside.state))
    with torch.no_grad():
        for change in changes:
            target = beside.state[change.name]
            target.copy_(change.weight.to(target))
            if change.holder is not None:
                beside.state[change.holder].add_(change.shift.to(target))


def _parts(merger: Merger, beside: _Beside, needless: np.ndarray) -> np.ndarray:
    """Return (networks, channels) whose each channel is, from (tasks, channels) which a task can do without."""
    whose = regrouped(needless)
    parts = merger.separate()
    known = beside.home[:, 0] >= 0
    parts[beside.home[known, 0], beside.home[known, 1]] = whose[known]
    return np.where(_read_by_known(merger), parts, merger.separate())


def _written(merger: Merger, beside: _Beside, calibration: Calibration, parts: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the weights of all layers, those of each part made up for what the part does not read."""
    count = len(merger.tasks)
    by_part = []
    for part in range(count + 1):
        whose = parts[beside.home[:, 0], beside.home[:, 1]]
        keep = (beside.home[:, 0] < 0) | (whose == SHARED) | (whose == part)
        values = {name: t.detach().double().cpu() for name, t in beside.state.items() if t.is_floating_point()}
        for change in corrections(beside.coupling, calibration.moments, np.append(keep, True), DAMPING, beside.state):
            values[change.name] = change.weight.double().cpu()
            if change.holder is not None:
                values[change.holder] = values[change.holder] + change.shift.cpu()
        by_part.append(values)
    found: dict[str, torch.Tensor] = {}
    for w in beside.wired:
        for key, dim, channels in _labelled(merger, w, beside.state):
            base = named_part(merger.splits.networks[0].root, f"{w.layer}.{key}")
            network, place = w.rows % count, w.rows // count
            part_of_row = network + 1 if channels is None else parts[network, channels[place]]
            shape = [n * count if d == dim else n for d, n in enumerate(base.shape)]
            other = 1 - dim
            if w.columns is not None and base.ndim > 1:
                shape[other] = base.shape[other] * count
            whole = found.setdefault(f"{w.layer}.{key}", torch.zeros(shape, dtype=torch.float64))
            for part in range(count + 1):
                at = np.flatnonzero(part_of_row == part)
                value = by_part[part][f"{w.name}.{key}"].index_select(dim, torch.from_numpy(at))
                rows = torch.from_numpy(w.rows[at])
                if w.columns is None or base.ndim < 2:
                    whole.index_copy_(dim, rows, value)
                    continue
                columns = torch.from_numpy(w.columns)
                if dim:
                    whole[columns[:, None], rows] = value
                else:
                    whole[rows[:, None], columns] = value
    return found
