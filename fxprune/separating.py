"""Networks side by side, nothing shared: the baseline of merging."""

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
