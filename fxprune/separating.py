"""Networks side by side, nothing shared, or everything that can be: the two ends of merging."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.assigning import Sharing
from fxprune.merging import Merger


@dataclass(frozen=True, slots=True)
class Separate:
    """Share nothing: the merged network returns what the networks return, at the sum of their costs. No data needed."""

    def share_out(self, merger: Merger) -> Sharing:
        """Return parts in which every channel is its own task's."""
        return Sharing(merger.separate())


@dataclass(frozen=True, slots=True)
class Shared:
    """Share every channel that can be: the merged network returns what the networks return. No data needed.

    Every layer is as many times wider as there are networks, with weights of zero from one network to another, which
    count. It is a start for pruning: compiled with `Joint`, channels go that others make up for, whichever network
    these are of, and what is left serves all tasks. Then train it.
    """

    def share_out(self, merger: Merger) -> Sharing:
        """Return parts in which every channel that can be is shared."""
        return Sharing(merger.shared())
