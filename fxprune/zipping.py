"""Multi-task zipping: channels of several networks that do nearly the same become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from fxprune.assigning import DEAD, SHARED, Sharing
from fxprune.errors import PlanError
from fxprune.matching import match
from fxprune.merging import Merger, settled
from fxprune.reading import Reading, Zipped, readings_of
from fxprune.splicing import spliced
from fxprune.splitting import MAP, Splits


@dataclass(frozen=True, slots=True)
class MTZ:
    """Share a part of each layer: merge the channels of all networks that differ least in what they compute.

    Group by group, channel i of network A and j of B with incoming weights w_A and w_B, and second moments H_A and H_B
    of what these read, become one with w = (H_A + H_B)^-1 (H_A w_A + H_B w_B): the least squared error of both,

        d = 1/2 (w_A - w_B)^T (H_A^-1 + H_B^-1)^-1 (w_A - w_B)

    summed over the layers that make the group and read groups that are merged already. The pairs of least error are
    merged, each channel once; a third network is merged with what came of the first two, and so on. Weights are those
    on what is shared in the layer before, made up for what is not, times the scale of the batch norm behind; what that
    or a bias adds is set so that means stay. What transposed convolutions make is each task's own. The merged network
    is to be trained.

    Attributes:
        share: of the channels of each group, from 0 to 1, that all networks share.

    Source: He et al., Multi-Task Zipping (NeurIPS 2018), reconstructed: its formula, on the wiring of `merge`.
    """

    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise PlanError(f"MTZ(share={self.share!r}) is no share. Pass a number from 0 to 1.")

    def share_out(self, merger: Merger) -> Sharing:
        """Return who has which channel, with the weights of what is shared."""
        readings = readings_of(merger)
        zipped = Zipped(merger.splits)
        parts = merger.separate()
        for channels in _groups(merger.splits, readings):
            count = int(self.share * len(channels))
            makers = [maker for r in readings if (maker := r.of(channels, zipped)) is not None]
            if not count or not makers:
                continue
            found = channels[match(makers, count)]
            zipped.add(found)
            parts[np.arange(1, len(parts))[:, None], found[:, 1:].T] = DEAD
            parts[0, found[:, 0]] = SHARED
        zipped.tuples = _that_stay(merger.splits, parts, zipped.tuples)
        return Sharing(parts, spliced(merger, readings, zipped))


def _that_stay(splits: Splits, parts: np.ndarray, tuples: np.ndarray) -> np.ndarray:
    """Return the merged channels that some layer makes of what is shared; others are put apart again, in `parts`."""
    while True:
        lost = settled(splits, parts)[0, tuples[:, 0]] != SHARED
        if not lost.any():
            return tuples
        for t, channels in enumerate(tuples[lost].T):
            parts[t, channels] = t + 1
        tuples = tuples[~lost]


def _groups(splits: Splits, readings: list[Reading]) -> list[np.ndarray]:
    """Return the channels of the groups that can be merged, in the order in which layers make them."""
    made = {}
    for at, reading in enumerate(readings):
        for channel in reading.made if reading.made is not None else ():
            made.setdefault(int(channel), at)
    held = np.zeros(splits.coupling.num_channels, dtype=bool)
    for n in splits.networks[0].graph.nodes:
        if splits.kinds.get(n.name) == MAP and n.name in splits.dims:
            module = splits.networks[0].root.get_submodule(str(n.target))
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                held[splits.dims[n.name][1]] = True
    cells = [g.cells[0] for g in splits.coupling.groups() if len(g.cells) == 1 and g.kind == "channels"]
    free = [c for c in cells if splits.free[c].all() and not held[c].any() and int(c[0]) in made]
    return sorted(free, key=lambda cell: made[int(cell[0])])
