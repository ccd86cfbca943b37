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

    def measure(name: str, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        norm = torch.linalg.vector_norm(weight, ord=p, dim=dims, keepdim=True) if dims else weight.abs()
        return norm.double() ** p

    return add_up(coupling, weight_sites(coupling), measure)
