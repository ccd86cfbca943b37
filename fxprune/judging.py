"""How far a network with fewer channels is from the dense one: at its layers, or at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.calibrating import samples_in
from fxprune.coupling import Coupling
from fxprune.grouping import Group
from fxprune.rerunning import OUTPUT, Rerun, Values
from fxprune.slicing import slice_tensor
from fxprune.tasks import Task
from fxprune.values import tensors_in


class LayerJudge:
    """The relative error where a group's channels end: of what the layers return that read them.

    Of every such node, `|y - y0| / |y0|` over all samples and the channels that are left, y0 from the dense network;
    summed over nodes.
    """

    def __init__(self, coupling: Coupling, rerun: Rerun, *, max_bytes: int = 1 << 30) -> None:
        """Remember what the dense network returns, as far as memory allows.

        Args:
            coupling: of the network.
            rerun: of the dense network.
            max_bytes: for what is remembered; the rest is computed again each time.
        """
        self._coupling = coupling
        self._rerun = rerun
        self._ends = [ends_of(coupling, group) for group in coupling.groups()]
        wanted = tuple(dict.fromkeys(name for ends in self._ends for name in ends))
        self._dense: list[dict[str, Any]] = []
        for i in range(len(rerun.batches)):
            found = rerun.one(i, {}, wanted)
            max_bytes -= sum(t.numel() * t.element_size() for t in tensors_in(found))
            if max_bytes < 0:
                break
            self._dense.append(found)
        whole = len(self._dense) == len(rerun.batches)
        self._again = None if whole else Rerun(coupling, rerun.batches, (), max_bytes=0)

    def error(self, group: int, keep: np.ndarray, values: Values) -> float:
        """Return the error of a group.

        Args:
            group: its index.
            keep: (channels,) what is left.
            values: parameters and buffers of the network that is judged.
        """
        ends, stays = self._ends[group], np.append(keep, True)
        sums: dict[str, np.ndarray] = {name: np.zeros(2) for name in ends}
        for i, found in enumerate(self._rerun.run(values, ends, keep)):
            dense = self._again.one(i, {}, ends) if self._again and i >= len(self._dense) else self._dense[i]
            for name in ends:
                sums[name] += self._squares(name, found[name], dense[name], stays)
        return sum(_ratio(*pair) for pair in sums.values())

    def _squares(self, name: str, found: Any, dense: Any, stays: np.ndarray) -> np.ndarray:
        total = np.zeros(2)
        for t, a, b in zip(self._coupling.at(name), tensors_in(found), tensors_in(dense), strict=True):
            if not a.is_floating_point():
                continue
            kept = self._rerun.kept
            if kept is not None:
                b = slice_tensor(b, t.labels, kept)
            for dim, channels in enumerate(t.labels):
                if channels is None or channels.size != channels.shape[dim]:
                    continue
                here = channels.ravel()
                here = here if kept is None else here[kept.keep[here]]
                shape = [-1 if d == dim else 1 for d in range(a.ndim)]
                mask = torch.from_numpy(stays[here]).to(a).reshape(shape)
                a, b = a * mask, b * mask
            total += (float((a - b).double().square().sum()), float(b.double().square().sum()))
        return total


class EndJudge:
    """The change of what the network returns, or of its tasks' losses.

    Without tasks: `|out - out0| / |out0|` over all samples, the mean over output tensors. With tasks: the mean over
    tasks of the loss as a multiple of the dense network's, less 1.
    """

    def __init__(self, rerun: Rerun, tasks: Mapping[str, Task] | None) -> None:
        """Run the dense network.

        Args:
            rerun: of it.
            tasks: whose losses count; none for the outputs themselves.
        """
        self._rerun = rerun
        self._tasks = tasks
        self._dense = [found[OUTPUT] for found in rerun.run({})]
        self.losses = self._mean_losses(self._dense) if tasks else np.zeros(0)
        """(tasks,) of the dense network; none without tasks."""

    def error(self, group: int, keep: np.ndarray, values: Values) -> float:
        """Return the error of the network; the arguments are those of `LayerJudge.error`."""
        outputs = [found[OUTPUT] for found in self._rerun.run(values, keep=keep)]
        if self._tasks:
            losses = self._mean_losses(outputs)
            return float(np.mean((losses - self.losses) / np.maximum(np.abs(self.losses), 1e-12)))
        return _relative_change(outputs, self._dense)

    def _mean_losses(self, outputs: Sequence[Any]) -> np.ndarray:
        total, count = np.zeros(len(self._tasks or ())), 0
        for batch, found in zip(self._rerun.batches, outputs, strict=True):
            with torch.no_grad():
                losses = [float(task(found, batch)) for task in (self._tasks or {}).values()]
            total += np.array(losses) * samples_in(batch)
            count += samples_in(batch)
        return total / max(count, 1)


def ends_of(coupling: Coupling, group: Group) -> tuple[str, ...]:
    """Return the nodes where a group's channels end: they read them, or hold them, and return none of them."""
    mine = coupling.in_group(group)

    def carries(name: str) -> bool:
        return any(ids is not None and mine[ids].any() for t in coupling.at(name) for ids in t.labels)

    def holds(target: str) -> bool:
        return any(mine[s.channels].any() for s in coupling.sites if s.name.startswith(f"{target}."))

    found = []
    for n in coupling.traced.graph.nodes:
        reads = any(carries(s.name) for s in n.all_input_nodes) or (n.op == "call_module" and holds(str(n.target)))
        if reads and coupling.record.nodes.get(n.name) and not carries(n.name):
            found.append(n.name)
    return tuple(found)


def _relative_change(found: Sequence[Any], dense: Sequence[Any]) -> float:
    sums: list[np.ndarray] = []
    for a, b in zip(found, dense, strict=True):
        pairs = [(x, y) for x, y in zip(tensors_in(a), tensors_in(b), strict=True) if y.is_floating_point()]
        sums = sums or [np.zeros(2) for _ in pairs]
        for total, (x, y) in zip(sums, pairs, strict=True):
            total += (float((x - y).double().square().sum()), float(y.double().square().sum()))
    return sum(_ratio(*pair) for pair in sums) / max(len(sums), 1)


def _ratio(change: float, size: float) -> float:
    return (change / max(size, 1e-30)) ** 0.5
