"""Criteria: how much each channel matters, as one score per channel. One file each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fxprune.atoms import FIXED
from fxprune.closing import owner
from fxprune.coupling import Coupling, Site
from fxprune.errors import PlanError


def add_up(
    coupling: Coupling,
    sites: list[Site],
    measure: Callable[[str, torch.Tensor, tuple[int, ...]], torch.Tensor | np.ndarray],
) -> np.ndarray:
    """Sum a measure of parameters over the sites of each channel.

    Args:
        coupling: the coupled network.
        sites: which sites count.
        measure: `(name, parameter, dims) -> values` that reduces the parameter over `dims`, keeping them with size 1.

    Returns:
        (channels,) float64.
    """
    state = coupling.traced.by_name
    weights: list[np.ndarray] = []
    channels: list[np.ndarray] = []
    for site in sites:
        value = state[site.name].detach()
        if value.is_meta:
            raise PlanError(f"{site.name!r} is on the meta device, and has no values to score. Load the weights first.")
        reduced = measure(site.name, value, tuple([d for d, n in enumerate(site.channels.shape) if n == 1]))
        if isinstance(reduced, torch.Tensor):
            if reduced.device.type != "cpu" or reduced.dtype not in (torch.float32, torch.float64):
                reduced = reduced.double().cpu()
            reduced = reduced.numpy()
        weights.append(reduced.ravel())
        channels.append(site.channels.ravel())
    if not sites:
        return np.zeros(coupling.num_channels)
    at = np.concatenate(channels)
    at[at == FIXED] = coupling.num_channels
    return np.bincount(at, np.concatenate(weights, dtype=np.float64), coupling.num_channels + 1)[:-1]


def summed(value: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Sum over dims, which keep size 1; over none where there are none (torch would sum over all)."""
    return value.sum(dims, keepdim=True) if dims else value


def weight_sites(coupling: Coupling) -> list[Site]:
    """Return the sites that say most of a channel: those on weights with two dims or more, where it has any."""
    weights = [s for s in coupling.sites if s.is_parameter and s.channels.ndim >= 2]
    vectors = [s for s in coupling.sites if s.is_parameter and s.channels.ndim < 2]
    homes = [owner(s.channels) for s in vectors]
    covered = np.zeros(coupling.num_channels + 1, dtype=bool)
    for site in weights:
        covered[site.channels] = True
    free = {id(channels): not covered[channels].any() for channels in {id(c): c for c in homes}.values()}
    vectors = [s for s, home in zip(vectors, homes, strict=True) if free[id(home)]]
    return weights + vectors
