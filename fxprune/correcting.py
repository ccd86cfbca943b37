"""Least squares for layers that have lost inputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.calibrating import Moments
from fxprune.coupling import Coupling
from fxprune.eliminating import damped_solve
from fxprune.layers import channels_of


@dataclass(frozen=True, slots=True)
class Correction:
    """What changes in a layer that has lost inputs.

    Attributes:
        name: of the weight.
        weight: corrected, of the dense shape.
        outputs: (outputs,) channels of its outputs.
        holder: the bias or running mean that takes up the constants; None where nothing does.
        shift: (outputs,) what is added to the holder.
    """

    name: str
    weight: torch.Tensor
    outputs: np.ndarray
    holder: str | None
    shift: torch.Tensor


def corrections(
    coupling: Coupling, moments: Mapping[str, Moments], keep: np.ndarray, damping: float, among: Container[str]
) -> Iterator[Correction]:
    """Yield what changes in every layer that has lost inputs.

    Args:
        coupling: of the dense network.
        moments: of it.
        keep: (channels + 1,) what stays; the last entry stands for values that are no channel, and is true.
        damping: as in `compensate`.
        among: the weights that are looked at.
    """
    state = {name: tensor for name, tensor, _ in coupling.traced.state}
    for name, m in moments.items():
        if name not in among or name not in coupling.tensors:
            continue
        inputs, outputs = channels_of(coupling, m.layer)
        if keep[inputs].all():
            continue
        weight, shift = corrected_weight(m, state[name].detach(), keep[inputs], damping)
        holder, sign = (m.layer.bias, 1) if m.layer.bias is not None else (m.norm, -1)
        yield Correction(name, weight, outputs.ravel(), holder, sign * shift)


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
        stay, gone = np.flatnonzero(flags), np.flatnonzero(~flags)
        k, r = torch.from_numpy(stay), torch.from_numpy(gone)
        second, mean = m.second[block], m.mean[block]
        both, across = (torch.from_numpy(second.numpy()[np.ix_(stay, to)]) for to in (stay, gone))
        spread = second.diagonal()
        if m.absorbs:
            both, across = both.addr_(mean[k], mean[k], alpha=-1), across.addr_(mean[k], mean[r], alpha=-1)
            spread = spread - mean.square()
        w = maps[block].permute(1, 2, 0)  # (inputs, taps, outputs)
        w = w.flatten(1) if m.shared_taps else w.reshape(len(flags), layer.outputs)
        change = damped_solve(both, float(spread.mean()) * damping, across @ w[r])
        if m.absorbs:
            shift[block] = (mean[r] @ w[r] - mean[k] @ change).reshape(-1, layer.outputs).sum(0)
        fixed = w.clone()
        fixed[k] += change
        fixed[r] = 0
        maps[block] = fixed.reshape(layer.inputs, layer.taps, layer.outputs).permute(2, 0, 1)
    return new.to(weight.device), shift.ravel()
