"""What a choice of channels really costs each task: the loss of the network without them, its weights corrected.

Channels that go are set to zero, which is the network without them, and costs least to run. Not so where a zero is not
nothing: a layer norm takes its mean and variance over the channels that are left, a weight norm divides by what is
left of a row. Such networks are rewritten for every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxprune import sharing
from fxprune.calibrating import samples_in
from fxprune.calibrations import Calibration
from fxprune.correcting import Inverses, corrections
from fxprune.coupling import Coupling
from fxprune.errors import PlanError, RewriteError
from fxprune.paths import RemovalPath
from fxprune.replaying import Replay, Replayer
from fxprune.shares import Share
from fxprune.tasks import NO_BATCHES, evaluating, inputs_of, running_on
from fxprune.zeroing import zeros, zeros_suffice

SHARES = (0.25, 0.5, 0.75, 0.9)
"""After which shares of its path a group's loss is measured."""


class Probe:
    """Measures losses of the network with fewer channels; the network is not changed."""

    def __init__(
        self,
        coupling: Coupling,
        calibration: Calibration,
        *,
        samples: int | None = None,
        damping: float,
        compensate: bool,
        batches: Iterable[Any] | None = None,
    ) -> None:
        """Prepare.

        Args:
            coupling: of the network.
            calibration: of it, with its batches. Without tasks, the squared change of the outputs, relative to their
                size, is the loss.
            samples: how many are measured on, if there are so many: the first of all ranks, which each of them holds,
                so that each can measure by itself. Without it, all samples are, and each rank measures on its own.
            damping: as for `compensate`.
            compensate: correct the weights that stay.
            batches: of this rank, to measure on, instead of the calibration's own.

        Raises:
            PlanError: no rank has a batch, or one is empty.
        """
        self.coupling = coupling
        self._calibration = calibration
        self._tasks = calibration.tasks
        self._damping = damping
        self._compensate = compensate
        self._module = coupling.traced.module
        self._state = coupling.traced.by_name
        given = calibration.batches if batches is None else batches
        share = Share.of(() if given is None else given)
        device = next((t.device for t in self._state.values()), torch.device("cpu"))
        self._batches = list(share if samples is None else _first(share, samples, device))
        self._share = share if samples is None else None
        self._answers = [self._full({}, i) for i in range(len(self._batches))]
        self._slopes: list[list[list[torch.Tensor | None]]] = []
        self._replayer = Replayer(self._module)
        self._replays: list[Replay] = []
        self._inverses: Inverses | None = None
        self._zeros_suffice: bool | None = None
        self.dense = self.losses(np.ones(coupling.num_channels, dtype=bool))
        """(tasks,) of the dense network."""

    def losses(self, keep: np.ndarray) -> np.ndarray:
        """Return (tasks,) mean losses of the network that keeps the channels `keep` (channels,)."""
        return self._means(keep, self._full, self._of_batch)

    def rises(self, keep: np.ndarray) -> np.ndarray:
        """Return (tasks,) how much the losses rise, relative, less what follows from their slope in the outputs.

        That part is noise: over many samples a trained network has none left. What remains is never below zero for a
        loss that is convex in the outputs, and a few dozen samples tell it.

        The network only runs from the first node on that a change reaches, if what was asked before was not later.
        """
        if not self._replays:
            self._replays = [Replay(self._replayer, batch) for batch in self._batches]
            self._inverses = {}
        if not self._tasks:
            return self._means(keep, self._replayed, self._of_batch)
        if not self._slopes:
            self._slopes = [self._slopes_of(i) for i in range(len(self._batches))]

        def rise(i: int, outputs: Any) -> list[float]:
            moved = [
                a.double() - b.double() for a, b in zip(_tensors(outputs), _tensors(self._answers[i]), strict=True)
            ]
            found = []
            after, before = self._of_batch(i, outputs), self._of_batch(i, self._answers[i])
            for slopes, new, old in zip(self._slopes[i], after, before, strict=True):
                along = sum(float((g.double() * d).sum()) for g, d in zip(slopes, moved, strict=True) if g is not None)
                found.append(new - old - along)
            return found

        return self._means(keep, self._replayed, rise) / np.maximum(np.abs(self.dense), 1e-12)

    def place(self, keep: np.ndarray) -> int:
        """Say how early `rises` has to begin for the channels `keep`: to ask in this order costs least."""
        gone = np.append(~keep, False)
        names = {s.name for s in self.coupling.sites if s.is_parameter and gone[s.channels].any()}
        return self._replayer.first_reader(names)

    def _means(
        self,
        keep: np.ndarray,
        run: Callable[[Mapping[str, torch.Tensor], int], Any],
        measure: Callable[[int, Any], list[float]],
    ) -> np.ndarray:
        """Return the mean over samples of a measure of the outputs of each batch."""
        slim = None if keep.all() or self._zeros_do() else self._rewritten(keep)
        values = {} if keep.all() or slim is not None else self._values(np.append(keep, True))
        each = []
        for i, batch in enumerate(self._batches):
            outputs = run(values, i) if slim is None else _run(slim, batch)
            each.append((np.array(measure(i, outputs)), samples_in(batch)))
        if self._share is not None:
            each = self._share.in_order("losses", each)
        if not each:
            raise PlanError(NO_BATCHES)
        total, count = np.zeros(len(self._tasks or [None])), 0
        for found, samples in each:
            total += found * samples
            count += samples
        return total / count

    def _of_batch(self, i: int, outputs: Any) -> list[float]:
        if not self._tasks:
            return [_change(outputs, self._answers[i])]
        with torch.no_grad():
            return [float(task(outputs, self._batches[i])) for task in self._tasks.values()]

    def _slopes_of(self, i: int) -> list[list[torch.Tensor | None]]:
        """Return the gradients of each task's loss in the outputs of a batch."""
        leaves, spec = pytree.tree_flatten(self._answers[i])
        leaves = [t.detach().requires_grad_() if _is_value(t) else t for t in leaves]
        outputs = pytree.tree_unflatten(leaves, spec)
        found = []
        with torch.enable_grad():
            for task in (self._tasks or {}).values():
                loss, values = task(outputs, self._batches[i]), [t for t in leaves if _is_value(t)]
                found.append(list(torch.autograd.grad(loss, values, allow_unused=True)))
        return found

    def _replayed(self, values: Mapping[str, torch.Tensor], i: int) -> Any:
        return self._replays[i].outputs(values)

    def _zeros_do(self) -> bool:
        """Say whether zeros in place of channels make the network that rewriting makes, as tried out once."""
        if self._zeros_suffice is None:
            self._zeros_suffice = not self._batches or zeros_suffice(self.coupling, self._batches[0])
        return self._zeros_suffice

    def _rewritten(self, keep: np.ndarray) -> torch.nn.Module | None:
        """Return the network of some channels; None where nothing is left of a dim, or a size cannot be rewritten."""
        from fxprune.compensating import correct  # these read plans, and plans are made by methods
        from fxprune.planning import plan_of
        from fxprune.rewriting import rewrite

        try:
            plan = plan_of(self.coupling, keep)
            slim = rewrite(self.coupling, plan)
        except (PlanError, RewriteError):
            return None
        if self._compensate:
            correct(self.coupling, plan, slim, self._calibration, damping=self._damping)
        return slim

    def _full(self, values: Mapping[str, torch.Tensor], i: int) -> Any:
        args, kwargs = inputs_of(self._batches[i])
        with evaluating(self._module), torch.no_grad(), running_on(self._batches[i]):
            return functional_call(self._module, dict(values), args, kwargs, tie_weights=True)

    def _values(self, keep: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers that differ: zero where channels went, corrected where they were read."""
        values = zeros(self.coupling, keep[:-1])
        if not self._compensate:
            return values
        touched = set(values)
        moments = self._calibration.moments
        for change in corrections(self.coupling, moments, keep, self._damping, touched, self._inverses):
            dense, weight = values[change.name], change.weight
            gone = torch.from_numpy(~keep[change.outputs]).to(dense.device)
            values[change.name] = weight.masked_fill(gone.reshape(-1, *[1] * (weight.ndim - 1)), 0).to(dense)
            if change.holder is not None:
                known = values.get(change.holder, self._state[change.holder].detach())
                values[change.holder] = known + change.shift.to(known).masked_fill(gone, 0)
        return values


def _run(slim: torch.nn.Module, batch: Any) -> Any:
    args, kwargs = inputs_of(batch)
    with evaluating(slim), torch.no_grad():
        return slim(*args, **kwargs)


def _first(share: Share, samples: int, device: torch.device) -> list[Any]:
    """Return the first samples of all ranks, on each of them, the last batch cut to what is missing."""
    sizes: list[int] = []
    mine: list[Any] = []
    for batch in share:
        mine.append(batch)
        sizes.append(samples_in(batch))
        if sum(sizes) >= samples:
            break
    before, left = 0, {}
    for place, size in share.in_order("sizes", zip(share.places, sizes, strict=False)):
        left[place] = min(size, samples - before)
        before += size
    parts = zip(mine, sizes, [left[place] for place in share.places[: len(mine)]], strict=True)
    return share.everywhere([_cut(batch, size, count) for batch, size, count in parts if count > 0], device)


def _cut(batch: Any, size: int, samples: int) -> Any:
    if samples == size:
        return batch

    def cut(t: Any) -> Any:
        return t[:samples] if isinstance(t, torch.Tensor) and t.ndim and len(t) == size else t

    return pytree.tree_map(cut, batch)


def _is_value(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if _is_value(t)]


def _change(outputs: Any, dense: Any) -> float:
    pairs = zip(_tensors(outputs), _tensors(dense), strict=True)
    parts = [float((a - b).square().sum() / b.square().sum().clamp_min(1e-30)) for a, b in pairs]
    return sum(parts) / max(len(parts), 1)


def measured(probe: Probe, paths: Sequence[RemovalPath], shares: Sequence[float] = SHARES) -> list[RemovalPath]:
    """Return the paths with errors scaled to what was measured after some of their steps, each group on its own."""
    return _spread("measured paths", probe, paths, lambda path: _measured(probe, path, shares))


def rises_alone(probe: Probe, paths: Sequence[RemovalPath], shares: Sequence[float]) -> np.ndarray:
    """Return (paths, shares, tasks) how much losses rise, relative, after shares of each path's steps, it alone.

    A share stands for the nearest number of steps; where that is none, or all there are, it is NaN. See `Probe.rises`.
    """

    def one(path: RemovalPath) -> np.ndarray:
        found = np.full((len(shares), len(probe.dense)), np.nan)
        for i, share in enumerate(shares):
            steps = round(share * len(path.choices))
            if 0 < steps < len(path.choices):
                found[i] = probe.rises(_without(probe.coupling, path, steps))
        return found

    return np.array(_spread("sensitivities", probe, paths, one)).reshape(len(paths), len(shares), len(probe.dense))


Found = TypeVar("Found")


def _spread(what: str, probe: Probe, paths: Sequence[RemovalPath], work: Callable[[RemovalPath], Found]) -> list[Found]:
    """Return what is found for each path; ranks share the work, in the order in which what changes is read."""
    places = [probe.place(_without(probe.coupling, path, len(path.choices))) for path in paths]
    order = sorted(range(len(places)), key=places.__getitem__)
    found = sharing.spread(what, lambda i: (i, work(paths[i])), order)
    return [each for _, each in sorted(found, key=itemgetter(0))]


def _without(coupling: Coupling, path: RemovalPath, steps: int) -> np.ndarray:
    """Return what stays, (channels,), after some steps of a path."""
    keep = np.ones(coupling.num_channels, dtype=bool)
    keep[coupling.members.of(path.choices[:steps].ravel())[0]] = False
    return coupling.settle(keep)


def _measured(probe: Probe, path: RemovalPath, shares: Sequence[float]) -> RemovalPath:
    steps = len(path.choices)
    at = np.unique([round(share * steps) for share in shares])
    at = at[(at > 0) & (at < max(steps, 2))]
    if not len(at):
        return path
    told = np.cumsum(path.errors, axis=0)
    logs = []
    for n in at:
        rise = probe.rises(_without(probe.coupling, path, n))
        predicted = np.maximum(told[n - 1], 1e-12)
        logs.append(np.log(np.maximum(rise, 0.01 * predicted) / predicted))
    scale = np.stack(
        [np.exp(np.interp(np.arange(1, steps + 1), at, [log[t] for log in logs])) for t in range(told.shape[1])], axis=1
    )
    total = np.maximum.accumulate(told * scale, axis=0)
    return RemovalPath(path.group, path.choices, np.diff(total, axis=0, prepend=0), path.takes)
