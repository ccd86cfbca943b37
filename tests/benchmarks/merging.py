"""Merging: what every combination of tasks takes, where the networks of all tasks are merged, pruned and fine-tuned.

Networks of one topology are trained on the demo's scenes, one for each task of a set. Every method merges the networks
of a set. What it makes is pruned by `Joint` and fine-tuned again and again, each time to a smaller budget of
multiply-accumulates, counted as a mean over all combinations of tasks: the same chain for every method. Budgets are
shares of what the separate networks take, not pruned; the first is all of that. These go through a chain of their own,
in which nothing is pruned: at every budget, a task's metric is compared with that of the network trained as long.

Results are JSON, one line for each set, seed, method and budget, appended as they come
(`docs/benchmarks/merging.jsonl`), and a Markdown summary of them (`docs/benchmarks/merging.md`).

Run: ``python tests/benchmarks/merging.py [--sets demo attributes] [--methods ...] [--budgets ...] [--seeds ...]
[--resume] [--quick] [--cache DIR] [--out DIR]``
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import Row, add_options, append, command, rows_file, rows_in
from merging_report import DENSE, TIME, report
from merging_tasks import SETS, as_tasks, data, recipe, single, subsets, together
from quality_data import Batch, Splits
from quality_measure import told
from quality_networks import ResNet20
from quality_problems import Problem
from quality_training import Scores, fit, macs_of, test, trained
from torch import fx, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fxprune
from fxprune import methods
from fxprune.calibrating import calibrate

Key = tuple[str, int, str, float]
BUDGETS = (1.0, 0.6, 0.4, 0.27, 0.18, 0.12)
METHODS: dict[str, Callable[[int], Any]] = {
    DENSE: lambda count: methods.Separate(),
    "separate": lambda count: methods.Separate(),
    "shared": lambda count: methods.Shared(),
    "mtz-50": lambda count: methods.MTZ(share=0.5),
    "mtz-90": lambda count: methods.MTZ(share=0.9),
    "pam-entropy": lambda count: methods.PAM(share=1 - 1 / count),  # a task keeps as many channels as its network has
    "pam-fisher-2": lambda count: methods.PAM(alpha=0.02, estimator="fisher"),
}
"""Name -> how to merge so many networks; those of `DENSE` are not pruned."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A set of trained networks, and what they are merged and judged on.

    Attributes:
        problem: of all tasks together.
        networks: task -> network.
        splits: data.
        separate: macs of the separate networks, not pruned, as a mean over all combinations.
        seed: of the networks.
    """

    problem: Problem
    networks: dict[str, nn.Module]
    splits: Splits
    separate: float
    seed: int


def prepared(names: tuple[str, ...], seed: int, splits: Splits, cache: Path, *, quick: bool) -> Setting:
    """Return the trained networks of some tasks."""
    count, sizes = len(names), recipe(quick=quick)
    networks = {name: trained(single(name, sizes), splits, seed, cache)[0] for name in names}
    alone = [macs_of(network, splits.test.inputs[:1]) for network in networks.values()]
    often = 2 ** (count - 1) / (2**count - 1)  # the share of all combinations that each task is in
    return Setting(together(names, sizes), networks, splits, often * sum(alone), seed)


def measure(setting: Setting, name: str, budgets: Sequence[float]) -> Iterator[Row]:
    """Merge; then prune and fine-tune to one budget after another, the largest first; yield a row of each."""
    batches = list(setting.splits.calibration.batches(setting.problem.recipe.batch_size))
    example, began = batches[0][0][:1], time.process_time()
    method, alone = METHODS[name](len(setting.networks)), as_tasks_alone(setting)
    network: nn.Module = fxprune.merge(setting.networks, batches, method=method, example_inputs=example, tasks=alone)
    spent = {"merging": time.process_time() - began}
    row: Row = {"merged": of_combinations(network, setting)}
    began = time.process_time()
    for stage, share in enumerate(sorted(budgets, reverse=True), 1):
        try:
            if name != DENSE:
                network = pruned(network, share, setting, batches)
            row |= {"macs": of_combinations(network, setting), "cut": scores(network, setting)}
            fit_again(network, setting, stage)
            spent["chain"] = time.process_time() - began
            yield {"budget": share, "seconds": dict(spent), "tuned": scores(network, setting)} | row
        except Exception as error:  # whatever goes wrong in a method is part of the report
            yield {"budget": share, "error": told(error)}


def pruned(network: nn.Module, share: float, setting: Setting, batches: list[Batch]) -> nn.Module:
    """Prune to a share of what the separate networks take."""
    tasks, example = as_tasks(setting.problem), batches[0][0][:1]
    calibration = calibrate(fxprune.couple(fxprune.trace(network, example)), batches, tasks)
    budget = fxprune.Budget(macs=math.ceil(share * setting.separate), combinations="mean")
    return fxprune.compile(network, example, budget, calibration=calibration, tasks=tasks, verify=False, progress=False)


def scores(network: nn.Module, setting: Setting) -> Scores:
    """Return every task's metric on the test scenes."""
    return test(network, setting.splits.test, setting.problem)


def as_tasks_alone(setting: Setting) -> dict[str, fxprune.Task]:
    """Return the tasks of the networks before they are merged, each of which returns its map."""
    alone = [single(name, setting.problem.recipe) for name in setting.networks]
    return {name: task for problem in alone for name, task in as_tasks(problem).items()}


def fit_again(network: nn.Module, setting: Setting, stage: int) -> None:
    """Train a merged or slim network, the same way for all; of each stage, batches come in an order of its own."""
    sizes = setting.problem.recipe
    rate, seed = sizes.tune_learning_rate, 10 * setting.seed + stage
    fit(network, setting.splits.train, setting.problem, epochs=sizes.tune_epochs, learning_rate=rate, seed=seed)


def of_combinations(network: nn.Module, setting: Setting) -> dict[str, int]:
    """Return the macs of each combination of tasks, as torch counts them in the network that is left of it."""
    assert isinstance(network, fx.GraphModule)
    inputs = setting.splits.test.inputs[:1]
    return {
        " + ".join(some): macs_of(fxprune.select_tasks(network, some, share=True), inputs)
        for some in subsets(tuple(setting.networks))
    }


def time_of_merging(rounds: int = 1) -> dict[str, float]:
    """Return the CPU seconds that each method takes to merge three ResNet-20s on 512 images, untrained."""
    torch.manual_seed(0)
    names = ("a", "b", "c")
    networks: dict[str, nn.Module] = {name: ResNet20().eval() for name in names}
    images = torch.randn(512, 1, 32, 32)
    labels = {name: torch.randint(10, (len(images),)) for name in names}
    batches = [(images[i : i + 64], {n: t[i : i + 64] for n, t in labels.items()}) for i in range(0, len(images), 64)]
    tasks = {n: fxprune.Task(lambda outputs, batch, n=n: cross_entropy(outputs, batch[1][n]), target=n) for n in names}
    spent = {}
    for name in [name for name in METHODS if name != DENSE]:
        began = time.process_time()
        for _ in range(rounds):
            fxprune.merge(networks, batches, method=METHODS[name](len(names)), example_inputs=images[:1], tasks=tasks)
        spent[name] = (time.process_time() - began) / rounds
    return spent


def read_rows(path: Path) -> dict[Key, Row]:
    """Return the rows of a file by set, seed, method and budget; of several, the last."""
    return {(row["set"], row["seed"], row["method"], row["budget"]): row for row in rows_in(path)}


def run(args: argparse.Namespace, path: Path) -> None:
    """Run what is missing, and append a line for each row to a file as soon as it is known.

    A chain of which a row is missing is run again as a whole.
    """
    there, splits = read_rows(path), data(args.quick)
    jobs = [(seed, of, name) for seed in args.seeds for of in args.sets for name in args.methods]

    def note(row: Row) -> None:
        append(path, row | {"command": command()})

    if (TIME, 0, TIME, 1.0) not in there:
        note({"set": TIME, "seed": 0, "method": TIME, "budget": 1.0, "seconds": time_of_merging()})
    for seed, of, name in tqdm(jobs, unit="method", disable=None):
        if any((of, seed, name, share) not in there for share in args.budgets):
            setting = prepared(tuple(SETS[of]), seed, splits, args.cache, quick=args.quick)
            for row in measure(setting, name, args.budgets):
                note({"set": of, "seed": seed, "method": name} | row)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, help="of tasks (default: all, quick demo)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--budgets", nargs="+", type=float, help=f"a chain of shares (default: {BUDGETS}, quick 0.5, 0.3)")
    add("--seeds", nargs="+", type=int, help="of weights and batches (default: 0 1 2, quick 0)")
    add_options(parser, "merging.jsonl and merging.md", jobs=False)
    args = parser.parse_args(argv)
    args.budgets = args.budgets or ([0.5, 0.3] if args.quick else list(BUDGETS))
    args.sets = args.sets or (["demo"] if args.quick else list(SETS))
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; write the summary of all rows there are."""
    args = parse(argv)
    torch.set_num_threads(1)
    path = rows_file(args, "merging.jsonl")
    run(args, path)
    rows = list(read_rows(path).values())
    (args.out / "merging.md").write_text(report(rows), encoding="utf-8")
    print(f"{len(rows)} rows in {args.out / 'merging.md'}")


if __name__ == "__main__":
    main()
