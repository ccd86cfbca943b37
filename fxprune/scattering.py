"""How the classes of a few labelled samples scatter in the features of every channel: between them, and within each.

The features of a channel are what linear layers and convolutions read of it, after activation and norm: a map is
averaged over a few cells. Where several tensors carry a channel, as along a residual sum, their scatters add up, each
tensor once. A channel that none reads (head dims of queries and keys) counts where it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxprune import sharing
from fxprune.atoms import FIXED
from fxprune.calibrating import samples_in
from fxprune.cloning import names_of
from fxprune.coupling import Coupling
from fxprune.errors import PlanError
from fxprune.functions import as_function
from fxprune.gathering import CONVOLUTIONS
from fxprune.layers import channels_of, layers_of
from fxprune.memberships import LabelReader, Memberships
from fxprune.restoring import restored
from fxprune.shares import Share
from fxprune.subtasks import are_numbers
from fxprune.tasks import NO_BATCHES, Task, evaluating, run_batch

CELLS = 2
"""Into how many cells a map is averaged along each of its dims."""
DENSE_CELLS = 16
"""The same, where labels are of positions: each cell is a row of its own."""
POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True, slots=True)
class Scatter:
    """Diagonals of the two scatter matrices. All arrays: (channels,) float64.

    Attributes:
        between: sum over classes c of n_c |mean_c - mean|^2.
        within: sum over classes and their samples of |x - mean_c|^2.
        seen: which channels were seen at all.
    """

    between: np.ndarray
    within: np.ndarray
    seen: np.ndarray


class Rows:
    """How far each row of a batch's features is of each class: read once for all layers.

    Attributes:
        shares: (classes, rows) float64.
        weight: (classes,) their sum over rows.
        of_any: (rows,) their sum over classes.
    """

    def __init__(self, shares: torch.Tensor) -> None:
        """Take the shares, (rows, classes), on any device."""
        self.shares = shares.cpu().double().T
        self.weight, self.of_any = self.shares.sum(1), self.shares.sum(0)


class ScatterSums:
    """Streamed sums of features by class, from which the scatters follow."""

    def __init__(self, first: torch.Tensor) -> None:
        """Start, with the features (rows, n) of the first batch: their mean is taken off, for accuracy."""
        self._origin = first.double().mean(0)
        self._weight = torch.zeros(0, dtype=torch.float64)
        self._total = torch.zeros(0, first.shape[1], dtype=torch.float64)
        self._squares = torch.zeros(first.shape[1], dtype=torch.float64)

    def add(self, features: torch.Tensor, rows: Rows) -> None:
        """Add rows of features (rows, n), and of which classes they are."""
        x, count = features - self._origin, len(rows.shares)
        more = count - len(self._weight)
        if more > 0:
            self._weight = F.pad(self._weight, (0, more))
            self._total = F.pad(self._total, (0, 0, 0, more))
        self._weight[:count] += rows.weight
        self._total[:count] += rows.shares @ x
        self._squares += rows.of_any @ x.square_()

    def scatters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the between and within scatter of every feature, (n,) each.

        Source: Wang, Ding, Huang: Multi-label linear discriminant analysis (2010), for samples of several classes.
        """
        weight = self._weight.clamp_min(1e-300)[:, None]
        mean = self._total.sum(0) / weight.sum()
        means = self._total / weight
        between = (self._weight[:, None] * (means - mean).square()).sum(0)
        within = self._squares - (self._weight[:, None] * means.square()).sum(0)
        return between, within.clamp_min(0)


def scatter(coupling: Coupling, batches: Iterable[Any], tasks: Mapping[str, Task] | None = None) -> Scatter:
    """Run labelled batches through the dense network, forward only, and return every channel's scatter.

    With several ranks, each passes its own batches, and reads those of all: they are few.

    Args:
        coupling: of the network.
        batches: pairs `(inputs, targets)`; a few samples of each class will do.
        tasks: name -> Task; those with labels count, and add up. Without any, the targets are the labels.

    Raises:
        PlanError: no batches, no labels, or what a layer reads is not finite.
    """
    module, labels = coupling.traced.module, LabelReader(tasks)
    if sharing.size() > 1:
        share = Share.of(batches)
        batches = share.everywhere(share, next(t.device for _, t, _ in coupling.traced.state))
    reader = _Reader(coupling)
    with torch.no_grad(), evaluating(module):
        for batch in batches:
            reader.start(labels.read(batch), samples_in(batch))
            with restored(module), reader:
                run_batch(module, batch, {})
    if not reader.started:
        raise PlanError(NO_BATCHES)
    return reader.result()


class _Reader(TorchFunctionMode):
    """Adds up features at every layer that reads channels, and at those that make channels which none reads."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        module = coupling.traced.module
        self.started = False
        self._names = names_of(module)
        self._count = coupling.num_channels
        self._batch: dict[str, tuple[Memberships, Rows]] = {}
        self._samples = 0
        self._sums: dict[tuple[str, str], ScatterSums] = {}
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        done = np.append(coupling.is_frozen, True)  # of channels that stay anyway nothing is read
        layers = [layer for layer in layers_of(coupling) if layer.name in coupling.tensors]
        for known, side in ((self._inputs, 0), (self._outputs, 1)):
            for layer in layers:
                channels = channels_of(coupling, layer)[side].ravel()
                known[layer.name] = np.where(done[channels], FIXED, channels)
            done[np.concatenate([*known.values(), [FIXED]])] = True
        for known in (self._inputs, self._outputs):
            for name in [name for name, channels in known.items() if (channels == FIXED).all()]:
                del known[name]

    def start(self, batch: dict[str, Memberships], samples: int) -> None:
        """Begin a batch of so many samples."""
        self._batch = {task: (members, Rows(members.of_samples)) for task, members in batch.items()}
        self._samples, self.started = samples, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; read what goes into a layer."""
        out = func(*args, **(kwargs or {}))
        func, args, kwargs = as_function(func, args, kwargs)
        if (func in CONVOLUTIONS or func is F.linear) and args:
            rank = CONVOLUTIONS.get(func, 0)
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._names.get(id(weight), "")
            if name in self._inputs and not hasattr(args[0], "_is_read"):  # or another layer has read the same tensor
                self._read(f"{name}|in", args[0], self._inputs[name], rank)
            if name in self._outputs:
                self._read(f"{name}|out", out, self._outputs[name], rank)
        return out

    def _read(self, where: str, x: torch.Tensor, channels: np.ndarray, rank: int) -> None:
        if x.shape[0] != self._samples or x.ndim < rank + 2:
            return
        x._is_read = True  # pyright: ignore[reportAttributeAccessIssue]
        x = x if rank else x.movedim(-1, 1)
        if FIXED in channels:
            x = x[:, torch.from_numpy(np.flatnonzero(channels != FIXED)).to(x.device)]
        for task, (members, samples) in self._batch.items():
            features, rows = _features(x, members, samples)
            sums = self._sums.get((where, task))
            if sums is None:
                sums = self._sums[where, task] = ScatterSums(features)
            sums.add(features, rows)

    def result(self) -> Scatter:
        """Return the sums over all tensors that carry each channel."""
        between, within = np.zeros(self._count), np.zeros(self._count)
        seen = np.zeros(self._count, dtype=bool)
        for (where, _), sums in self._sums.items():
            name, _, side = where.rpartition("|")
            channels = (self._inputs if side == "in" else self._outputs)[name]
            channels = channels[channels != FIXED]
            seen[channels] = True
            found = sums.scatters()
            _check_finite(found, f"{'into' if side == 'in' else 'out of'} layer {name!r}")
            for total, values in zip((between, within), found, strict=True):
                np.add.at(total, channels, values.numpy().reshape(len(channels), -1).sum(1))
        return Scatter(between, within, seen)


def _check_finite(scatters: tuple[torch.Tensor, torch.Tensor], where: str) -> None:
    wrong = int((~torch.stack(scatters).isfinite().all(0)).sum())
    if wrong:
        raise PlanError(
            f"{wrong} of the {len(scatters[0])} features that go {where} are NaN or infinite on the calibration data, "
            "and no class can be told by them. Leave out the samples that are not finite, or look for the op that "
            "overflows."
        )


def _features(x: torch.Tensor, members: Memberships, samples: Rows) -> tuple[torch.Tensor, Rows]:
    """Return features (rows, channels * cells) of x (b, channels, ..), and what class each row is of.

    A row is a sample; or a cell of it, where labels are of positions.
    """
    space = x.ndim - 2
    dense = space > 0 and members.labels.ndim == space + 1 and are_numbers(members.labels)
    if space == 0 or space not in POOLS:
        return (x.flatten(2).mean(2) if space else x).cpu(), samples
    cells = [min(n, DENSE_CELLS if dense else CELLS) for n in x.shape[2:]]
    pooled = POOLS[space](x, cells).cpu()
    if not dense:
        return pooled.flatten(1), samples
    sizes = (len(x), *cells)
    places = torch.unravel_index(torch.arange(int(np.prod(sizes))), sizes)
    return pooled.movedim(1, -1).flatten(0, -2), Rows(members.at(places, sizes))
