"""Weight magnitude: the norm of everything that goes with a channel."""

from __future__ import annotations

import numpy as np
import torch

from fxprune.coupling import Coupling
from fxprune.criteria import add_up, weight_sites


def magnitude(coupling: Coupling, p: float = 2.0) -> np.ndarray:
    """Return sum |w|^p over all weights that go with each channel: outputs of its producers, inputs of its consumers.

    Args:
        coupling: the coupled network.
        p: which norm.

    Returns:
        (channels,) scores.

    Source: Li et al., Pruning Filters for Efficient ConvNets (2017), for one layer; Fang et al., DepGraph (2023),
    equation 4, for coupled layers.
    """
    sites = weight_sites(coupling)
    cut = {site.name for site in sites}
    largest = max((t.numel() for name, t, _ in coupling.traced.state if name in cut), default=0)
    latest: dict[str, torch.Tensor] = {}
    room = torch.empty(largest)  # for the powers of one weight at a time; fresh memory for each costs more

    def measure(name: str, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        nonlocal room
        if name not in latest:
            latest.clear()
            weight = weight.abs() if weight.is_complex() else weight
            if (room.dtype, room.device) != (weight.dtype, weight.device):
                room = torch.empty(largest, dtype=weight.dtype, device=weight.device)
            out = room[: weight.numel()].view(weight.shape)
            latest[name] = torch.mul(weight, weight, out=out) if p == 2 else torch.pow(weight.abs(), p, out=out)
        total = latest[name]
        for run in _runs(dims):
            total = total.sum(dim=run, keepdim=True)
        return total

    return add_up(coupling, sites, measure)


def _runs(dims: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Split dims into runs of neighbours: summed one after the other, each is read in memory order."""
    runs: list[tuple[int, ...]] = []
    for d in dims:
        if runs and runs[-1][-1] == d - 1:
            runs[-1] = (*runs[-1], d)
        else:
            runs.append((d,))
    return runs
