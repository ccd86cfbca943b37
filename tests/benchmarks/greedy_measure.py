"""One job of the benchmark of greedy pruning: a method on a trained network, at some budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from commands import Row
from greedy_distilling import distilling, with_answers
from greedy_networks import greedy_problems
from quality_data import Batch, Splits
from quality_measure import DENSE, Job, Options, judged, told
from quality_methods import Ours
from quality_problems import Problem
from quality_training import fit, macs_of, params_of, test, trained
from torch import nn

import fxprune
from fxprune import methods
from fxprune.calibrating import calibrate
from fxprune.choosing import Chooser
from fxprune.methods import HBGS, HBGTS, AnyMethod
from fxprune.offers import Found
from fxprune.planning import plan_of

METHODS: Mapping[str, AnyMethod] = {
    "hbgs": HBGS(),
    "hbgs-backward": HBGS(backward=True),
    "hbgs-backward-activations": HBGS(backward=True, on="activations"),
    "hbgs-decompose": HBGS(backward=True, decompose=True),
    "hbgts": HBGTS(),
    "hbgts-backward": HBGTS(backward=True),
    "joint": methods.Joint(),
    "random": methods.Random(),
}
EPOCHS, LONG, SMALL = 2, 16, 0.1
"""Epochs of fine-tuning, on all training images, and those where at most this share of the macs is left: a quarter
of those that classifiers are trained for, and twice as many. Dense networks are fine-tuned as long as the smallest."""
RATE = 6e-3
"""The highest learning rate of fine-tuning."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A search that remembers what it has found.

    Attributes:
        method: searches.
        found: what it has found, each time that it was asked.
    """

    method: HBGS | HBGTS
    found: list[Found] = field(default_factory=list, repr=False)

    @property
    def compensate(self) -> bool:
        """Whether weights are corrected."""
        return self.method.compensate

    @property
    def decompose(self) -> bool:
        """Whether convolutions become pairs."""
        return self.method.decompose

    @property
    def damping(self) -> float:
        """Of the correction."""
        return self.method.damping

    def choose(self, problem: methods.Problem) -> np.ndarray:
        """Return (channels,) bool, what to keep."""
        return self.start(problem)(problem.bounds)

    def start(self, problem: methods.Problem) -> Callable[[Mapping[str, float]], np.ndarray]:
        """Return what chooses within any bounds."""
        search = self.method.offering(problem)

        def chosen(bounds: Mapping[str, float]) -> np.ndarray:
            self.found.append(search.run(bounds))
            return self.found[-1].keep

        return chosen

    def spent(self) -> Row:
        """Return what the last choice took from the dense network on: rounds, offers measured, runs of the network,
        and those as published."""
        found = self.found[-1]
        return {
            "rounds": len(found.commits),
            "evaluations": found.evaluations,
            "forwards": found.forwards,
            "published": found.published,
        }


def measure(job: Job, options: Options) -> list[Row]:
    """Return a row for every budget; what cannot be done is told in its row."""
    torch.set_num_threads(1)
    problem, splits = bench(job.network, quick=options.quick)
    network, seconds = trained(problem, splits, job.seed, options.cache)
    splits = replace(splits, train=with_answers(splits.train, network))
    about = {"network": job.network, "seed": job.seed, "method": job.method}
    if job.method == DENSE:
        costs = {"macs": macs_of(network, splits.test.inputs[:1]), "params": params_of(network)}
        row = about | costs | {"budget": 1.0, "seconds": seconds, "cut": test(network, splits.test, problem)}
        return [row | {"tuned": tuned(network, splits, problem, job.seed, epochs(0, options))}]
    batches = list(splits.calibration.batches(problem.recipe.batch_size))
    cut = start(METHODS[job.method], network, problem, batches)
    rows = []
    for share in sorted(job.budgets, reverse=True):  # a search goes on from one to the next
        try:
            slim, row = cut(share)
            row |= judged(slim, network, problem, splits, job.seed, replace(options, tune=False))
            row["tuned"] = tuned(slim, splits, problem, job.seed, epochs(share, options))
        except Exception as error:  # whatever goes wrong in a method is part of the report
            row = {"error": told(error)}
        rows.append(about | {"budget": share} | row)
    return rows


@cache
def bench(name: str, *, quick: bool) -> tuple[Problem, Splits]:
    """Return a problem and its data."""
    problem = greedy_problems(quick=quick)[name]
    return problem, problem.split(problem.recipe.counts)


def start(
    method: AnyMethod, network: nn.Module, problem: Problem, batches: list[Batch]
) -> Callable[[float], tuple[nn.Module, Row]]:
    """Calibrate; return what prunes to a share of the macs, and tells how long that takes from the dense network on."""
    began = time.process_time()
    if not isinstance(method, (HBGS, HBGTS)) or method.decompose:
        compiled = Ours(method).start(network, problem, batches)
        spent = time.process_time() - began

        def cut(share: float) -> tuple[nn.Module, Row]:
            began = time.process_time()
            return compiled(share), {"seconds": spent + time.process_time() - began}

        return cut

    tasks = {name: fxprune.Task(loss, target=name) for name, loss in problem.losses.items()}
    coupling = fxprune.couple(fxprune.trace(network, batches[0][0][:1]))
    known, noted = calibrate(coupling, batches, tasks), Noted(method)
    chooser = Chooser(coupling, noted, fxprune.Constraints(), known, tasks)
    searching = time.process_time() - began

    def found(share: float) -> tuple[nn.Module, Row]:
        nonlocal searching
        began = time.process_time()
        plan = plan_of(coupling, chooser.keep(fxprune.Budget(macs=share).bounds(coupling.costs.dense)))
        searching += time.process_time() - began
        began = time.process_time()
        slim = fxprune.rewrite(coupling, plan)
        fxprune.compensate(coupling, plan, slim, known, damping=method.damping)
        return slim, {"seconds": searching + time.process_time() - began} | noted.spent()

    return found


def epochs(share: float, options: Options) -> int:
    """Return for how many epochs to fine-tune a network with a share of its macs left."""
    if options.quick:
        return 1
    return LONG if share <= SMALL else EPOCHS


def tuned(network: nn.Module, splits: Splits, problem: Problem, seed: int, epochs: int) -> Mapping[str, float]:
    """Fine-tune in place, the same way for all, and test."""
    fit(network, splits.train, distilling(problem), epochs=epochs, learning_rate=RATE, seed=seed + 1)
    return test(network, splits.test, problem)
