"""The whole path on real input: train three tasks, compile to a budget, fine-tune, compare, prove, save, reload."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import matplotlib  # noqa: F401 (`draw_groups` needs it: better missed now than after the training)
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxprune
from fxprune.drawing import draw_groups
from fxprune.examples.networks import SceneNet
from fxprune.examples.scenes import make_splits
from fxprune.examples.training import Recipe, evaluate, losses, train

Scores = Mapping[str, float]

METRICS = {"segmentation": "segmentation, mIoU", "depth": "depth, R\N{SUPERSCRIPT TWO}", "presence": "presence, mAP"}
BATCH_SIZES = (1, 32)
CONSTRAINTS = fxprune.Constraints(multiple_of=8)  # odd widths save macs but little time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the demo found.

    Attributes:
        dense: task -> test metric of the dense network; higher is better.
        cut: the same of the slim network as it was compiled.
        tuned: the same after fine-tuning.
        report: of the compilation.
        latencies: batch size -> milliseconds of the dense and of the slim network.
        seconds: stage -> wall-clock seconds.
        machine: what it ran on.
    """

    dense: Scores
    cut: Scores
    tuned: Scores
    report: fxprune.Report
    latencies: Mapping[int, fxprune.MeasuredLatency]
    seconds: Mapping[str, float]
    machine: str

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.seconds.items())
        headers = ["", "dense", "slim", "fine-tuned", "change"]
        parts = [
            tabulate(self._rows(), headers, colalign=("left", *["right"] * 4), disable_numparse=True),
            "change: fine-tuned against dense. Latency: median (quartiles), dense and slim taking turns.",
            f"the proof: {self.report.verification}",
            f"{sum(self.seconds.values()):.0f} s in all: {stages}\n{self.machine}",
        ]
        return "\n\n".join(parts)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for task, name in METRICS.items():
            dense, cut, tuned = self.dense[task], self.cut[task], self.tuned[task]
            yield name, f"{dense:.3f}", f"{cut:.3f}", f"{tuned:.3f}", _percent((tuned - dense) / abs(dense))
        for resource in ("macs", "params"):
            before, after = getattr(self.report.costs.before, resource), getattr(self.report.costs.after, resource)
            yield resource, f"{before:,}", f"{after:,}", f"{after:,}", _percent(self.report.costs.share(resource) - 1)
        for size, latency in self.latencies.items():
            name = f"latency, batch of {size}, ms"
            yield name, _spread(latency.before), "", _spread(latency.after), _percent(latency.change)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "metrics": {"dense": dict(self.dense), "cut": dict(self.cut), "tuned": dict(self.tuned)},
            "report": self.report.to_dict(),
            "latencies": [{"batch_size": size, **latency.to_dict()} for size, latency in self.latencies.items()],
            "seconds": dict(self.seconds),
            "machine": self.machine,
        }


def _percent(change: float) -> str:
    return f"{round(change, 3) + 0.0:+.1%}"  # never -0.0%


def _spread(milliseconds: tuple[float, ...]) -> str:
    low, middle, high = quantiles(milliseconds)
    return f"{middle:.2f} ({low:.2f} .. {high:.2f})"


def run(*, seed: int = 0, budget: float = 0.5, out: Path = Path("fxprune_demo"), quick: bool = False) -> Outcome:
    """Train a network of three tasks, compile it, fine-tune it, print a table and write everything into a folder.

    Args:
        seed: of the scenes, the weights and the order of batches. The split of the scans is always the same.
        budget: share of the multiply-accumulates to keep.
        out: gets `slim/` (the network and its plan), `groups.png`, `report.html`, `report.json` and
            `table.txt`.
        quick: use less of everything, to see the path in seconds; the networks stay poor.

    Returns:
        What was found.

    Raises:
        PlanError: the budget cannot be met; told before the training.
        VerificationError: the slim network is not equal to the masked original.
        ArtifactError: `out` is a file, or the network that was read back is not the one that was written.
    """
    recipe = Recipe.quick() if quick else Recipe()
    bound = fxprune.Budget(macs=budget)
    _make_folder(out)
    seconds: dict[str, float] = {}

    with _timed("scenes", seconds):
        splits = make_splits(recipe.train_scenes, recipe.calibration_scenes, recipe.test_scenes, seed)
        dense = _network(seed)
        examples = splits.calibration.images[:2]  # what costs are counted on, and the proof is made with
        coupling = fxprune.couple(fxprune.trace(dense, examples))
        fxprune.plan(coupling, bound, constraints=CONSTRAINTS)  # what cannot be met is told before the training
    print(f"{len(splits.train):,} scenes to train on, {len(splits.test):,} of other scans to test on")

    with _timed("training", seconds):
        train(dense, splits.train, recipe.epochs, recipe.learning_rate, seed)
    with _timed("compiling", seconds):
        batches = list(splits.calibration.batches(64))
        tasks = {name: fxprune.Task(loss) for name, loss in losses.items()}
        slim = fxprune.compile(dense, examples, bound, calibration=batches, tasks=tasks, constraints=CONSTRAINTS)
    with _timed("testing", seconds):
        before, cut = evaluate(dense, splits.test), evaluate(slim, splits.test)
    with _timed("fine-tuning", seconds):
        train(slim, splits.train, recipe.tune_epochs, recipe.tune_learning_rate, seed + 1, label="fine-tuning")
    with _timed("measuring", seconds):
        tuned = evaluate(slim, splits.test)
        rounds = {size: 20 if quick else max(1000 // size, 100) for size in BATCH_SIZES}
        latencies = {size: measure(dense, slim, splits.test.images[:size], rounds[size]) for size in BATCH_SIZES}
    with _timed("saving", seconds):
        fxprune.save(slim, out / "slim")
        check_saved(slim, out / "slim", splits.test.images[:8])
        draw_groups(coupling, out / "groups.png", fxprune.report(slim).plan)
        fxprune.report(slim).to_html(out / "report.html")

    outcome = Outcome(before, cut, tuned, fxprune.report(slim), latencies, seconds, _machine())
    (out / "report.json").write_text(json.dumps(outcome.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(f"{outcome}\n", encoding="utf-8")
    written = "slim/ (weights and plan), groups.png, report.html, report.json, table.txt"
    print(f"\n{outcome}\n\nwritten to {out}: {written}")
    return outcome


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise fxprune.ArtifactError(f"{out} is a file. Pass the path of a folder.")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _network(seed: int) -> SceneNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SceneNet()


def measure(dense: nn.Module, slim: nn.Module, images: Tensor, rounds: int) -> fxprune.MeasuredLatency:
    """Time both networks in turns."""
    images = images.contiguous(memory_format=torch.channels_last)  # as `train` leaves the weights
    return fxprune.measure_latency(dense, slim, images, rounds=rounds)


@torch.no_grad()
def check_saved(slim: nn.Module, folder: Path, images: Tensor) -> None:
    """Read the network back into a fresh `SceneNet` and compare the outputs in float64.

    Raises:
        ArtifactError: they differ.
    """
    expected = copy.deepcopy(slim).double()(images.double())
    found = fxprune.load(folder, SceneNet().eval()).double()(images.double())
    for task, answer in expected.items():
        error = ((found[task] - answer).abs().max() / answer.abs().max()).item()
        if not error <= 1e-12:  # also when it is NaN
            raise fxprune.ArtifactError(
                f"{folder}: the network read back gives another {task} (relative error {error:.1e})."
            )


def _machine() -> str:
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    system = f"{platform.system()} {platform.machine()}, {instructions}"
    return f"{threads} threads, {system}, Python {platform.python_version()}, torch {torch.__version__}"
