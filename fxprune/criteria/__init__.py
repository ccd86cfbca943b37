"""Criteria: how much each channel matters, as one score per channel. One file each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fxprune.atoms import FIXED
from fxprune.coupling import Coupling, Site


def add_up(coupling: Coupling, sites: list[Site], measure: Callable[[str, torch.Tensor, tuple[int, ...]], torch.Tensor]) -> np.ndarray:
    """Sum a measure of parameters over the sites of each channel.

    Args:
        coupling: the coupled network.
        sites: which sites count.
        measure: `(name, parameter, dims) -> tensor` that reduces the parameter over `dims`, keeping them with size 1.

    Returns:
        (channels,) float64.
    """
    score = np.zeros(coupling.num_channels + 1)
    module = coupling.traced.root
    for site in sites:
        holder, _, key = site.name.rpartition(".")
        value = getattr(module.get_submodule(holder), key).detach()
        dims = tuple(d for d in range(value.ndim) if site.channels.shape[d] == 1)
        reduced = measure(site.name, value, dims).double().cpu().numpy()
        channels = np.where(site.channels == FIXED, coupling.num_channels, site.channels).ravel()
        score += np.bincount(channels, weights=reduced.ravel(), minlength=len(score))
    return score[:-1]


def weight_sites(coupling: Coupling) -> list[Site]:
    """Return the sites that say most of a channel: those on weights with two dims or more, where it has any."""
    weights = [s for s in coupling.sites if s.is_parameter and s.channels.ndim >= 2]
    covered = np.zeros(coupling.num_channels + 1, dtype=bool)
    for site in weights:
        covered[site.channels] = True
    vectors = [s for s in coupling.sites if s.is_parameter and s.channels.ndim < 2 and not covered[s.channels].any()]
    return weights + vectors
