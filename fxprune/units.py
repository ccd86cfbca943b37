"""Groups as units of a search: their channels ranked on the weights that are left, and how many of them may go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.criteria import summed
from fxprune.grouping import Group
from fxprune.makers import makers_of
from fxprune.rounding import multiples


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may go of a unit, as prefixes of its path.

    Attributes:
        group: index of the group.
        choices: (steps, choices per step) in which order they go.
        allowed: ascending numbers of steps that respect the constraints; the first is 0.
        levels: how many steps the width that is left has; a ratio is a share of these.
    """

    group: int
    choices: np.ndarray
    allowed: np.ndarray
    levels: int

    def steps(self, ratio: float) -> int:
        """Return how many steps a ratio takes: its share of the levels, rounded down to what is allowed."""
        wanted = int(ratio * self.levels + 1e-9)
        return int(self.allowed[np.searchsorted(self.allowed, wanted, "right") - 1])


class Units:
    """The groups of a coupling, ranked by the weights that make their channels."""

    def __init__(self, coupling: Coupling, constraints: Constraints, norm: int) -> None:
        """Look up which weights make the channels of each group.

        Args:
            coupling: the coupled network.
            constraints: limits on widths; every unit keeps something, whatever they say.
            norm: 1 for absolute values, 2 for squares.
        """
        self.coupling = coupling
        self._constraints = constraints
        self._multiples = multiples(coupling, constraints.multiple_of)
        self._norm = norm
        self._state = coupling.traced.by_name
        self._dims: dict[str, list[tuple[int, np.ndarray]]] = {}
        for site in coupling.sites:
            self._dims.setdefault(site.name, []).append((site.dim, site.channels))
        self._sites = makers_of(coupling)

    def score(self, group: Group, keep: np.ndarray) -> np.ndarray:
        """Return (channels,) scores of a group's choices; infinite where one may not go, or has gone.

        Each weight that makes a channel adds the mean of its |w|^norm over the inputs that are left: for one layer this
        ranks like the sum, for several it is the paper's mean first, then sum.

        Args:
            group: the group.
            keep: (channels,) what is left of the network.
        """
        stays = np.append(keep, True)
        score = np.zeros(len(stays))
        for site in self._sites[group.index]:
            weight = self._state[site.name].detach().abs().double().cpu().pow(self._norm)
            counts = torch.ones_like(weight)
            for dim, channels in self._dims[site.name]:
                if dim != site.dim:
                    counts *= torch.from_numpy(stays[channels]).to(weight)
            dims = tuple(d for d in range(weight.ndim) if site.channels.shape[d] == 1)
            mean = summed(weight * counts, dims) / summed(counts, dims).clamp_min(1)
            np.add.at(score, site.channels.ravel(), mean.numpy().ravel())  # positions that stay add to the last
        score = np.where(keep, score[:-1], 0.0)
        total = self.coupling.members.total(score)
        total[self.coupling.held | ~keep] = np.inf
        return total

    def candidates(self, group: Group, keep: np.ndarray, choices: np.ndarray | None = None) -> Candidates:
        """Return what may go of a group.

        Args:
            group: the group.
            keep: (channels,) what is left of the network.
            choices: (steps, choices per step) another order than that of the scores.
        """
        choices = group.path(self.score(group, keep)) if choices is None else choices
        per_step, width = sum(group.takes), int(keep[group.choices].sum())
        steps = np.arange(len(choices) + 1)
        fits = self._allowed(group, width - per_step * steps)
        fits[0] = True
        return Candidates(group.index, choices, steps[fits], width // per_step)

    def may_have(self, group: Group, keep: np.ndarray) -> bool:
        """Say whether the constraints allow the width that a group has in `keep` (channels,)."""
        return bool(self._allowed(group, keep[group.choices].sum()))

    def _allowed(self, group: Group, width: np.ndarray) -> np.ndarray:
        c = self._constraints
        enough = (width >= max(c.min_width, sum(group.takes))) & (
            group.width - width <= c.max_ratio * group.width + 1e-9
        )
        return enough & ((width % self._multiples[group.index] == 0) | (width == group.width))

    def without(self, keep: np.ndarray, choices: np.ndarray) -> np.ndarray:
        """Return what is left of `keep` (channels,) when choices go, and what follows from them."""
        keep = keep.copy()
        keep[self.coupling.members.of(choices.ravel())[0]] = False
        return self.coupling.settle(keep)
