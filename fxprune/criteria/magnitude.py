"""Weight magnitude: the norm of everything that goes with a channel."""

from __future__ import annotations

import math

import numpy as np
import torch

from fxprune.coupling import Coupling
from fxprune.criteria import add_up, summed, weight_sites


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

    def measure(name: str, weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor | np.ndarray:
        if p == 2 and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            return _sum_of_squares(weight.numpy(), dims)
        return summed(weight.abs().pow(p), dims)

    return add_up(coupling, weight_sites(coupling), measure)


def _sum_of_squares(weight: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """Sum squares over dims, which keep size 1; no squares are written down, which costs more than to sum them."""
    shape, ndim = weight.shape, weight.ndim
    kept = [d for d in range(ndim) if d not in dims]
    lead, tail = (kept[0], kept[-1] + 1) if kept else (ndim, 0)
    if lead:
        flat = weight.reshape(math.prod(shape[:lead]), math.prod(shape[lead:]))
        total = np.einsum("ij,ij->j", flat, flat).reshape((1,) * lead + shape[lead:])
    else:
        flat = weight.reshape(math.prod(shape[:tail]), math.prod(shape[tail:]))
        total = np.einsum("ij,ij->i", flat, flat).reshape(shape[:tail] + (1,) * (ndim - tail))
    left = tuple(d for d in dims if total.shape[d] > 1)
    return total.sum(axis=left, keepdims=True) if left else total
