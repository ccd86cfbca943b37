"""Calibration: one pass over some batches, forward and backward, in which every layer is watched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxprune import sharing
from fxprune.agreeing import check_network, check_same_request
from fxprune.calibrations import Calibration, Moments
from fxprune.cloning import names_of
from fxprune.coupling import Coupling
from fxprune.errors import PlanError, check_kind
from fxprune.gathering import Gatherer
from fxprune.layers import fingerprint_of, layers_of
from fxprune.memberships import LabelReader
from fxprune.restoring import restored
from fxprune.shares import Share
from fxprune.sums import Layer, Sums, renumber, spreads_of_all, sums_of_all
from fxprune.tasks import NO_BATCHES, Task, check_batches, evaluating, of_wanted_classes, run_batch

POSITIONS = 64
"""How many positions of each sample are read in a layer, at most."""
ROWS = 8
"""How many positions are read for each input of a layer, where the data have a length."""
OUTPUTS = "outputs"
"""The task when none is given: to keep the outputs as they are."""


@torch.inference_mode(False)
@sharing.together("calibrate")
def calibrate(
    coupling: Coupling,
    batches: Iterable[Any],
    tasks: Mapping[str, Task] | None = None,
    *,
    max_bytes: int = 4 << 30,
    positions: int | None = None,
    by_class: bool = False,
    progress: bool = False,
) -> Calibration:
    """Run calibration batches through the dense network, forward and backward, and gather moments at every layer.

    The network runs in eval mode, on the device it is on; it is not changed. The same data give the same result. With
    several ranks, each passes its own batches, and all get what was gathered on those of all.

    Args:
        coupling: of the network.
        batches: of inputs, or pairs `(inputs, targets)`.
        tasks: name -> Task, whose losses are differentiated, each a mean over the samples of a batch. Without tasks, to
            change the outputs is what counts: by the mean of their squares, each output against its own size.
        max_bytes: the moments may take so much memory, and what waits to be added to them a quarter besides. Where all
            taps of all kernels would take more, those of the largest layers share one moment.
        positions: how many positions of each sample are read in a layer; by default as many as its moment needs, where
            the data have a length.
        by_class: gather what the means of classes make of each moment too, as `Joint(within=...)` asks; labels are
            those of the tasks, see `Task`.
        progress: show a progress bar.

    Raises:
        PlanError: no batches, an empty one, values that are not finite, a loss that does not depend on the network,
            moments that do not fit, or ranks differ.
    """
    check_kind(coupling, Coupling)
    check_batches(batches)
    check_same_request(tasks, max_bytes=max_bytes, positions=positions, by_class=by_class)
    check_network(coupling)
    module = coupling.traced.module
    names = names_of(module)
    layers, chosen = layers_of(coupling), tasks or {OUTPUTS: Task(_change)}
    thinned = _thinned(layers, max_bytes, len(chosen))
    batches = list(batches) if isinstance(batches, Iterator) else batches  # they are kept
    batches = of_wanted_classes(batches, tasks)
    share = Share.of(batches)
    rest = iter(share)
    first = list(islice(rest, 1))
    sizes = share.in_order("the first batches", map(samples_in, first))
    if not sizes:
        raise PlanError(NO_BATCHES)
    gatherer = Gatherer(names, _positions(layers, positions, sizes[0] * (share.total or 0)), thinned)
    labels = LabelReader(tasks) if by_class else None
    found: list[tuple[int, dict[str, float]]] = []
    count = None if share.total is None else len(share.places)
    bar = tqdm(chain(first, rest), "calibrate", count, disable=not progress or sharing.rank() > 0)
    with evaluating(module), _without_gradients(module):
        for batch, place in zip(bar, share.places, strict=False):
            gatherer.start_batch(samples_in(batch), place + 1)
            gatherer.classes = {} if labels is None else labels.read(batch)
            with restored(module):
                found.append((gatherer.samples, _finite(_run(module, batch, chosen, gatherer), place)))
    losses = dict.fromkeys(chosen, 0.0)
    samples = 0
    for size, each in share.in_order("losses", found):
        samples += size
        losses = {name: loss + each[name] * size for name, loss in losses.items()}
    if labels is not None:
        renumber(gatherer.sums, labels.numbers)
    return Calibration(
        _all_moments(gatherer.sums, samples, list(losses)),
        {name: torch.stack([s.mean, s.var]) for name, s in spreads_of_all(gatherer.spreads).items()},
        {name: total / samples for name, total in losses.items()},
        samples,
        fingerprint_of(coupling),
        batches,
        tasks,
    )


def _positions(layers: list[Layer], given: int | None, samples: int) -> dict[str, int]:
    """Return how many positions of each sample are read in each layer; `samples` is how many there are, if known."""
    if given is not None or not samples:
        return dict.fromkeys((layer.name for layer in layers), given or POSITIONS)
    return {
        layer.name: min(POSITIONS, max(4, math.ceil(ROWS * layer.inputs * layer.taps / samples))) for layer in layers
    }


@contextmanager
def _without_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient; afterwards each asks as before."""
    asked = {p: p.requires_grad for p in module.parameters()}
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)


def split(batches: Iterable[Any]) -> tuple[Share, Share]:
    """Return the batches to plan with, and every fourth of those of all ranks, held out to check tolerances on.

    Raises:
        PlanError: fewer than two batches.
    """
    every = Share.of(batches if isinstance(batches, Share) else list(batches))
    if (every.total or 0) < 2:
        raise PlanError(
            f"tolerances are checked on data that are held out, and the calibration has {every.total} batch. Pass two "
            "or more: the second and every fourth after it are held out."
        )
    return every.where(lambda place: place % 4 != 1), every.where(lambda place: place % 4 == 1)


def samples_in(batch: Any) -> int:
    """Return how many samples a batch has: the length of its first tensor.

    Raises:
        PlanError: it has no tensor, or no sample.
    """
    first = next((t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim), None)
    if first is None:
        raise PlanError(f"a calibration batch is a {type(batch).__name__} without a tensor. Pass inputs, or a pair.")
    if not len(first):
        raise PlanError(
            f"a calibration batch has no samples: its first tensor is of shape {tuple(first.shape)}. Leave it out."
        )
    return len(first)


def _run(module: torch.nn.Module, batch: Any, tasks: Mapping[str, Task], gatherer: Gatherer) -> dict[str, float]:
    """Run one batch forward, and backward for every task. Returns its losses."""
    with torch.enable_grad():
        with gatherer:
            losses = run_batch(module, batch, tasks)
        for i, (name, loss) in enumerate(losses.items()):
            if not gatherer.sums:  # no layer has a weight of its own
                continue
            if not loss.requires_grad:
                raise PlanError(
                    f"the loss of task {name!r} does not depend on the network. Compute it from `outputs`, without "
                    "`.detach()`, `.item()` or `torch.no_grad()`."
                )
            gatherer.task = name
            torch.autograd.grad(loss, gatherer.anchor, retain_graph=i + 1 < len(losses))
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _finite(losses: dict[str, float], place: int) -> dict[str, float]:
    """Return the losses of a batch.

    Raises:
        PlanError: one is NaN or infinite.
    """
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise PlanError(
                f"the loss of task {name!r} is {loss} on calibration batch {place}. Look for NaN or infinite numbers "
                "in its inputs and targets, and in what the network returns for it."
            )
    return losses


def _change(outputs: Any, batch: Any) -> torch.Tensor:
    """Return a loss whose gradients, squared, say how much each output changes, relative to its size.

    Source: Hutchinson's estimator: signs drawn at random stand for all outputs at once.
    """
    total = torch.zeros(())
    for i, out in enumerate(t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)):
        generator = torch.Generator().manual_seed(i)
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
        size = out.detach().square().sum().sqrt().clamp_min(torch.finfo(out.dtype).tiny)
        total = total + (out * signs).sum() / size
    return total


def _thinned(layers: list[Layer], max_bytes: int, tasks: int) -> set[str]:
    """Return the weights whose taps share one moment, the largest first, so that all moments fit."""

    def bytes_of(layer: Layer, taps: int) -> int:
        n = layer.inputs * taps
        return 8 * layer.blocks * (n * n + n + tasks * layer.outputs * layer.outputs)

    total = sum(bytes_of(layer, layer.taps) for layer in layers)
    thinned: set[str] = set()
    for layer in sorted(layers, key=lambda layer: -bytes_of(layer, layer.taps)):
        if total <= max_bytes:
            return thinned
        total -= bytes_of(layer, layer.taps) - bytes_of(layer, 1)
        thinned.add(layer.name)
    if total > max_bytes:
        largest = max(layers, key=lambda layer: bytes_of(layer, 1))
        raise PlanError(
            f"the moments of all layers take {total / 1e9:.1f} GB, more than max_bytes={max_bytes:,}; the largest is "
            f"that of {largest.name!r} with {largest.inputs} inputs. Raise `max_bytes`."
        )
    return thinned


def _all_moments(mine: dict[str, Sums], samples: int, tasks: list[str]) -> dict[str, Moments]:
    every = sums_of_all(mine)
    biases = Counter(sums.layer.bias for sums in every.values())
    return {name: _moments(sums, samples, tasks, own_bias=biases[sums.layer.bias] == 1) for name, sums in every.items()}


def _moments(sums: Sums, samples: int, tasks: list[str], *, own_bias: bool) -> Moments:
    layer = sums.layer
    nothing = torch.zeros(layer.blocks, layer.outputs, layer.outputs, dtype=torch.float64)
    second, mean = sums.inputs.mean(sums.inputs.rows)
    seen = {task: gram.mean(samples)[0].cpu() for task, gram in sums.outputs.items()}
    if not all(bool(t.isfinite().all()) for t in (second, *seen.values())):
        raise PlanError(
            f"NaN or infinite numbers reach the layer of {layer.name!r} while the calibration data run. Look for them "
            "in the data, and in the weights before it."
        )
    sensitivity = {task: seen.get(task, nothing) for task in tasks}
    between = _between(sums, mean)
    return Moments(layer, sums.shared_taps, second.cpu(), mean.cpu(), sensitivity, sums.norm, between, own_bias)


def _between(sums: Sums, mean: torch.Tensor) -> torch.Tensor | None:
    rows = sums.inputs.rows
    parts = [totals.whole(mean * rows, rows).second().cpu() for totals in sums.classes.values()]
    return torch.stack(parts).mean(0) / rows if parts else None
