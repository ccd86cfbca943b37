"""What `zoo.py` measures, in a process of its own: one network; prints its row as JSON, over again as it grows.

Run: ``python tests/benchmarks/zoo_child.py FAMILY NAME [--limit S] [--other-limit S] [--memory GB]``
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import resource
import statistics
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zoo_networks import FAMILIES, Network, build
from zoo_stages import Clock, Record
from zoo_torch_pruning import error, leaves, output_layers, runs
from zoo_torch_pruning import prune as prune_by_torch_pruning

import fxprune

SHARE = 0.5
ROUNDS = 8  # of halving the range in which the least possible share lies
MARGIN = 0.02  # what is asked above the least possible share, at which whole layers are down to one channel
TURNS, SECONDS = 40, 10  # of the two tools on the clock: how many at most, and how long about
REASONS = 8  # why macs cannot go, most first
TOLERANCE = 1e-9
UNCHANGED = 0.999  # share of macs above which a pruner has done nothing

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A slim network with all that led to it, and the share of macs asked."""

    coupling: fxprune.Coupling
    plan: fxprune.Plan
    slim: fx.GraphModule
    share: float


class Ops(TorchDispatchMode):
    """Lists the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def attend(self) -> bool:
        """Whether a product of activations follows a softmax, or an op computes attention as a whole."""
        softmax = [i for i, name in enumerate(self.names) if "softmax" in name]
        after = self.names[softmax[0] :] if softmax else []
        return any("bmm" in name for name in after) or any("attention" in name for name in self.names)


def prune(model: nn.Module, inputs: Inputs, share: float | None, clock: Clock) -> Pruned:
    """Trace, couple, plan and rewrite, as `fxprune.compile` does: over again without what cannot be rewritten.

    Args:
        model: the network.
        inputs: example inputs.
        share: of the macs to keep; None for half, or the least that can be reached.
        clock: takes the seconds of each stage.
    """
    traced = clock("trace", lambda: fxprune.trace(model, inputs))
    coupling = clock("couple", lambda: fxprune.couple(traced))
    freeze: dict[str, str] = {}
    while True:
        plan, asked = clock("plan", partial(planned, coupling, share))
        try:
            return Pruned(coupling, plan, clock("rewrite", partial(fxprune.rewrite, coupling, plan)), asked)
        except fxprune.RewriteError as failure:
            if not failure.nodes.keys() - freeze.keys():
                raise
            freeze |= {n: f"holds a size that cannot be rewritten ({why})" for n, why in failure.nodes.items()}
        coupling = clock("couple", partial(fxprune.couple, traced, freeze=freeze))


def planned(coupling: fxprune.Coupling, share: float | None) -> tuple[fxprune.Plan, float]:
    """Return the plan for a share of the macs, and the share: for None half, or a little above the least possible."""
    if share is not None:
        return fxprune.plan(coupling, fxprune.Budget(macs=share)), share
    with contextlib.suppress(fxprune.PlanError):
        return fxprune.plan(coupling, fxprune.Budget(macs=SHARE)), SHARE
    low, high = SHARE, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        try:
            fxprune.plan(coupling, fxprune.Budget(macs=middle))
            high = middle
        except fxprune.PlanError:
            low = middle
    asked = min(high + MARGIN, 1.0)
    return fxprune.plan(coupling, fxprune.Budget(macs=asked)), asked


def describe(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return sizes of a network, and whether it is a transformer."""
    with torch.no_grad(), Ops() as ops:
        model(*inputs)
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, inputs),
        "inputs": [list(x.shape) for x in inputs],
        "attention": ops.attend(),
    }


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Count multiply-accumulates by PyTorch's own counter, which belongs to neither tool."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # the counter asks every tensor handed to a module for a gradient function it lacks here
            p.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return counter.get_total_flops() // 2


def outcome(pruned: Pruned) -> dict[str, Any]:
    """Return what a pruning did and what it could not do, without running it."""
    coupling, costs = pruned.coupling, pruned.plan.costs
    coverage = coupling.coverage()
    macs: dict[str, float] = {}
    for blocked in coverage.blocked:
        macs[blocked.reason] = macs.get(blocked.reason, 0.0) + blocked.macs / max(costs.before.macs, 1)
    most = sorted(macs, key=lambda reason: -macs[reason])[:REASONS]
    return {
        "frontend": coupling.traced.frontend,
        "coverage": {"macs": coverage.macs, "params": coverage.params},
        "budget": pruned.share,
        "share": costs.share("macs"),
        "params_share": costs.share("params"),
        "groups": len(pruned.plan.groups),
        "blocked": [{"reason": reason, "macs": macs[reason]} for reason in most],
        "notes": list(coupling.traced.notes),
    }


def compare(model: nn.Module, slim: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return what running both networks tells: whether shapes stay, and how much outputs change with the inputs."""
    with torch.no_grad():
        dense, now = leaves(model(*inputs)), leaves(slim(*inputs))
        other = leaves(slim(*(3 * x.flip(-1) for x in inputs)))
    changes = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(now, other, strict=True)]
    return {
        "shapes_kept": [x.shape for x in dense] == [x.shape for x in now],
        "sensitivity": min(changes) if all(bool(x.isfinite().all()) for x in now) else 0.0,
        "counted": count_macs(slim, inputs),
    }


def trains(slim: nn.Module, inputs: Inputs, batch: int) -> bool:
    """Take one training step; return whether loss, gradients and weights are finite."""
    slim.train()
    optimizer = torch.optim.SGD(slim.parameters(), lr=1e-4)
    found = leaves(slim(*(torch.randn(batch, *x.shape[1:]) for x in inputs)))
    loss = torch.stack([x.square().mean() for x in found if x.requires_grad]).sum()
    loss.backward()
    optimizer.step()
    gradients = [p.grad for p in slim.parameters() if p.grad is not None]
    return all(bool(x.isfinite().all()) for x in (loss, *gradients, *slim.parameters()))


def batch_of(model: nn.Module) -> int:
    """Return the batch to train with: batch norms after a global pooling need two."""
    return 2 if any("BatchNorm" in type(module).__name__ for module in model.modules()) else 1


def measure_fxprune(record: Record, model: nn.Module, inputs: Inputs, limit: float) -> Pruned | None:
    """Run fxprune once and note all there is to know of the result but its speed."""
    clock = Clock(record.enter)
    pruned = record.attempt("trace", limit, lambda: prune(model, inputs, None, clock))
    if pruned is None:
        record.row["seconds"] = clock.seconds
        return None
    record.row |= record.attempt("report", limit, lambda: outcome(pruned)) or {}
    proof = record.attempt(
        "verify", limit, lambda: clock("verify", lambda: fxprune.verify(pruned.coupling, pruned.plan, pruned.slim))
    )
    record.row |= {"error": proof.worst if proof else None, "seconds": clock.seconds}
    compared = record.attempt("run", limit, lambda: compare(model, pruned.slim, inputs)) or {}
    record.row |= compared
    record.row["trained"] = record.attempt("train", limit, lambda: trains(pruned.slim, inputs, batch_of(model)))
    record.row["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pruned


def measure_torch_pruning(
    record: Record, model: nn.Module, inputs: Inputs, pruned: Pruned | None, limit: float
) -> dict[str, Any]:
    """Run Torch-Pruning once; return what became of it."""
    slim = copy.deepcopy(model)
    ignored = output_layers(pruned.coupling) if pruned else []
    record.row["torch_pruning"] = {"outcome": "killed"}
    seconds = record.attempt("tp", limit, lambda: prune_by_torch_pruning(slim, inputs, ignored))
    if seconds is None:
        late = record.row["failures"]["tp"].startswith("OutOfTime")
        return {"outcome": "too long" if late else "raises", "message": record.row["failures"].pop("tp")}
    record.attempt("tp", limit, lambda: runs(slim, inputs))
    if "tp" in record.row["failures"]:
        return {"outcome": "raises", "message": record.row["failures"].pop("tp"), "seconds": seconds}
    share = count_macs(slim, inputs) / max(record.row["macs"], 1)
    told = record.attempt("tp", limit, lambda: error(model, slim, inputs, pruned.plan) if pruned else None)
    result = {"share": share, "seconds": seconds, "error": told, "message": record.row["failures"].pop("tp", None)}
    if share > UNCHANGED:
        return result | {"outcome": "unchanged"}
    if told is None:
        return result | {"outcome": "runs"}
    return result | {"outcome": "exact" if told <= TOLERANCE else "differs"}


def measure_speed(
    record: Record, model: nn.Module, inputs: Inputs, pruned: Pruned, ignored: list[str], other: bool
) -> None:
    """Time both tools, taking turns, on copies made outside the clock; note medians, and their ratio."""
    first = sum(s for stage, s in record.row["seconds"].items() if stage != "verify")
    first += sum(record.row["torch_pruning"].get("seconds", {}).values())
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(min(max(int(SECONDS / first), 1), TURNS)):
        clock, subject = Clock(), copy.deepcopy(model)
        gc.collect()
        prune(subject, inputs, pruned.share, clock)
        ours.append(clock.seconds)
        if other:
            subject = copy.deepcopy(model)
            gc.collect()
            theirs.append(prune_by_torch_pruning(subject, inputs, ignored))
    record.row["seconds"] |= _medians(ours)
    if theirs:
        record.row["torch_pruning"]["seconds"] = _medians(theirs)
        totals = [statistics.median(sum(run.values()) for run in runs) for runs in (ours, theirs)]
        record.row["ratio"] = totals[0] / totals[1]


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run[stage] for run in times) for stage in times[0]}


def measure(network: Network, record: Record, limit: float, other_limit: float) -> None:
    """Measure one network."""
    built = record.attempt("build", limit, lambda: build(network))
    if built is None:
        return
    model, inputs = built
    record.row |= record.attempt("describe", limit, lambda: describe(model, inputs)) or {}
    if record.row["failures"]:
        record.enter("describe")  # which writes down why
        return
    pruned = measure_fxprune(record, model, inputs, limit)
    record.row["torch_pruning"] = measure_torch_pruning(record, model, inputs, pruned, other_limit)
    if pruned is not None:
        ignored, other = output_layers(pruned.coupling), "share" in record.row["torch_pruning"]
        record.attempt(
            "speed", limit + other_limit, lambda: measure_speed(record, model, inputs, pruned, ignored, other)
        )
    record.enter("done")


def main(argv: list[str] | None = None) -> None:
    """Measure one network and print its row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("name")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each stage of fxprune")
    parser.add_argument("--other-limit", type=float, default=90, help="seconds for each run of Torch-Pruning")
    parser.add_argument("--memory", type=float, default=14, help="GB that the process may allocate")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory * 1e9), -1))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    network = Network(args.family, args.name)
    with contextlib.redirect_stdout(sys.stderr):  # the tools print as they like
        measure(network, Record(sys.__stdout__ or sys.stdout, family=network.family, name=network.name), args.limit,
                args.other_limit)  # fmt: skip


if __name__ == "__main__":
    main()
