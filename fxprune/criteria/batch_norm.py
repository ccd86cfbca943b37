"""Batch-norm scale: how much of a channel its normalisation lets through."""

from __future__ import annotations

import numpy as np
import torch

from fxprune.coupling import Coupling
from fxprune.criteria import add_up
from fxprune.criteria.magnitude import magnitude


def batch_norm_scale(coupling: Coupling) -> np.ndarray:
    """Return sum |gamma| over the batch norms of each channel; channels without one are ranked by weight magnitude.

    A group ranks its channels only against each other, and its channels have the same sites, so the two scales never
    meet inside a group.

    Returns:
        (channels,) scores.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming (2017), section 3.
    """
    module = coupling.traced.root
    scales = {
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm) and child.weight is not None
    }
    sites = [s for s in coupling.sites if s.name in scales]
    score = add_up(coupling, sites, lambda name, gamma, dims: gamma.abs())
    covered = np.zeros(coupling.num_channels + 1, dtype=bool)
    for site in sites:
        covered[site.channels] = True
    return np.where(covered[:-1], score, magnitude(coupling))
