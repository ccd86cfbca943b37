"""Moments without data: what weights and batch-norm statistics let one assume."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fxprune.calibrating import OUTPUTS
from fxprune.calibrations import Calibration, Moments
from fxprune.coupling import Coupling
from fxprune.layers import channels_of, fingerprint_of, layers_of
from fxprune.sums import Layer


def assume(coupling: Coupling) -> Calibration:
    """Return moments that need no data: the network is only run once, on the example inputs, to see its layers.

    A channel that comes out of batch norms is taken to be normal, with their shifts added up for its mean and their
    squared scales for its variance, and to pass a ReLU; any other has mean 0 and variance 1. Channels and taps are
    taken to be uncorrelated, and a layer to be worth as much as any other: errors are shares of its output's energy.

    Args:
        coupling: of the network.

    Source: the moments of a rectified normal, as Nagel et al., Data-Free Quantization (2019), appendix C, use them.
    """
    mean, square = _channel_moments(coupling)
    state = coupling.traced.by_name
    moments = {}
    for layer in layers_of(coupling):
        if layer.name in coupling.tensors:
            moments[layer.name] = _moments(coupling, layer, state[layer.name], mean, square)
    return Calibration(moments, {}, {OUTPUTS: 1.0}, 0, fingerprint_of(coupling))


def _channel_moments(coupling: Coupling) -> tuple[np.ndarray, np.ndarray]:
    """Return (channels + 1,) E[x] and E[x^2] of every channel; the last is that of positions without one."""
    total, variance = np.zeros(coupling.num_channels + 1), np.zeros(coupling.num_channels + 1)
    known = np.zeros(coupling.num_channels + 1, dtype=bool)
    state = coupling.traced.by_name
    for path, module in coupling.traced.root.named_modules():
        name = f"{path}.weight"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name in coupling.tensors:
            ids = coupling.tensors[name][1][0]
            if ids is not None:
                at = ids.ravel()
                total[at] += state[f"{path}.bias"].detach().double().cpu().numpy()
                variance[at] += state[name].detach().double().square().cpu().numpy()
                known[at] = True
    known[-1] = False
    spread = np.sqrt(np.maximum(variance, 1e-24))
    z = torch.from_numpy(total / spread)
    below = torch.special.ndtr(z).numpy()
    density = np.exp(-0.5 * z.numpy() ** 2) / np.sqrt(2 * np.pi)
    mean = total * below + spread * density
    square = (total**2 + variance) * below + total * spread * density
    return np.where(known, mean, 0.0), np.where(known, square, 1.0)


def _moments(coupling: Coupling, layer: Layer, weight: torch.Tensor, mean: np.ndarray, square: np.ndarray) -> Moments:
    inputs, _ = channels_of(coupling, layer)
    first = torch.from_numpy(mean[inputs]).repeat_interleave(layer.taps, 1)
    spread = torch.from_numpy(square[inputs] - mean[inputs] ** 2).repeat_interleave(layer.taps, 1)
    second = torch.diag_embed(spread) + first[:, :, None] * first[:, None]
    w = weight.detach().double().cpu().reshape(layer.blocks, layer.outputs, -1)
    energy = (w.square() * spread[:, None]).sum().clamp_min(1e-30)
    metric = torch.eye(layer.outputs, dtype=torch.float64).expand(layer.blocks, -1, -1) * (2 / energy)
    return Moments(layer, False, second, first, {OUTPUTS: metric}, None)
