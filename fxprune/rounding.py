"""Widths that hardware likes: which number the width of each group is a multiple of."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fxprune.constraining import matching, names
from fxprune.coupling import Coupling
from fxprune.makers import makers_of


def multiples(coupling: Coupling, asked: int | Mapping[str, int]) -> np.ndarray:
    """Return (groups,) what the width of each group is to be a multiple of.

    Args:
        coupling: the coupled network.
        asked: one number for all, or patterns of layer names with numbers: of the patterns that match a layer the last
            one counts, and a group has the least common multiple over the layers that make it.

    Raises:
        PlanError: a pattern matches no layer.
    """
    if not isinstance(asked, Mapping):
        return np.full(len(coupling.groups()), asked)
    later_first = list(asked)[::-1]
    for pattern in asked:
        matching(coupling.traced.graph, pattern, "multiple_of")

    def number(layer: str) -> int:
        return next((asked[pattern] for pattern in later_first if names(pattern, layer)), 1)

    return np.array(
        [math.lcm(*(number(site.name.rpartition(".")[0]) for site in sites)) for sites in makers_of(coupling)],
        dtype=np.int64,
    )
