"""Sums over the calibration data: what a layer reads and answers to, and what a batch norm normalises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fxprune import sharing


@dataclass(frozen=True, slots=True)
class Layer:
    """How a weight is used: as `blocks` linear maps side by side, each from `inputs` numbers to `outputs`.

    Attributes:
        name: of the weight.
        blocks: groups of a grouped convolution, else 1.
        inputs: channels that go into each.
        outputs: channels that come out of each.
        taps: kernel positions; a linear layer has one.
        bias: name of the bias that is added, if one is.
    """

    name: str
    blocks: int
    inputs: int
    outputs: int
    taps: int
    bias: str | None


@dataclass(slots=True)
class Sums:
    """Sums over positions; every field is added to batch by batch.

    Attributes:
        layer: whose.
        rows: how many positions were read.
        inputs: (blocks, n, n) sum of x x^T over positions, n = inputs * taps, or inputs where taps share one.
        total: (blocks, n) sum of x.
        outputs: task -> (blocks, outputs, outputs) sum of g g^T, g the gradient of one sample's loss at one position.
        norm: running mean of the batch norm that what comes out goes straight into, if it does.
    """

    layer: Layer
    shared_taps: bool
    rows: int = 0
    inputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    total: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    norm: str | None = None


@dataclass(slots=True)
class Spread:
    """Sums over the values of every channel that a batch norm reads: how many, their sum, and that of squares."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        """Add values (b, channels, ..)."""
        x = x.detach().double().transpose(0, 1).flatten(1)
        self.count += x.shape[1]
        self.total = self.total + x.sum(1).cpu()
        self.squares = self.squares + x.square().sum(1).cpu()

    @property
    def mean(self) -> torch.Tensor:
        """(channels,) float64."""
        return self.total / self.count

    @property
    def var(self) -> torch.Tensor:
        """(channels,) float64, of the whole population."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


def sums_of_all(mine: Mapping[str, Sums]) -> dict[str, Sums]:
    """Return what all ranks have summed at each weight, added up in place."""
    if sharing.size() == 1:
        return dict(mine)
    tensors: dict[tuple[str, str, str], torch.Tensor] = {}
    for name, sums in mine.items():
        tensors |= {(name, "inputs", ""): sums.inputs, (name, "total", ""): sums.total}
        tensors |= {(name, "outputs", task): value for task, value in sums.outputs.items()}
    parts = sharing.gather("layers", {n: (s.layer, s.shared_taps, s.rows, s.norm) for n, s in mine.items()})
    found: dict[str, Sums] = {}
    for part in parts:
        for name, (layer, shared_taps, rows, norm) in part.items():
            found.setdefault(name, Sums(layer, shared_taps, norm=norm)).rows += rows
    for (name, which, task), value in sharing.total("moments", tensors).items():
        if which == "outputs":
            found[name].outputs[task] = value
        else:
            setattr(found[name], which, value)
    return found


def spreads_of_all(mine: Mapping[str, Spread]) -> dict[str, Spread]:
    """Return what all ranks have summed at each batch norm, added up."""
    if sharing.size() == 1:
        return dict(mine)
    found: dict[str, Spread] = {}
    for part in sharing.gather("batch norms", {name: spread.count for name, spread in mine.items()}):
        for name, count in part.items():
            found.setdefault(name, Spread()).count += count
    tensors = {(name, "total"): spread.total for name, spread in mine.items()}
    tensors |= {(name, "squares"): spread.squares for name, spread in mine.items()}
    for (name, which), value in sharing.total("batch norms", tensors).items():
        setattr(found[name], which, value)
    return found
