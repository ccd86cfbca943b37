"""What the search of HBGS and HBGTS goes through: offers, networks that have taken some, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxprune.shrinking import Shrunk


@dataclass(frozen=True, slots=True)
class Offer:
    """What a group would give up next.

    Attributes:
        group: its index.
        choices: that would go; none where its neighbours have changed, and it has to say again.
        error: of the network without them, or of its layers.
        rise: by how much that is more than the error of the network at the time: of squares, where these add up.
        round: in which it was measured.
    """

    group: int
    choices: tuple[int, ...]
    error: float
    rise: float
    round: int


@dataclass(frozen=True, slots=True)
class Branch:
    """A network of the beam.

    Attributes:
        now: what is left of it.
        error: of it, when it was committed.
        offers: group -> what it offers, as far as known; None where it has nothing to give.
        commits: (group, choices, error) of each round.
    """

    now: Shrunk
    error: float
    offers: Mapping[int, Offer | None]
    commits: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found.

    Attributes:
        keep: (channels,) what to keep.
        error: of the last commit: of the network, or of the layers that read the group.
        commits: (group, channels, error) of each round.
        evaluations: how often an offer was measured, by this rank.
        forwards: what these measurements cost, in runs of the whole dense network on all batches, by its
            multiply-accumulates.
        published: how many such runs the published search would have taken: one for each offer in each round.
        weights: parameters and buffers that were trained between rounds, of the dense shapes; None without.
    """

    keep: np.ndarray
    error: float
    commits: tuple[tuple[int, int, float], ...]
    evaluations: int
    forwards: float
    published: int
    weights: Mapping[str, torch.Tensor] | None = None


def written(branch: Branch) -> dict[str, Any]:
    """Return a network of the beam as JSON."""
    fields = ("group", "choices", "error", "rise", "round")
    return {
        "gone": np.flatnonzero(~branch.now.keep).tolist(),
        "error": branch.error,
        "offers": {
            str(i): None if o is None else {name: getattr(o, name) for name in fields} for i, o in branch.offers.items()
        },
        "commits": branch.commits,
    }
