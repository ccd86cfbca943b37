"""What `planning.py` measures, in a process of its own: one network; prints one line of JSON.

Run: ``python tests/benchmarks/planning_child.py NAME PX [--samples N] [--batch N] [--budget S] [--threads N]``
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quality_data import hard_digits
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the next module is

from zoo_weights import awaken

import fxprune
from fxprune.calibrating import calibrate
from fxprune.examples.scenes import split_digits

SEED = 0
KIB = 1 if sys.platform == "darwin" else 1024  # what the system counts memory in
STATISTICS = 64  # samples that batch norms take their statistics from

Batch = tuple[Tensor, Tensor]


class Clock:
    """Adds up the seconds of stages.

    Attributes:
        stages: name -> seconds of wall time, seconds of processor time.
        peaks: name -> peak resident bytes of the process when the stage had ended.
    """

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, float]] = {}
        self.peaks: dict[str, int] = {}

    def __call__(self, stage: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `call(*args, **kwargs)` returns."""
        wall, processor = time.perf_counter(), time.process_time()
        result = call(*args, **kwargs)
        known = self.stages.get(stage, (0.0, 0.0))
        self.stages[stage] = (known[0] + time.perf_counter() - wall, known[1] + time.process_time() - processor)
        self.peaks[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        return result

    def inside(self, stage: str, home: Any, name: str) -> Any:
        """Return a context in which the function `name` of a module counts as a stage."""
        call = getattr(home, name)
        return mock.patch.object(home, name, lambda *args, **kwargs: self(stage, call, *args, **kwargs))


def images(px: int, samples: int, size: int) -> list[Batch]:
    """Return batches of cluttered digits of all colours, enlarged to `px`, with noise, and which digit each shows."""
    table = hard_digits(split_digits()[1], samples, (SEED,))
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for x, targets in table.batches(size):
        tint = torch.rand(len(x), 3, 1, 1, generator=generator) + 0.5
        x = F.interpolate(x, (px, px), mode="bilinear", align_corners=False) * tint
        batches.append((x + 0.1 * torch.randn(x.shape, generator=generator), targets["digit"]))
    return batches


def build(name: str, batches: list[Batch]) -> nn.Module:
    """Return a network of torchvision in eval mode: random weights, batch norms with the statistics of the data."""
    import torchvision

    model = awaken(torchvision.models.get_model(name, weights=None))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    usual = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over batches
        m.train()
    with torch.no_grad():
        for x, _ in batches[: max(STATISTICS // len(batches[0][0]), 1)]:
            model(x)
    for m, momentum in zip(norms, usual, strict=True):
        m.momentum = momentum
    return model.eval()


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the cross entropy of a batch."""
    return F.cross_entropy(outputs, batch[1])


def train_pass(model: nn.Module, batches: list[Batch]) -> None:
    """Run all batches forward and backward, to the gradients of all parameters."""
    for batch in batches:
        loss(model(batch[0]), batch).backward()
        model.zero_grad(set_to_none=True)


def activation_pass(model: nn.Module, batches: list[Batch]) -> None:
    """Run all batches forward and backward, to the gradients of activations only."""
    model.requires_grad_(False)
    for x, target in batches:
        x = x.clone().requires_grad_()
        torch.autograd.grad(loss(model(x), (x, target)), x)
    model.requires_grad_(True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every stage, the peaks, and what was planned."""
    clock = Clock()
    batches = images(args.px, args.samples, args.batch)
    model = build(args.name, batches)
    train_pass(model, batches[:1])  # whatever is done once
    coupling = fxprune.couple(fxprune.trace(model, batches[0][0][:1]))
    tasks = {"digit": fxprune.Task(loss)}
    clock("before", train_pass, model, batches)
    clock("before, activations", activation_pass, model, batches)
    calibration = clock("calibrate", calibrate, coupling, batches, tasks)
    with clock.inside("paths", fxprune.methods, "joint_paths"), clock.inside("measure", fxprune.methods, "measured"):
        budget = fxprune.Budget(macs=args.budget)
        plan = clock("plan", fxprune.plan, coupling, budget, method=fxprune.methods.Joint(), calibration=calibration)
    clock("after", train_pass, model, batches)
    clock("after, activations", activation_pass, model, batches)
    return {
        "stages": clock.stages,
        "peaks": clock.peaks,
        "groups": len(coupling.groups()),
        "macs": plan.costs.share("macs"),
        "losses": dict(calibration.losses),
        "widths": {g.name: g.after for g in plan.groups},
    }


def main() -> None:
    """Measure and print the answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a network of torchvision")
    parser.add_argument("px", type=int)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
