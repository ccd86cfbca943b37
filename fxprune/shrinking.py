"""Networks from which channels go step by step, their weights corrected at each: by downdates, not from the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fxprune.calibrations import Moments
from fxprune.coupling import Coupling
from fxprune.eliminating import damped_inverse
from fxprune.layers import channels_of
from fxprune.zeroing import zeros


@dataclass(frozen=True, slots=True)
class Block:
    """One linear map of a layer, of which some inputs are left.

    Attributes:
        at: (n,) which inputs, taps counted where each has its own.
        weight: (n, outputs * copies) corrected for those that have gone.
        inverse: (n, n) of their second moment, damped.
    """

    at: np.ndarray
    weight: torch.Tensor
    inverse: torch.Tensor

    def without(self, gone: np.ndarray, *, inverse: bool) -> Block:
        """Return what is left when inputs go; `inverse` brings that up to date too.

        Args:
            gone: (all inputs,) bool.
            inverse: without it, the result is no start for more.
        """
        flags = gone[self.at]
        if not flags.any():
            return self
        s, k = (torch.from_numpy(np.flatnonzero(f)) for f in (flags, ~flags))
        factor = torch.linalg.cholesky(self.inverse[s[:, None], s])
        across = torch.linalg.solve_triangular(factor, self.inverse[s[:, None], k], upper=False)
        left = torch.linalg.solve_triangular(factor, self.weight[s], upper=False)
        weight = self.weight[k] - across.T @ left
        rest = self.inverse[k[:, None], k] - across.T @ across if inverse else self.inverse
        return Block(self.at[~flags], weight, rest)


@dataclass(frozen=True, slots=True)
class Shrinking:
    """A layer that loses inputs: least squares at every step, as `corrected_weight` has them at once.

    Attributes:
        m: its moments.
        start: (blocks, n, outputs * copies) the weight that is to be made up for.
        blocks: what is left.
    """

    m: Moments
    start: tuple[torch.Tensor, ...]
    blocks: tuple[Block, ...]

    @staticmethod
    def of(m: Moments, weight: torch.Tensor, damping: float) -> Shrinking:
        """Start with a weight as it is.

        Args:
            m: the layer's moments.
            weight: of the dense shape.
            damping: as of `compensate`.
        """
        layer, start, blocks = m.layer, [], []
        maps = weight.detach().double().cpu().reshape(layer.blocks, layer.outputs, layer.inputs, layer.taps)
        for block in range(layer.blocks):
            w = maps[block].permute(1, 2, 0)  # (inputs, taps, outputs)
            w = w.flatten(1) if m.shared_taps else w.reshape(-1, layer.outputs)
            second, mean = m.second[block], m.mean[block]
            if m.absorbs:
                second = second - mean[:, None] * mean
            level = float(second.diagonal().mean()) * damping
            start.append(w)
            blocks.append(Block(np.arange(len(w)), w, damped_inverse(second, level)))
        return Shrinking(m, tuple(start), tuple(blocks))

    def without(self, keep: np.ndarray, *, inverse: bool = True) -> Shrinking:
        """Return the layer when only the inputs `keep` (blocks, inputs) are left; `inverse` as of `Block.without`."""
        each = 1 if self.m.shared_taps else self.m.layer.taps
        left = [b.without(np.repeat(~k, each), inverse=inverse) for b, k in zip(self.blocks, keep, strict=True)]
        return replace(self, blocks=tuple(left))

    def weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight, of the dense shape but one dim for the taps, and the constant missing in each output."""
        layer = self.m.layer
        found = torch.zeros(layer.blocks, layer.outputs, layer.inputs, layer.taps, dtype=torch.float64)
        shift = torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
        for i, (start, block) in enumerate(zip(self.start, self.blocks, strict=True)):
            w = torch.zeros_like(start)
            w[torch.from_numpy(block.at)] = block.weight
            if self.m.absorbs:
                shift[i] = (self.m.mean[i] @ (start - w)).reshape(-1, layer.outputs).sum(0)
            found[i] = w.reshape(layer.inputs, layer.taps, layer.outputs).permute(2, 0, 1)
        return found, shift.ravel()


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A network with fewer channels, as values of its parameters and buffers: nothing is rewritten.

    Attributes:
        keep: (channels,) what is left.
        values: parameters and buffers that differ from the network's: zero where channels went, corrected where they
            were read.
        layers: weight -> the layer, of those that have lost inputs.
    """

    keep: np.ndarray
    values: Mapping[str, torch.Tensor]
    layers: Mapping[str, Shrinking]


class Shrinker:
    """Takes channels out of a network."""

    def __init__(self, coupling: Coupling, moments: Mapping[str, Moments], damping: float) -> None:
        """Look up layers.

        Args:
            coupling: of the network.
            moments: of the layers whose weights are corrected; none for no correction.
            damping: as of `compensate`.
        """
        self.coupling = coupling
        self.state = {name: tensor.detach() for name, tensor, _ in coupling.traced.state}
        self._damping = damping
        known = {name: m for name, m in moments.items() if name in coupling.tensors}
        self._layers = {name: (m, *channels_of(coupling, m.layer)) for name, m in known.items()}
        self._first: dict[str, Shrinking] = {}

    def dense(self) -> Shrunk:
        """Return the network with all channels."""
        return Shrunk(np.ones(self.coupling.num_channels, dtype=bool), {}, {})

    def touched(self, channels: np.ndarray) -> set[str]:
        """Return the parameters and buffers that may change when `channels` (channels,) bool go."""
        gone = np.append(channels, False)
        found = {s.name for s in self.coupling.sites if s.is_parameter and gone[s.channels].any()}
        for m, inputs, _ in self._layers.values():
            if gone[inputs].any() and m.holder[0] is not None:
                found.add(m.holder[0])
        return found

    def without(self, now: Shrunk, keep: np.ndarray, *, trial: bool = False) -> Shrunk:
        """Return the network when only the channels `keep` (channels,) are left.

        Args:
            now: the network so far.
            keep: what is left of it.
            trial: the result is only looked at: no more channels go from it.
        """
        stays, gone = np.append(keep, True), np.append(now.keep & ~keep, False)
        values, layers = dict(now.values), dict(now.layers)
        for site in self.coupling.sites:
            if site.is_parameter and gone[site.channels].any():
                values[site.name] = _masked(values.get(site.name, self.state[site.name]), ~stays[site.channels])
        for name, (m, inputs, outputs) in self._layers.items():
            if not gone[inputs].any():
                continue
            known = layers.get(name) or self._start(name, m)
            layers[name] = known.without(stays[inputs], inverse=not trial)
            weight, shift = layers[name].weight()
            lost, like = ~stays[outputs.ravel()], self.state[name]
            weight = weight.reshape(like.shape).to(like)
            values[name] = _masked(weight, lost.reshape(-1, *[1] * (weight.ndim - 1)))
            holder, sign = m.holder
            if holder is not None:
                value = self.state[holder] + (sign * shift).to(self.state[holder])
                values[holder] = _masked(value, lost)
        return Shrunk(keep, values, layers)

    def take_over(self, state: Mapping[str, torch.Tensor], keep: np.ndarray) -> dict[str, torch.Tensor]:
        """Go on from other weights; return them, zero where channels have gone.

        Args:
            state: all parameters and buffers, of the dense shapes.
            keep: (channels,) what is left.
        """
        values = {**state, **zeros(self.coupling, keep, state)}
        self.state, self._first = values, {}
        return values

    def _start(self, name: str, m: Moments) -> Shrinking:
        """Return a layer that has all its inputs so far."""
        if name not in self._first:
            self._first[name] = Shrinking.of(m, self.state[name], self._damping)
        return self._first[name]


def _masked(value: torch.Tensor, gone: np.ndarray) -> torch.Tensor:
    return value.masked_fill(torch.from_numpy(gone).to(value.device), 0)
