"""Least squares for one layer that has lost inputs."""

from __future__ import annotations

import numpy as np
import torch

from fxprune.calibrating import Moments
from fxprune.eliminating import damped_inverse


def corrected_weight(
    m: Moments, weight: torch.Tensor, keep: np.ndarray, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the corrected weight of a layer, of the dense shape, and the constant that is missing in each output.

    Args:
        m: the layer's moments.
        weight: dense.
        keep: (blocks, inputs) which inputs stay.
        damping: as in `compensate`.
    """
    layer = m.layer
    each = 1 if m.shared_taps else layer.taps
    new = weight.detach().double().cpu().clone()
    maps = new.reshape(layer.blocks, layer.outputs, layer.inputs, layer.taps)
    shift = torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
    for block in np.flatnonzero(~keep.all(axis=1) & keep.any(axis=1)):
        flags = np.repeat(keep[block], each)
        k, r = (torch.from_numpy(np.flatnonzero(f)) for f in (flags, ~flags))
        second, mean = m.second[block], m.mean[block]
        if m.absorbs:
            second = second - mean[:, None] * mean
        w = maps[block].permute(1, 2, 0)  # (inputs, taps, outputs)
        w = w.flatten(1) if m.shared_taps else w.reshape(len(flags), layer.outputs)
        level = second.diagonal().mean() * damping
        inverse = damped_inverse(second[k[:, None], k], float(level))
        change = inverse @ (second[k[:, None], r] @ w[r])
        if m.absorbs:
            shift[block] = (mean[r] @ w[r] - mean[k] @ change).reshape(-1, layer.outputs).sum(0)
        fixed = w.clone()
        fixed[k] += change
        fixed[r] = 0
        maps[block] = fixed.reshape(layer.inputs, layer.taps, layer.outputs).permute(2, 0, 1)
    return new.to(weight.device), shift.ravel()
