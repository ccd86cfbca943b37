"""Latency budgets against the clock: what a latency model predicts, and what networks take.

On one thread: ResNet-50 and MobileNetV3 (224 px, 1 image), ResNet-18 (64 px, 8 images) and the network of the demo
(32 px, 1 and 8 images). Of each, a latency model is measured; random choices of channels, and plans by
`Budget(latency=...)`, are then run in turns with the dense network. A plan by `Joint` for half of the time is compared
with those by `Joint` for many budgets of macs. Writes `docs/benchmarks/latency.md`.

    python tests/benchmarks/latency.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from commands import command, header, markdown
from torch import nn
from torchvision.models import mobilenet_v3_large, resnet18, resnet50

import fxprune
from fxprune.choosing import Chooser
from fxprune.examples.networks import SceneNet
from fxprune.planning import counted, plan_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from plans import random_keep

PACKAGES = ("fxprune", "torch", "torchvision")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "latency.md"
CHOICES = 8
SHARES = (0.7, 0.5)
ROUNDS = 40
HALF = 0.5
MACS = np.geomspace(0.1, 1.6, 40)
"""Budgets of macs that are tried against one of latency: times what that one left."""
JOBS = {
    "SceneNet, 32 px, 8 images": (SceneNet, (8, 1, 32, 32)),
    "ResNet-18, 64 px, 8 images": (resnet18, (8, 3, 64, 64)),
    "SceneNet, 32 px, 1 image": (SceneNet, (1, 1, 32, 32)),
    "MobileNetV3-large, 224 px, 1 image": (mobilenet_v3_large, (1, 3, 224, 224)),
    "ResNet-50, 224 px, 1 image": (resnet50, (1, 3, 224, 224)),
}


def run(name: str, network: nn.Module, x: torch.Tensor) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return a row on predictions, one for each budget, and two on a budget of latency against one of macs."""
    traced = fxprune.trace(network, x)
    coupling = fxprune.couple(traced)
    start = time.process_time()
    model = fxprune.LatencyModel.measure(traced, batch=len(x))
    seconds = time.process_time() - start
    costs = counted(coupling, fxprune.Budget(macs=1.0, latency_model=model)).costs
    dense = costs(np.ones(coupling.num_channels, dtype=bool)).latency
    predicted, measured = [], []
    for seed in range(CHOICES):
        keep = random_keep(coupling, seed)
        slim = fxprune.rewrite(coupling, plan_of(coupling, keep))
        predicted.append((costs(keep).latency or 0) / (dense or 1))
        measured.append(fxprune.measure_latency(network, slim, x, rounds=ROUNDS).share)
    off = np.array(predicted) / measured - 1
    spread = f"{min(measured):.2f} .. {max(measured):.2f}"
    correlation = np.corrcoef(predicted, measured)[0, 1]
    about = [
        name, f"{seconds:.0f} s", f"{model.error:.1%}", spread, f"{correlation:.3f}", f"{np.median(np.abs(off)):.1%}",
        f"{np.median(off):+.1%}", f"{np.abs(off).max():.1%}",
    ]  # fmt: skip
    rows = []
    for share in SHARES:
        plan = fxprune.plan(coupling, fxprune.Budget(latency=share, latency_model=model))
        found = fxprune.measure_latency(network, fxprune.rewrite(coupling, plan), x, rounds=ROUNDS)
        low, middle, high = found.quartiles()["share"]
        rows.append([
            name, f"{share:.0%}", f"{plan.costs.share('latency'):.1%}", f"{middle:.1%} ({low:.1%} .. {high:.1%})",
            f"{middle / share - 1:+.1%}", f"{plan.costs.share('macs'):.1%}",
        ])  # fmt: skip
    return about, rows, [[name, *row] for row in against_macs(network, x, coupling, model)]


def against_macs(
    network: nn.Module, x: torch.Tensor, coupling: fxprune.Coupling, model: fxprune.LatencyModel
) -> list[list[str]]:
    """Return a row on the plan for half of the time, and one on the best that a budget of macs finds in as much time.

    Of all budgets of macs that are tried, it is the plan with the least error among those that are predicted to take
    at most as long.
    """
    coupling = counted(coupling, fxprune.Budget(macs=1.0, latency_model=model))
    chooser = Chooser(coupling, fxprune.methods.Joint(), fxprune.Constraints(), None, None)
    dense = coupling.costs.dense

    def error(keep: np.ndarray) -> float:
        return sum(path.errors[~keep[path.choices].any(axis=1)].sum() for path in chooser.paths)

    def share(keep: np.ndarray, resource: str) -> float:
        return getattr(coupling.costs(keep), resource) / getattr(dense, resource)

    mine = chooser.keep({"latency": HALF * (dense.latency or 0)})
    others = [chooser.keep({"macs": m * share(mine, "macs") * dense.macs}) for m in MACS]
    other = min((keep for keep in others if share(keep, "latency") <= HALF), key=error, default=None)
    rows = []
    for keep, asked in ((mine, "latency"), (other, "macs")):
        if keep is None:
            rows.append(["macs: none is as fast", *["-"] * 4])
            continue
        slim = fxprune.rewrite(coupling, plan_of(coupling, keep))
        low, middle, high = fxprune.measure_latency(network, slim, x, rounds=ROUNDS).quartiles()["share"]
        rows.append([
            f"{asked}={HALF if asked == 'latency' else share(keep, asked):.3g}", f"{error(keep):.2f}",
            f"{share(keep, 'latency'):.1%}", f"{middle:.1%} ({low:.1%} .. {high:.1%})", f"{share(keep, 'macs'):.1%}",
        ])  # fmt: skip
    return rows


def main() -> None:
    """Run all jobs and write the page."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for name, (build, shape) in JOBS.items():
        found.append(run(name, build().eval(), torch.randn(shape)))
        print(*found[-1], sep="\n", flush=True)
    headers = ["network", "measuring", "fit", "shares measured", "correlation", "median error", "bias", "largest"]
    asked = ["network", "asked", "predicted", "measured (quartiles)", "off", "macs"]
    against = ["network", "budget", "error", "latency predicted", "measured (quartiles)", "macs"]
    PAGE.write_text(
        header("Latency", PACKAGES, "one thread", command=f"`{command()}`") + "\n\n"
        f"On a machine that others used at the same time. Shares are of the dense network's latency; measured ones are "
        f"medians of {ROUNDS} paired runs, in the time that the thread has computed.\n\n"
        f"## Predictions\n\n{CHOICES} random choices of channels, none of which was measured for the model. "
        "fit: median error on those that were. bias: median of predicted / measured - 1.\n\n"
        + markdown(headers, [about for about, _, _ in found])
        + "\n\n## Budgets\n\nPlans by `Magnitude()` for `Budget(latency=...)`. off: measured / asked - 1.\n\n"
        + markdown(asked, [r for _, rows, _ in found for r in rows])
        + "\n\n## Budgets of latency and of macs\n\nPlans by `Joint()`, without data: for half of the time, and the "
        f"one with the least error among those of {len(MACS)} budgets of macs, {MACS[0]:g} to {MACS[-1]:g} times the "
        "macs of the first, that are predicted to take at most half of the time. Error: what `Joint` predicts, summed "
        "over all that goes; less is better.\n\n" + markdown(against, [r for _, _, rows in found for r in rows]) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
