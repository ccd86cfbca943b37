"""Least squares for layers that have lost inputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.calibrations import Moments
from fxprune.coupling import Coupling
from fxprune.eliminating import damped_inverse, damped_solve
from fxprune.layers import channels_of

Inverses = MutableMapping[tuple[str, int], torch.Tensor]
"""(weight, block) -> inverse of the damped moment of all inputs."""
FEW = 4
"""Where at least so many times more inputs stay than go, an inverse that is known says how to correct the weight."""


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
    coupling: Coupling,
    moments: Mapping[str, Moments],
    keep: np.ndarray,
    damping: float,
    among: Container[str],
    inverses: Inverses | None = None,
) -> Iterator[Correction]:
    """Yield what changes in every layer that has lost inputs.

    Args:
        coupling: of the dense network.
        moments: of it.
        keep: (channels + 1,) what stays; the last entry stands for values that are no channel, and is true.
        damping: as in `compensate`.
        among: the weights that are looked at.
        inverses: what is known of layers that lose few of their inputs, for many calls with one `damping`: more is
            added.
    """
    state = coupling.traced.by_name
    for name, m in moments.items():
        if name not in among or name not in coupling.tensors:
            continue
        inputs, outputs = channels_of(coupling, m.layer)
        if keep[inputs].all():
            continue
        weight, shift = corrected_weight(m, state[name].detach(), keep[inputs], damping, inverses)
        holder, sign = m.holder
        yield Correction(name, weight, outputs.ravel(), holder, sign * shift)


def corrected_weight(
    m: Moments, weight: torch.Tensor, keep: np.ndarray, damping: float, inverses: Inverses | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the corrected weight of a layer, of the dense shape, and the constant that is missing in each output.

    Args:
        m: the layer's moments.
        weight: dense.
        keep: (blocks, inputs) which inputs stay.
        damping: as in `compensate`.
        inverses: as in `corrections`.
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
        w = maps[block].permute(1, 2, 0)  # (inputs, taps, outputs)
        w = w.flatten(1) if m.shared_taps else w.reshape(len(flags), layer.outputs)
        known = inverses if FEW * len(gone) <= len(stay) else None
        change = _change(m, int(block), stay, gone, w[r], damping, known)
        if m.absorbs:
            mean = m.mean[block]
            shift[block] = (mean[r] @ w[r] - mean[k] @ change).reshape(-1, layer.outputs).sum(0)
        fixed = w.clone()
        fixed[k] += change
        fixed[r] = 0
        maps[block] = fixed.reshape(layer.inputs, layer.taps, layer.outputs).permute(2, 0, 1)
    return new.to(weight.device), shift.ravel()


def _change(
    m: Moments,
    block: int,
    stay: np.ndarray,
    gone: np.ndarray,
    lost: torch.Tensor,
    damping: float,
    inverses: Inverses | None,
) -> torch.Tensor:
    """Return what is added to the weights that stay, for the `lost` (gone, outputs) ones: (H_KK)^-1 H_KR W_R.

    With P the inverse of all of the damped H, that is -P_KR (P_RR)^-1 W_R.
    """
    second, mean = m.second[block], m.mean[block]
    level = float((second.diagonal() - (mean.square() if m.absorbs else 0)).mean()) * damping
    if inverses is not None:
        key = (m.layer.name, block)
        if key not in inverses:
            inverses[key] = damped_inverse(torch.addr(second, mean, mean, alpha=-1) if m.absorbs else second, level)
        across, own = (_cut(inverses[key], rows, gone) for rows in (stay, gone))
        return -across @ torch.cholesky_solve(lost, torch.linalg.cholesky(own))
    both, across = (_cut(second, stay, columns) for columns in (stay, gone))
    if m.absorbs:
        k, r = mean[torch.from_numpy(stay)], mean[torch.from_numpy(gone)]
        both.addr_(k, k, alpha=-1)
        across.addr_(k, r, alpha=-1)
    return damped_solve(both, level, across @ lost)


def _cut(matrix: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(matrix.numpy()[np.ix_(rows, columns)])
