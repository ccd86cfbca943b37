"""One job of the quality benchmark: a method on a trained network, at every budget."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_data import Splits, Table
from quality_methods import CONTENDERS
from quality_problems import Problem, problems
from quality_training import fit, macs_of, params_of, refresh, test, trained
from torch import nn

Row = dict[str, Any]
DENSE = "dense"
TUNED_ON = 2_500
"""Fine-tuning sees a quarter of the training images, and at least so many."""


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for all jobs."""

    cache: Path
    cifar10: Path | None
    quick: bool
    tune: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A method on a network of a seed, at some budgets; `DENSE` trains and tests the network itself."""

    network: str
    seed: int
    method: str
    budgets: tuple[float, ...]


def measure(job: Job, options: Options) -> list[Row]:
    """Return a row for every budget; what cannot be done is told in its row."""
    torch.set_num_threads(1)
    problem, splits = bench(job.network, options)
    network, seconds = trained(problem, splits, job.seed, options.cache)
    about = {"network": job.network, "seed": job.seed, "method": job.method}
    if job.method == DENSE:
        costs = {"macs": macs_of(network, splits.test.inputs[:1]), "params": params_of(network)}
        scores = test(network, splits.test, problem)
        return [about | costs | {"budget": 1.0, "seconds": seconds, "cut": scores}]
    return [about | {"budget": share} | row for share, row in _rows(job, options, problem, splits, network)]


@cache
def bench(name: str, options: Options) -> tuple[Problem, Splits]:
    """Return a problem and its data."""
    problem = problems(options.cifar10, quick=options.quick)[name]
    return problem, problem.split(problem.recipe.counts)


def _rows(
    job: Job, options: Options, problem: Problem, splits: Splits, network: nn.Module
) -> Iterator[tuple[float, Row]]:
    batches = list(splits.calibration.batches(problem.recipe.batch_size))
    began = time.perf_counter()
    try:
        prune = CONTENDERS[job.method].start(network, problem, batches)
    except Exception as error:  # whatever goes wrong in a method is part of the report
        yield from ((share, {"error": told(error)}) for share in job.budgets)
        return
    prepared = time.perf_counter() - began
    for share in job.budgets:
        began = time.perf_counter()
        try:
            slim = prune(share)
            seconds = prepared + time.perf_counter() - began
            yield share, {"seconds": seconds} | judged(slim, network, problem, splits, job.seed, options)
        except Exception as error:
            yield share, {"error": told(error)}


def judged(slim: nn.Module, network: nn.Module, problem: Problem, splits: Splits, seed: int, options: Options) -> Row:
    """Test a slim network as it is, after a refresh of its batch norms, and after fine-tuning."""
    inputs, recipe = splits.test.inputs[:1], problem.recipe
    row: Row = {
        "macs": macs_of(slim, inputs) / macs_of(network, inputs),
        "params": params_of(slim) / params_of(network),
        "cut": test(slim, splits.test, problem),
    }
    refresh(slim, splits.calibration.batches(recipe.batch_size))
    row["refreshed"] = test(slim, splits.test, problem)
    if options.tune:
        rate = recipe.tune_learning_rate
        fit(slim, first(splits.train), problem, epochs=recipe.tune_epochs, learning_rate=rate, seed=seed + 1)
        row["tuned"] = test(slim, splits.test, problem)
    return row


def first(table: Table) -> Table:
    """Return what fine-tuning sees of the training images."""
    count = max(len(table) // 4, TUNED_ON)
    return Table(table.inputs[:count], {name: target[:count] for name, target in table.targets.items()})


def told(error: Exception) -> str:
    """Return the kind and the first line of an error, and which function raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message} (in `{last.name}` of {Path(last.filename).name})"
