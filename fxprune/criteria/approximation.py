"""Which channels of a group linear combinations of the others give best: their filters, or what comes out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch

from fxprune.approximating import Dictionary, backward, errors_along, forward
from fxprune.calibrations import Calibration
from fxprune.coupling import Coupling, Site
from fxprune.errors import PlanError
from fxprune.grouping import Group
from fxprune.layers import channels_of, layers_of
from fxprune.makers import makers_of
from fxprune.paths import RemovalPath

Source = Literal["filters", "activations"]
Search = Literal["omp", "backward"]


class Approximator:
    """Finds removal paths of groups by sparse approximation.

    On filters, a channel is the vector of all weights that make it. Where several layers make it (a residual stream),
    their filters are stacked: coefficients have to serve all of them. Filters of different groups of a convolution read
    different inputs, and cannot stand for each other. On activations, a channel is what the calibration data put into
    it, at all positions, once for each layer that reads it; errors of these layers add up, as shares.
    """

    def __init__(self, coupling: Coupling, calibration: Calibration | None, *, on: Source, search: Search) -> None:
        """Look up weights and moments.

        Args:
            coupling: the coupled network.
            calibration: what was gathered on it, for activations.
            on: "filters" or "activations".
            search: "omp" or "backward".

        Raises:
            PlanError: activations without moments.
        """
        self.coupling = coupling
        self._search = search
        self._state = coupling.traced.by_name
        self._makers = makers_of(coupling)
        self._dims: dict[str, list[tuple[int, np.ndarray]]] = {}
        for site in coupling.sites:
            self._dims.setdefault(site.name, []).append((site.dim, site.channels))
        self._blocks = {layer.name: layer.blocks for layer in layers_of(coupling)}
        self._read: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []
        if on == "activations":
            if calibration is None or not calibration.moments:
                raise PlanError('the activations need moments. Pass `calibration=batches`, or `on="filters"`.')
            self._read = list(_second_moments(coupling, calibration))

    def path(self, group: Group, keep: np.ndarray) -> RemovalPath:
        """Return the removal path of what is left of a group; errors are shares of its squared size.

        Args:
            group: the group.
            keep: (channels,) what is left of the network.
        """
        choices, choice_of, cells = self._choices(group, keep)
        dictionaries = self.dictionaries(group, keep)
        if self._search == "backward":
            found = backward(dictionaries, cells, group.takes)
            return RemovalPath(group.index, choices[found.order], found.errors[:, None], group.takes)
        order = group.path(self._ranks(choices, cells, dictionaries, len(keep)))
        errors = errors_along(dictionaries, choice_of[order])
        return RemovalPath(group.index, order, errors[:, None], group.takes)

    def next(self, group: Group, keep: np.ndarray, values: Mapping[str, torch.Tensor], steps: int) -> np.ndarray:
        """Return (steps, choices per step) the beginning of that path, on weights that may have changed.

        Args:
            group: the group.
            keep: (channels,) what is left of the network.
            values: parameters that have changed.
            steps: how many steps at most.
        """
        choices, _, cells = self._choices(group, keep)
        dictionaries = self.dictionaries(group, keep, values)
        if self._search == "backward":
            return choices[backward(dictionaries, cells, group.takes, steps).order]
        return group.path(self._ranks(choices, cells, dictionaries, len(keep)))[:steps]

    def _ranks(
        self, choices: np.ndarray, cells: list[np.ndarray], dictionaries: list[Dictionary], count: int
    ) -> np.ndarray:
        """Return (channels,) scores by which what orthogonal matching pursuit takes in last goes first."""
        free, ranks = np.concatenate(cells), np.full(count, np.inf)
        ranks[choices[forward(dictionaries, free)]] = -np.arange(len(free))
        return ranks

    def dictionaries(
        self, group: Group, keep: np.ndarray, values: Mapping[str, torch.Tensor] | None = None
    ) -> list[Dictionary]:
        """Return what the channels of a group are approximated in; choices are numbered as in the group's cells."""
        _, choice_of, _ = self._choices(group, keep)
        stays = np.append(keep, True)
        read = list(self._activations(choice_of, stays))
        return read or [self._filters(group, choice_of, stays, values or {})]

    def _choices(self, group: Group, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return the choices of a group, (channels + 1,) the number of that each channel goes with, and the cells."""
        choices = group.choices
        return choices, self.coupling.choice_of(group), group.places((keep & ~self.coupling.held)[choices])

    def _activations(self, choice_of: np.ndarray, stays: np.ndarray) -> Iterator[Dictionary]:
        for second, inputs, outputs in self._read:
            made = choice_of[outputs]
            only = made[0] if (made == made[0]).all() else -1
            reads = np.where(stays[inputs], choice_of[inputs], -1)
            reads = np.where(reads == only, -1, reads)  # what goes along with all that is made of it
            if (reads >= 0).any() and stays[outputs].any():
                at = torch.from_numpy(np.flatnonzero(stays[inputs]))
                yield Dictionary(second[at[:, None], at], reads[at.numpy()])

    def _filters(
        self, group: Group, choice_of: np.ndarray, stays: np.ndarray, values: Mapping[str, torch.Tensor]
    ) -> Dictionary:
        channels = np.flatnonzero((choice_of[:-1] >= 0) & stays[:-1])
        place = np.full(len(choice_of), -1)
        place[channels] = np.arange(len(channels))
        gram = torch.zeros(len(channels), len(channels), dtype=torch.float64)
        for site in self._makers[group.index]:
            weight = values.get(site.name, self._state[site.name]).detach().double().cpu()
            for dim, others in self._dims[site.name]:
                if dim != site.dim:
                    weight = weight * torch.from_numpy(stays[others]).to(weight)
            _add_filters(gram, weight, site, place, self._blocks.get(site.name))
        return Dictionary(gram, choice_of[channels])


def _add_filters(gram: torch.Tensor, weight: torch.Tensor, site: Site, place: np.ndarray, blocks: int | None) -> None:
    """Add the inner products of a weight's filters to those of the channels that they make, (channels, channels)."""
    size = weight.shape[site.dim]
    diagonal = gram.diagonal().numpy()
    if site.channels.size != size or (blocks is None and weight.ndim > 2 and weight.shape[1] == 1):  # each by itself
        at = place[np.broadcast_to(site.channels, weight.shape)]
        np.add.at(diagonal, at[at >= 0], weight.square().numpy()[at >= 0])
        return
    rows = weight.movedim(site.dim, 0).flatten(1)
    places = place[site.channels.ravel()]
    seen = np.zeros(len(diagonal) + 1, dtype=np.int64)
    copies = np.zeros(size, dtype=np.int64)
    for i, at in enumerate(places):  # of a channel with several filters, the first go with the first of the others
        copies[i] = seen[at]
        seen[at] += 1
    block = np.arange(size) * (blocks or 1) // size
    key = np.where(places >= 0, copies * (blocks or 1) + block, -1)
    for each in np.unique(key[key >= 0]):
        here = np.flatnonzero(key == each)
        at, some = torch.from_numpy(places[here]), rows[torch.from_numpy(here)]
        gram[at[:, None], at] += some @ some.T


def _second_moments(
    coupling: Coupling, calibration: Calibration
) -> Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]:
    """Yield, for each map of each layer, the moment of its inputs and the channels that go in and come out.

    The moment, (inputs, inputs), is the mean over the taps of the kernel; where the layer takes up constants, it is
    about the mean.
    """
    for name, m in calibration.moments.items():
        if name not in coupling.tensors:
            continue
        into, out = channels_of(coupling, m.layer)
        for block in range(m.layer.blocks):
            second, mean = m.second[block], m.mean[block]
            if m.absorbs:
                second = second - mean[:, None] * mean
            if not m.shared_taps:
                second = second.reshape(m.layer.inputs, m.layer.taps, m.layer.inputs, m.layer.taps)
                second = second.diagonal(dim1=1, dim2=3).mean(-1)
            yield second, into[block], out[block]
