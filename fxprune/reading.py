"""What the layers of several networks read of the channels that these share, and what they make of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fxprune.calibrating import calibrate
from fxprune.calibrations import Moments
from fxprune.cloning import named_part
from fxprune.correcting import corrected_weight
from fxprune.coupling import couple
from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError
from fxprune.matching import Maker
from fxprune.merging import Merger
from fxprune.splitting import COMMON, MAP, Splits


class Zipped:
    """Which channels of the networks are one, as far as is known."""

    def __init__(self, splits: Splits) -> None:
        """Know of none."""
        self.tuples = np.empty((0, len(splits.networks)), dtype=np.int64)

    def add(self, tuples: np.ndarray) -> None:
        """Let channels be one: (n, networks), one of each network."""
        self.tuples = np.concatenate([self.tuples, tuples])

    def places(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return where the shared channels are along a dim of each network, in one order: networks x (n,)."""
        starts = np.argsort(labels, kind="stable")
        ordered = labels[starts]
        found = []
        for channels in self.tuples.T:
            first, last = np.searchsorted(ordered, channels, "left"), np.searchsorted(ordered, channels, "right")
            parts = [starts[a:b] for a, b in zip(first, last, strict=True)]
            found.append(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))
        return found


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """What a batch norm does, in float64, by channel: (channels,) each."""

    name: str
    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @property
    def scale(self) -> torch.Tensor:
        """The factor on what comes in."""
        return self.weight / (self.var + self.eps).sqrt()


@dataclass(frozen=True, slots=True)
class Reading:
    """A layer of all networks.

    Attributes:
        layer: name of the module.
        made: the channel of each output in one network, None where outputs are not told apart.
        read: the channel of each input; None where all networks read the same.
        moments: one per network.
        weights: (outputs, inputs, taps) in float64, one per network.
        biases: (outputs,), zero where there is none.
        norms: the batch norm behind the layer, one per network; None where there is none.
    """

    layer: str
    made: np.ndarray | None
    read: np.ndarray | None
    moments: list[Moments]
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    norms: list[BatchNorm] | None

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added."""
        return self.moments[0].layer.bias is not None

    def columns(self, zipped: Zipped) -> list[np.ndarray]:
        """Return the inputs that are shared, in one order: networks x (n,)."""
        if self.read is None:
            return [np.arange(m.layer.inputs) for m in self.moments]
        return zipped.places(self.read)

    def of(self, channels: np.ndarray, zipped: Zipped) -> Maker | None:
        """Return how the layer makes channels of what is shared; None where it does not, or nothing is shared yet."""
        if self.made is None or not np.isin(channels, self.made).any():
            return None
        columns = self.columns(zipped)
        if not len(columns[0]):
            return None
        rows = torch.from_numpy(rows_of(self.made, channels))
        weights = [self.weight(t, columns[t])[rows] * self.scale(t)[rows, None, None] for t in range(len(columns))]
        return Maker(weights, [self.second(t, columns[t]) for t in range(len(columns))])

    def scale(self, t: int) -> torch.Tensor:
        """Return (outputs,) the factor of the batch norm behind the layer."""
        return torch.ones(len(self.weights[t]), dtype=torch.float64) if self.norms is None else self.norms[t].scale

    def weight(self, t: int, columns: np.ndarray) -> torch.Tensor:
        """Return (outputs, copies, n) the weights on some inputs, made up for the others."""
        m = self.moments[t]
        keep = np.zeros((1, m.layer.inputs), dtype=bool)
        keep[0, columns] = True
        full, _ = corrected_weight(m, self.weights[t], keep, DAMPING)
        cut = full[:, torch.from_numpy(columns)]
        return cut.transpose(1, 2) if m.shared_taps else cut.flatten(1)[:, None]

    def second(self, t: int, columns: np.ndarray) -> torch.Tensor:
        """Return (n, n) the moment of some inputs, centred where constants are taken up."""
        m, at = self.moments[t], self._flat(columns)
        second, mean = m.second[0][at[:, None], at], m.mean[0][at]
        return torch.addr(second, mean, mean, alpha=-1) if m.absorbs else second

    def mean(self, t: int, columns: np.ndarray) -> torch.Tensor:
        """Return (n,) the mean of some inputs."""
        return self.moments[t].mean[0][self._flat(columns)]

    def level(self, t: int) -> torch.Tensor:
        """Return (outputs,) the mean of what comes out of the layer."""
        m = self.moments[t]
        flat = self.weights[t].sum(2) if m.shared_taps else self.weights[t].flatten(1)
        return flat @ m.mean[0] + self.biases[t]

    def _flat(self, columns: np.ndarray) -> torch.Tensor:
        each = 1 if self.moments[0].shared_taps else self.moments[0].layer.taps
        return torch.from_numpy((columns[:, None] * each + np.arange(each)).ravel())


def rows_of(made: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Return the row of each channel."""
    order = np.argsort(made, kind="stable")
    return order[np.searchsorted(made[order], channels)]


def readings_of(merger: Merger) -> list[Reading]:
    """Return the layers of the networks, in the order of the graph, that moments can be gathered of.

    Raises:
        PlanError: there is no calibration data.
    """
    if not merger.batches:
        raise PlanError("this method reads data. Pass `calibration=` batches `(inputs, targets)`.")
    splits = merger.splits
    seen = [calibrate(couple(traced), merger.batches).moments for traced in splits.networks]
    found = []
    for n in splits.networks[0].graph.nodes:
        name = f"{n.target}.weight"
        if splits.kinds.get(n.name) != MAP or name not in seen[0]:
            continue
        source = n.all_input_nodes[0].name
        if splits.kinds[source] != COMMON and source not in splits.dims:
            continue  # it reads what each network has its own of
        modules = [named_part(t.root, str(n.target)) for t in splits.networks]
        made = splits.dims.get(n.name)
        found.append(
            Reading(
                str(n.target),
                None if made is None else made[1],
                None if source not in splits.dims else splits.dims[source][1],
                [moments[name] for moments in seen],
                [m.weight.detach().double().cpu().flatten(2) if m.weight.ndim > 2
                 else m.weight.detach().double().cpu()[:, :, None] for m in modules],
                [_float64(m.bias, len(m.weight), 0.0) for m in modules],
                _norms(merger, seen[0][name].norm),
            )
        )  # fmt: skip
    return found


def _norms(merger: Merger, running_mean: str | None) -> list[BatchNorm] | None:
    if running_mean is None:
        return None
    name = running_mean.rpartition(".")[0]
    found = []
    for traced in merger.splits.networks:
        m = named_part(traced.root, name)
        if not isinstance(m, nn.modules.batchnorm._BatchNorm):
            return None
        count, mean, var = m.num_features, m.running_mean, m.running_var
        weight, bias = _float64(m.weight, count, 1.0), _float64(m.bias, count, 0.0)
        found.append(BatchNorm(name, _float64(mean, count, 0.0), _float64(var, count, 1.0), weight, bias, m.eps))
    return found


def _float64(value: torch.Tensor | None, count: int, fill: float) -> torch.Tensor:
    return torch.full((count,), fill, dtype=torch.float64) if value is None else value.detach().double().cpu()
