"""Run a network at some choices of widths, op by op and as a whole, and fit a latency model to what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxprune.allocating import Allocation, steps_of_all
from fxprune.cloning import submodule
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.errors import PlanError, TraceError
from fxprune.latencies import LatencyModel, OpLatency, fit, machine, shares, terms
from fxprune.operands import Operands, calls_of
from fxprune.paths import paths_in_any_order
from fxprune.planning import plan_of
from fxprune.plans import Plan
from fxprune.products import Counter, Sizes
from fxprune.rewriting import plan_and_rewrite, rewrite
from fxprune.timing import clock_of, take_turns
from fxprune.traced import Traced
from fxprune.values import Bound, bind

NETWORKS = 32
"""How many choices of widths are measured, besides the dense network."""
ROUNDS = (8, 50)
"""How often each network is run, op by op and as a whole, at least and at most."""
SECONDS = 0.1
"""How long the dense network runs beside each other one, between these."""


class TimedRunner(Bound):
    """Runs a graph and notes how long each call takes, without the interpreter's own work."""

    def __init__(self, module: fx.GraphModule, clock: Callable[[], float]) -> None:
        super().__init__(module)
        self._clock, self._graph = clock, module.graph
        self.runs: list[list[float]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run the graph; `runs` gets the seconds of each call."""
        self.runs.append([])
        self.run(*bind(self._graph, args, kwargs), enable_io_processing=False)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module."""
        return self._call(self.fetch_attr(target), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function."""
        return self._call(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of the first argument."""
        return self._call(getattr(args[0], target), args[1:], kwargs)

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start = self._clock()
        value = function(*args, **kwargs)
        self.runs[-1].append(self._clock() - start)
        return value


def measure(traced: Traced, device: str, batch: int) -> LatencyModel:
    """Measure a latency model; see `LatencyModel.measure`."""
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise PlanError(f"batch={batch!r} is no positive number. Pass how many examples run at once.")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise PlanError(f"device={device!r}: latency is measured on 'cpu' or 'cuda'.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"device={device!r}: torch sees no such device here. Measure where the network will run.")
    place = torch.device(device)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: resized(t, batch).to(place), (traced.args, traced.kwargs)
    )
    coupling = plan_and_rewrite(couple(traced), _least)[0]  # what cannot be rewritten is frozen
    sizes = Sizes(coupling.channels)
    operands = Operands(sizes, coupling.record, coupling.traced.graph)
    counter = Counter(sizes.rows)
    dense = rewrite(coupling, plan_of(coupling, np.ones(coupling.num_channels, dtype=bool))).to(place)
    samples, seconds, parts, in_blocks = [], [], [], []
    for keep, whole_blocks in choices(coupling):
        slim = rewrite(coupling, plan_of(coupling, keep)).to(place)
        try:
            whole, share = _timed(dense, slim, args, kwargs, place)
        except RuntimeError as error:
            raise TraceError(
                f"the network does not run on a batch of {batch}: {error}. Pass a `batch=` that it takes."
            ) from error
        samples.append(operands(counter.sizes(counter.by_row(keep))))
        seconds.append(float(np.median(whole)))
        parts.append(share)
        in_blocks.append(whole_blocks)
    times = np.array(parts) * np.median(seconds) * 1e6
    return _model(coupling, np.array(samples), times[:, 1:], times[:, 0], np.array(in_blocks), device, batch)


def resized(t: torch.Tensor, batch: int) -> torch.Tensor:
    """Cut or repeat a tensor along dim 0."""
    if t.ndim == 0 or len(t) in (0, batch):
        return t
    return t[torch.arange(batch, device=t.device) % len(t)]


def _least(coupling: Coupling) -> Plan:
    """Return the plan of the least widths."""
    allocation = _allocation(coupling)
    return plan_of(coupling, allocation.keep(_taken(coupling, allocation, np.ones(len(coupling.groups())), 1)))


def choices(coupling: Coupling) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield (channels,) what stays, and whether widths are whole blocks: of random networks, then of the dense one.

    The widths of a group are spread evenly over all that it can have (a Latin hypercube), whatever the others have.
    """
    allocation = _allocation(coupling)
    count, rng = len(coupling.groups()), np.random.default_rng(0)
    drawn = [(rng.permutation(NETWORKS) + rng.random(NETWORKS)) / NETWORKS for _ in range(count)]
    gone = (*np.array(drawn).reshape(count, NETWORKS).T, np.zeros(count))
    for i, each in enumerate(gone):
        block = coupling.record.machine.block if i % 2 else 1
        yield allocation.keep(_taken(coupling, allocation, each, block)), block > 1


def _allocation(coupling: Coupling) -> Allocation:
    """Return all steps that groups can take, in any order."""
    return steps_of_all(coupling, paths_in_any_order(coupling), "uniform", Constraints())


def _taken(coupling: Coupling, allocation: Allocation, gone: np.ndarray, block: int) -> np.ndarray:
    """Return (steps,) which to take, for shares (groups,) of their steps that go; whole blocks stay."""
    taken = np.zeros(len(allocation), dtype=bool)
    for group, share in zip(coupling.groups(), gone, strict=True):
        own, per_step = allocation.group == group.index, sum(group.takes)
        left = group.width - int(share * own.sum()) * per_step
        taken |= own & (np.cumsum(own) * per_step <= group.width - -(-left // block) * block)
    return taken


def _timed(
    dense: fx.GraphModule, slim: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rounds,) seconds of the dense network, and (1 + calls,) of the slim one and its calls, as shares of that.

    All three take turns: a machine is faster now, and slower then.
    """
    once = float(take_turns([dense], args, kwargs, 1, device).item())
    rounds = int(np.clip(SECONDS / max(once, 1e-6), *ROUNDS))
    runner = TimedRunner(slim, clock_of(device))
    seconds = take_turns([dense, slim, runner], args, kwargs, rounds, device)
    parts = np.vstack([seconds[1], np.array(runner.runs[-rounds:]).T])
    return seconds[0], np.median(parts / seconds[0], axis=1)


def _model(
    coupling: Coupling,
    samples: np.ndarray,
    times: np.ndarray,
    wholes: np.ndarray,
    in_blocks: np.ndarray,
    device: str,
    batch: int,
) -> LatencyModel:
    """Fit every class of ops, then the networks as wholes.

    Args:
        coupling: of the network.
        samples: (networks, 2, calls) elements that go in and come out; the last network is the dense one.
        times: (networks, calls) microseconds.
        wholes: (networks,) microseconds.
        in_blocks: (networks,) whether widths are whole blocks.
        device: it ran on.
        batch: it ran at.
    """
    block = coupling.record.machine.block
    found, order, counted = [], [], 0.0
    names = [n.name for n in calls_of(coupling.traced.graph)]
    counts = np.ones(len(times))
    counts[-1] = len(times) / 2  # budgets are shares of the dense network
    for (kind, inputs, outputs, into, out), calls in _classes(coupling, samples[-1], device).items():
        read, written = (samples[:, side, calls].ravel() for side in (0, 1))
        tried = []
        ways = {(into, out)} if batch > 1 else {(0, 0), (into, 0), (0, out), (into, out)}
        for channels in ways:  # a single image may take another kernel, which pads otherwise or not: the best fit tells
            x, y = shares(read, inputs, channels[0], block), shares(written, outputs, channels[1], block)
            weights, rest = fit(terms(x, y), times[:, calls].ravel(), np.repeat(counts, len(calls)))
            tried.append((rest, channels, weights))
        _, (into, out), weights = min(tried)
        counted += times[-1, calls].sum() / times[-1].sum() if into or out else 0.0
        found.append(OpLatency(kind, tuple(names[i] for i in calls), inputs, outputs, into, out, weights))
        order += calls
    plain = LatencyModel(
        tuple(found), block, 1.0, 0.0, 0.0, device, batch, machine(device), torch.__version__, torch.get_num_threads()
    )
    each = plain.at(range(len(order)))
    sums = np.array([each.each(*sample[:, order]).sum() for sample in samples])
    left = sums / sums[-1]
    rows = np.stack([np.ones_like(left), left, left**2], axis=1)
    # as far as ops count whole blocks, these are what a budget leads to; else other widths, which are slower
    leads = np.where(in_blocks, counted, 1 - counted)
    leads[-1] = 1
    (overhead, scale, curve), _ = fit(rows, wholes, counts**2 * np.maximum(leads, 1e-3))
    error, total = float(np.median(np.abs(rows @ (overhead, scale, curve) / wholes - 1))), float(sums[-1])
    return replace(plain, overhead=overhead, scale=scale / total, curve=curve / total**2, error=error)


def _classes(coupling: Coupling, dense: np.ndarray, device: str) -> dict[tuple[str, int, int, int, int], list[int]]:
    """Return calls by kind, elements in and out, and channels in and out where they come in blocks."""
    record, blocked = coupling.record, set()
    if device == "cpu":
        blocked = {c.node for c in record.convolutions}
    found: dict[tuple[str, int, int, int, int], list[int]] = {}
    for i, n in enumerate(calls_of(coupling.traced.graph)):
        shapes = [t.shape for source in n.all_input_nodes for t in record.nodes.get(source.name, [])]
        made = [t.shape for t in record.nodes.get(n.name, [])]
        into, out = (shapes[0][1], made[0][1]) if n.name in blocked else (0, 0)
        kind = str(n.target)
        if n.op == "call_module":
            module = submodule(coupling.traced.root, kind)
            kind = f"{type(module).__name__}({module.extra_repr()})"
        key = (f"{kind} {shapes} -> {made}", int(dense[0, i]), int(dense[1, i]), into, out)
        found.setdefault(key, []).append(i)
    return found
