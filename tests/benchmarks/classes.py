"""Classes: plans from a few labelled images, and networks for some of the classes, on the quality benchmark's networks.

Few images: the methods that look at data plan from 1, 5 and 20 calibration images of each class. Subtasks: networks
for 2, 3 and 5 of the ten classes, planned and fine-tuned for these alone, beside networks for all classes, which are
tested on the same images, as they are and told which classes there can be; and the same for a network of a hundred
classes, the numbers of two digits. Scatter: what CATRO's statistics cost, in forward passes.

Results are JSON, one line for each, appended as they come (`docs/benchmarks/classes.jsonl`), a Markdown summary
(`docs/benchmarks/classes.md`), and a plot.

Run: ``python tests/benchmarks/classes.py [--parts ...] [--networks ...] [--seeds ...] [--jobs N] [--resume] [--quick]
[--cache DIR] [--out DIR]``
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from classes_numbers import NAME, of_numbers, problem_of_numbers
from classes_report import report
from commands import Row, add_options, append, command, rows_file, rows_in
from quality_data import Splits, Table
from quality_measure import Options, bench, judged, told
from quality_methods import CONTENDERS
from quality_problems import Problem
from quality_training import fit, macs_of, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fxprune
from fxprune import methods
from fxprune.calibrating import calibrate
from fxprune.scattering import scatter

NETWORKS = ("resnet20", "mobilenetv2", "vgg")
FEW = ("joint", "joint-classes", "catro", "taylor-global", "tp-taylor", "tp-taylor-global", "tp-hessian-global",
       "tp-activation-global")  # fmt: skip
PER_CLASS, BUDGETS = (1, 5, 20), (0.7, 0.5, 0.3, 0.15)
SIZES = (2, 3, 5)
WHOLE = 1.0
SHARES = (WHOLE, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)
"""Of networks for all classes, the first of which is not cut; those for some go on to where half of the last is."""
SHARES_OF_SOME = (*SHARES[1:], 0.02, 0.015)
METHOD = methods.Joint(sequential=True)
PART = 4
"""Networks of subtasks, and those beside them, are fine-tuned like the dense one was trained, for this part of it."""
CLASSES, LABEL = 10, "digit"
ROUNDS = 9
Left = tuple[tuple[int, tuple[float, ...]], ...]
"""How many classes, 0 for all of them, and shares of macs."""


@dataclass(frozen=True, slots=True)
class Job:
    """A part of the benchmark on one network of one seed.

    Attributes:
        part: which part.
        network: its name.
        seed: of its training, and of the classes that are chosen.
        method: of few images, the one that plans.
        left: of subtasks, what has no rows yet.
    """

    part: str
    network: str
    seed: int
    method: str = ""
    left: Left = ()


def measure(job: Job, options: Options) -> list[Row]:
    """Return the rows of a job."""
    torch.set_num_threads(1)
    problem, splits = setting(job.network, options)
    network, _ = trained(problem, splits, job.seed, options.cache)
    about = {"part": job.part, "network": job.network, "seed": job.seed}
    run: Callable[[Job, Options, Problem, Splits, nn.Module], Iterator[Row]] = PARTS[job.part]
    return [about | row for row in run(job, options, problem, splits, network)]


def setting(name: str, options: Options) -> tuple[Problem, Splits]:
    """Return the problem of a network, and its data."""
    if name != NAME:
        return bench(name, options)
    problem = problem_of_numbers(quick=options.quick)
    return problem, problem.split(problem.recipe.counts)


def few_images(job: Job, options: Options, problem: Problem, splits: Splits, network: nn.Module) -> Iterator[Row]:
    """Plan from some images of each class; the most are fine-tuned as well."""
    for count in PER_CLASS:
        part = replace(splits, calibration=of_each_class(splits.calibration, count))
        batches = list(part.calibration.batches(problem.recipe.batch_size))
        prune = CONTENDERS[job.method].start(network, problem, batches)
        for share in BUDGETS:
            tune = replace(options, tune=options.tune and count == max(PER_CLASS))
            about: Row = {"method": job.method, "per_class": count, "budget": share}
            try:
                yield about | judged(prune(share), network, problem, part, job.seed, tune)
            except Exception as error:  # whatever goes wrong in a method is part of the report
                yield about | {"error": told(error)}


def of_each_class(table: Table, count: int) -> Table:
    """Return the first images of each class."""
    labels = table.targets[LABEL]
    return rows_of(table, torch.cat([torch.nonzero(labels == c)[:count, 0] for c in range(CLASSES)]).sort().values)


def rows_of(table: Table, rows: Tensor) -> Table:
    """Return some rows."""
    return Table(table.inputs[rows], {name: target[rows] for name, target in table.targets.items()})


def subsets(seed: int, classes: int) -> list[list[int]]:
    """Return some of the classes, of each size, by chance."""
    rng = np.random.default_rng(seed)
    return [sorted(map(int, rng.choice(classes, size, replace=False))) for size in SIZES]


def subtasks(job: Job, options: Options, problem: Problem, splits: Splits, network: nn.Module) -> Iterator[Row]:
    """Prune for all classes, and for some, down to small shares; test on these."""
    chosen = subsets(job.seed, network(splits.test.inputs[:1]).shape[1])
    whole, parts = (data_of_numbers if job.network == NAME else data_of_digits)(problem, splits, chosen)
    tests = [(classes, part.test) for classes, part in zip(chosen, parts, strict=True)]
    for size, shares in job.left:
        if size:
            classes, part = chosen[SIZES.index(size)], parts[SIZES.index(size)]
            train, on, kind = renumbered(part.train, classes), [(classes, part.test)], "some classes"
            made = shrinking(network, problem, part.calibration, classes, shares)
        else:
            train, on, kind = splits.train, tests, "all classes"
            made = shrinking(network, problem, whole, None, shares)
            if WHOLE in shares:
                dense = {"kind": "dense", "budget": WHOLE, "macs": 1.0}
                yield from (dense | on_classes(network, *test, "cut") for test in tests)
        for share, slim in made:
            yield from pruned(slim, share, network, problem, train, on, job.seed, kind)


def data_of_digits(problem: Problem, splits: Splits, chosen: Sequence[Sequence[int]]) -> tuple[Table, list[Splits]]:
    """Return calibration images of all classes, and data of each choice of them: all images there are of these."""
    few = problem.recipe.counts.calibration
    pool = problem.split(replace(problem.recipe.counts, calibration=few * CLASSES)).calibration
    parts = [
        Splits(of_these(splits.train, classes), rows_of(of_these(pool, classes), torch.arange(few)),
               of_these(splits.test, classes))
        for classes in chosen
    ]  # fmt: skip
    return rows_of(pool, torch.arange(few)), parts


def data_of_numbers(problem: Problem, splits: Splits, chosen: Sequence[Sequence[int]]) -> tuple[Table, list[Splits]]:
    """Return calibration images of all classes, and data of each choice of them: as many images as there are of all."""
    return splits.calibration, [of_numbers(classes, problem.recipe.counts) for classes in chosen]


def of_these(table: Table, classes: Sequence[int]) -> Table:
    """Return the images of some classes."""
    return rows_of(table, torch.nonzero(torch.isin(table.targets[LABEL], torch.tensor(classes)))[:, 0])


def renumbered(table: Table, classes: Sequence[int]) -> Table:
    """Return images of some classes, labelled by their places among them."""
    return Table(table.inputs, {LABEL: torch.searchsorted(torch.tensor(classes), table.targets[LABEL])})


def shrinking(
    network: nn.Module, problem: Problem, table: Table, classes: Sequence[int] | None, shares: Sequence[float]
) -> Iterator[tuple[float, nn.Module]]:
    """Yield a slim network for each share that can be reached, of some classes or all; a copy where all is left."""
    batches = list(table.batches(problem.recipe.batch_size))
    task = fxprune.Task(
        lambda outputs, batch: cross_entropy(outputs, batch[1][LABEL]),
        classes=classes,
        slice_outputs=classes is not None,
        target=LABEL,
    )
    coupling = fxprune.couple(fxprune.trace(network, table.inputs[:1]))
    known = calibrate(coupling, batches, {LABEL: task})
    for share in shares:
        if share == WHOLE:
            yield share, copy.deepcopy(network)
            continue
        try:
            slim = fxprune.compile(
                network, table.inputs[:1], fxprune.Budget(macs=share), method=METHOD, calibration=known,
                tasks={LABEL: task}, verify=False, progress=False,
            )  # fmt: skip
        except fxprune.PlanError:
            return  # no network is so small
        yield share, slim


def pruned(
    slim: nn.Module,
    share: float,
    network: nn.Module,
    problem: Problem,
    train: Table,
    tests: Sequence[tuple[Sequence[int], Table]],
    seed: int,
    kind: str,
) -> Iterator[Row]:
    """Yield rows of a slim network: as it is, and after fine-tuning on all training images of its classes."""
    example = tests[0][1].inputs[:1]
    about = {"kind": kind, "budget": share, "macs": macs_of(slim, example) / macs_of(network, example)}
    rows = [about | on_classes(slim, *test, "cut") for test in tests]
    epochs, rate = -(-problem.recipe.epochs // PART), problem.recipe.learning_rate
    fit(slim, train, problem, epochs=epochs, learning_rate=rate, seed=seed + 1)
    yield from (row | on_classes(slim, *test, "tuned") for row, test in zip(rows, tests, strict=True))


@torch.no_grad()
def on_classes(network: nn.Module, classes: Sequence[int], test: Table, stage: str) -> Row:
    """Return the accuracy on images of some classes; of a network for all also if told which there can be."""
    logits = torch.cat([network.eval()(inputs) for inputs, _ in test.batches(250)])
    row: Row = {"classes": list(classes)}
    labels, among = renumbered(test, classes).targets[LABEL], logits
    if logits.shape[1] > len(classes):
        row[stage] = _right(logits, test.targets[LABEL])
        stage, among = f"{stage}_told", logits[:, list(classes)]
    return row | {stage: _right(among, labels)}


def _right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def scattering(job: Job, options: Options, problem: Problem, splits: Splits, network: nn.Module) -> Iterator[Row]:
    """Compare the time of CATRO's statistics, 20 images of each class, with that of a forward pass, in turns."""
    table = of_each_class(splits.calibration, max(PER_CLASS))
    batches = list(table.batches(problem.recipe.batch_size))
    coupling = fxprune.couple(fxprune.trace(network, batches[0][0][:1]))

    def forward() -> None:
        with torch.no_grad():
            for inputs, _ in batches:
                coupling.traced.module(inputs)

    ratios = []
    for number in range(ROUNDS + 1):
        spent = [_spent(run) for run in (partial(scatter, coupling, batches), forward)]
        ratios += [spent[0] / spent[1]] if number else []  # the first round warms up
    low, middle, high = statistics.quantiles(ratios, n=4)
    yield {"images": len(table), "ratio": middle, "low": low, "high": high}


def _spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


PARTS: dict[str, Callable[[Job, Options, Problem, Splits, nn.Module], Iterator[Row]]] = {
    "few": few_images,
    "subtasks": subtasks,
    "scatter": scattering,
}


def jobs_for(args: argparse.Namespace, there: Sequence[Row]) -> list[Job]:
    """Return what has no rows yet."""
    jobs = []
    for seed in args.seeds:
        for network in args.networks:
            jobs += [Job("subtasks", network, seed, left=left)] if (left := shares_left(network, seed, there)) else []
            if network == NAME:
                continue
            jobs += [Job("scatter", network, seed)] if seed == args.seeds[0] else []
            jobs += [Job("few", network, seed, method) for method in FEW]
    known = {(r["part"], r["network"], r["seed"], r.get("method", "")) for r in there}
    left = [job for job in jobs if job.left or (job.part, job.network, job.seed, job.method) not in known]
    return [job for job in left if job.part in args.parts]


def shares_left(network: str, seed: int, there: Sequence[Row]) -> Left:
    """Return what has no rows yet of a network's subtasks."""
    mine = [r for r in there if (r["part"], r["network"], r["seed"]) == ("subtasks", network, seed)]
    sizes = [(len(r["classes"]) if r["kind"] == "some classes" else 0, r["budget"]) for r in mine]
    asked = {0: SHARES} | dict.fromkeys(SIZES, SHARES_OF_SOME)
    found = ((size, tuple(s for s in shares if (size, s) not in sizes)) for size, shares in asked.items())
    return tuple((size, shares) for size, shares in found if shares)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    every = [*NETWORKS, NAME]
    add("--networks", nargs="+", choices=every, default=every, metavar="NETWORK", help=f"some of {', '.join(every)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add_options(parser, "classes.jsonl, classes.md and the plot")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; write the summary and the plot of all rows there are."""
    args = parse(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for the processes that are started
    path = rows_file(args, "classes.jsonl")
    options = Options(args.cache, None, args.quick, tune=True)
    jobs = jobs_for(args, rows_in(path))
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(jobs), unit="job", disable=None) as bar,
    ):
        for done in as_completed([pool.submit(measure, job, options) for job in jobs]):
            for row in done.result():
                append(path, row | {"command": command()})
            bar.update()
    rows = rows_in(path)
    (args.out / "classes.md").write_text(report(rows, args.out), encoding="utf-8")
    print(f"{len(rows)} rows in {args.out / 'classes.md'}")


if __name__ == "__main__":
    main()
