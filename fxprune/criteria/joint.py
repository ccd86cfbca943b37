"""Joint saliency: what the removal of channels costs each task, when the weights that stay make up for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from fxprune import sharing
from fxprune.atoms import FIXED
from fxprune.calibrations import Calibration, Moments
from fxprune.coupling import Coupling
from fxprune.criteria.magnitude import magnitude
from fxprune.eliminating import CHUNK, DAMPING, Elimination, Unit, damped_inverse, eliminate
from fxprune.errors import PlanError
from fxprune.grouping import Group
from fxprune.layers import channels_of
from fxprune.paths import RemovalPath


def joint_paths(
    coupling: Coupling,
    calibration: Calibration,
    *,
    keep: np.ndarray | None = None,
    damping: float = DAMPING,
    compensate: bool = True,
    chunk: float = CHUNK,
) -> list[RemovalPath]:
    """Return the removal path of every group, with the error of each step for each task.

    The choices of a group are read by linear layers and convolutions. Of each of these, the output's error is weighted
    by how the task's loss answers to it, summed over positions, and added up. A choice that none reads (head dims of
    queries and keys) costs what its own values cost where they are made. Errors are relative to each task's loss.

    Args:
        coupling: the coupled network.
        calibration: what was gathered on it.
        keep: (channels,) what stays of the other groups, which then count at that width; all without it.
        damping: share of the mean diagonal that is added to moments before they are inverted.
        compensate: the weights that stay are corrected. Without, errors are those of the plain removal.
        chunk: one of so many of the choices that are left goes at once; infinite for one at a time.

    Raises:
        PlanError: the calibration is of another network.

    Source: blocks: Kurtic et al., ZipLM (2023); the metric of the output: Martens and Grosse, K-FAC (2015).
    """
    tasks = list(calibration.losses)
    scale = np.array([1 / max(abs(calibration.losses[t]), 1e-12) for t in tasks])
    reader = Reader(coupling, calibration, scale, damping=damping, compensate=compensate)
    keep = np.ones(coupling.num_channels, dtype=bool) if keep is None else keep
    rest = magnitude(coupling)
    return sharing.spread("paths", lambda group: _path(reader, group, keep, rest, damping, chunk), coupling.groups())


def _path(
    reader: Reader, group: Group, keep: np.ndarray, rest: np.ndarray, damping: float, chunk: float
) -> RemovalPath:
    coupling = reader.coupling
    choices, choice_of = group.choices, coupling.choice_of(group)
    stays = keep | (choice_of[:FIXED] >= 0)  # this group's own channels all count
    units = list(reader.units(choice_of, stays))
    own = np.zeros((len(choices), len(reader.scale)))
    seen = np.zeros(len(choices), dtype=bool)
    for unit in units:
        seen[unit.choice[unit.choice >= 0]] = True
    if not seen.all():
        own += np.where(seen[:, None], 0.0, reader.made(choice_of, len(choices)))
    lost = ~seen & ~own.any(axis=1)
    if lost.any():
        total = coupling.members.total(rest)[choices]
        own[lost] = (total[lost] / max(total.sum(), 1e-30))[:, None]
    cells = group.places(~coupling.held[choices])
    steps = min(len(cell) // take for cell, take in zip(cells, group.takes, strict=True))
    found: Elimination = eliminate(
        units, cells, group.takes, steps=steps, tasks=len(reader.scale), own=own, damping=damping, chunk=chunk
    )
    return RemovalPath(group.index, choices[found.order], found.errors, group.takes)


class Reader:
    """Finds the linear maps that read or make channels."""

    def __init__(
        self, coupling: Coupling, calibration: Calibration, scale: np.ndarray, *, damping: float, compensate: bool
    ) -> None:
        """Look up weights.

        Args:
            coupling: the coupled network.
            calibration: what was gathered on it.
            scale: (tasks,) weight of each task's error.
            damping: share of the mean diagonal that is added to moments before they are inverted.
            compensate: what stays is corrected: correlations between inputs count.
        """
        self.coupling = coupling
        self.scale = scale
        self._tasks = list(calibration.losses)
        self._damping = damping
        self._compensate = compensate
        self._known: dict[tuple[str, int], tuple[np.ndarray, torch.Tensor, torch.Tensor]] = {}
        state = coupling.traced.by_name
        self._layers: list[tuple[Moments, torch.Tensor, np.ndarray, np.ndarray]] = []
        biases = [m.layer.bias for m in calibration.moments.values() if m.layer.bias is not None]
        self._bias = {name: state[name] for name in biases if name in state}
        for name, m in calibration.moments.items():
            if name not in state or len(state[name]) != m.layer.blocks * m.layer.outputs:
                raise PlanError(f"the calibration holds {name!r}, which this network does not have. Calibrate on it.")
            if name in coupling.tensors:
                self._layers.append((m, state[name].detach(), *channels_of(coupling, m.layer)))
        self._readings = self._count()

    def _count(self) -> Counter[tuple[str, int]]:
        """Return how many groups read each block of each layer."""
        found: Counter[tuple[str, int]] = Counter()
        for group in self.coupling.groups():
            among = self.coupling.in_group(group)
            for m, _, inputs, _ in self._layers:
                found.update((m.layer.name, int(block)) for block in np.flatnonzero(among[inputs].any(axis=1)))
        return found

    def units(self, choice_of: np.ndarray, keep: np.ndarray) -> Iterator[Unit]:
        """Yield the maps that read some choices.

        Args:
            choice_of: (channels + 1,) which choice a channel goes with, -1 for none.
            keep: (channels,) which channels count, as inputs and as outputs.
        """
        stays = np.append(keep, True)
        for m, weight, inputs, outputs in self._layers:
            reads, made = choice_of[inputs], choice_of[outputs]
            only = np.where((made == made[:, :1]).all(axis=1), made[:, 0], -1)
            reads = np.where(reads == only[:, None], -1, reads)  # what goes along with all that is made of it
            for block in np.flatnonzero((reads >= 0).any(axis=1)):
                rows = np.flatnonzero(stays[outputs[block]])
                columns = np.flatnonzero(stays[inputs[block]])
                if len(rows) and len(columns):
                    yield self._unit(m, weight, int(block), rows, columns, reads[block])

    def _unit(
        self, m: Moments, weight: torch.Tensor, block: int, rows: np.ndarray, columns: np.ndarray, reads: np.ndarray
    ) -> Unit:
        layer, taps = m.layer, m.layer.taps
        w = weight.reshape(layer.blocks, layer.outputs, layer.inputs, taps)[block][rows][:, columns].double().cpu()
        each = 1 if m.shared_taps else taps
        second, inverse = self._moment(m, block, (columns[:, None] * each + np.arange(each)).ravel())
        of = np.repeat(reads[columns], each)
        w = w.permute(1, 2, 0)  # (inputs, taps, outputs)
        w = w if m.shared_taps else w.reshape(-1, 1, len(rows))
        k = torch.from_numpy(rows)
        sensitivity = torch.stack(
            [m.sensitivity[t][block][k[:, None], k] * s for t, s in zip(self._tasks, self.scale, strict=True)]
        )
        return Unit(w, second, sensitivity, of, inverse)

    def _moment(self, m: Moments, block: int, at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the moment of the inputs `at`, and its damped inverse if other groups read the layer too."""
        key = (m.layer.name, block)
        self._readings[key] -= 1
        known = self._known.pop(key, None)
        if known is None or not np.array_equal(known[0], at):
            second, mean = m.second[block], m.mean[block]
            if m.absorbs:
                second = torch.addr(second, mean, mean, alpha=-1)
            if len(at) < len(second):
                second = second[at[:, None], at]
            if not self._compensate:
                second = torch.diag(second.diagonal())
            if self._readings[key] < 1:
                return second, None
            known = (at, second, damped_inverse(second, float(second.diagonal().mean()) * self._damping))
        if self._readings[key] > 0:
            self._known[key] = known
        return known[1:]

    def made(self, choice_of: np.ndarray, count: int) -> np.ndarray:
        """Return (choices, tasks) what it costs to set to zero what is made of each choice."""
        found = np.zeros((count, len(self.scale)))
        for m, weight, _, outputs in self._layers:
            of = choice_of[outputs]
            for block in np.flatnonzero((of >= 0).any(axis=1)):
                layer = m.layer
                w = weight.reshape(layer.blocks, layer.outputs, layer.inputs, layer.taps)[block].double().cpu()
                second, mean = m.second[block], m.mean[block]
                if m.shared_taps:
                    square = torch.einsum("oit,ij,ojt->o", w, second, w)
                    level = torch.einsum("oit,i->o", w, mean)
                else:
                    square = torch.einsum("on,nm,om->o", w.flatten(1), second, w.flatten(1))
                    level = w.flatten(1) @ mean
                if layer.bias in self._bias:
                    b = self._bias[layer.bias].detach().double().cpu().reshape(layer.blocks, layer.outputs)[block]
                    square = square + 2 * b * level + b * b
                at = of[block] >= 0
                for i, (task, scale) in enumerate(zip(self._tasks, self.scale, strict=True)):
                    cost = (square.clamp_min(0) * m.sensitivity[task][block].diagonal()).numpy() * scale / 2
                    np.add.at(found[:, i], of[block][at], cost[at])
        return found
