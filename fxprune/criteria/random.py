"""Random scores: the baseline every criterion must beat."""

from __future__ import annotations

import numpy as np

from fxprune.coupling import Coupling


def random(coupling: Coupling, seed: int = 0) -> np.ndarray:
    """Return uniform scores in [0, 1), the same on every machine for the same seed: (channels,)."""
    return np.random.default_rng(seed).random(coupling.num_channels)
