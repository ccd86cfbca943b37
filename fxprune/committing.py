"""HBGS and HBGTS: in rounds, every group offers its best next step, and the best of all offers is committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fxprune.criteria.approximation import Source
from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError
from fxprune.offering import Offering
from fxprune.offers import Found
from fxprune.problems import Choice, Problem

Tune = Callable[[nn.Module, nn.Module], None]
"""Trains a network in place: `(network so far, dense network)`; channels that have gone are zero, and stay so."""


class _Searching(ABC):
    """What is the same for all searches that offer and commit."""

    __slots__ = ()
    decompose: bool

    def choose(self, problem: Problem) -> np.ndarray | Choice:
        """Return (channels,) bool, what to keep; with `tune`, the weights too."""
        return self.start(problem)(problem.bounds)

    def search(self, problem: Problem) -> Found:
        """Return what to keep, and how it was found.

        Raises:
            PlanError: data or tasks are missing, the budget cannot be met, or the checkpoint is of another search.
        """
        return self.offering(problem).run(problem.bounds)

    def start(self, problem: Problem) -> Callable[[Mapping[str, float]], np.ndarray | Choice]:
        """Return what chooses within any bounds; one search goes on from larger to smaller ones."""
        if self.decompose and not hasattr(problem.coupling, "pairs"):
            raise PlanError(f"{self} adds layers, which a plan alone cannot. Pass it to `fxprune.compile`.")
        offering = self.offering(problem)
        return lambda bounds: _chosen(offering.run(bounds))

    @abstractmethod
    def offering(self, problem: Problem) -> Offering:
        """Return the search itself, to be asked for one budget after another."""


@dataclass(frozen=True, slots=True)
class HBGS(_Searching):
    """Commit, in each round, the filters whose loss changes a layer's output least.

    In each round, the filters that linear combinations of the others give best are found in every group, by orthogonal
    matching pursuit or by backward elimination (`backward`, the paper's HBGS-B), and taken out on trial. The group with
    the smallest relative error `|y - y0| / |y0|` commits: y is what the layers return that read the group, in the
    network so far, y0 what they return in the dense network. For several such layers, errors add up. An error is
    remembered until a neighbour of the group has changed.

    Differences from the paper, and from its code, where that is mistaken:

    * The paper puts two linear 1x1 convolutions around each convolution, which take up what is lost, and stay. Here the
      weights of the layers that read a group take it up, by least squares on the calibration data, and no layer is
      added.
    * Groups are all that can go, residual streams, concatenations and grouped convolutions among them.
    * The code counts what was removed against the network with 1x1 convolutions added; the budget is a share of the
      original. It chooses layers on test data: pass a part of the training data that was held out.
    * In its matching pursuit, coefficients are sorted apart from their channels, are those of normalised filters used
      on filters as they are, and are shrunk by a ridge of 1; in its backward elimination, those of the input side are
      scrambled by a `view` where a transpose is meant. None of this is copied.
    * Backward elimination updates its inverse in place of inverting again at every removal.

    Attributes:
        filters_per_round: how many channels a round takes; groups whose steps take more take one step.
        backward: backward elimination in place of orthogonal matching pursuit.
        on: what is approximated: "filters" as published, or "activations".
        remember: errors are remembered; without, every group is measured in every round.
        compensate: weights are corrected, in the search and by `compile`.
        decompose: `compile` makes two of each convolution with a kernel, as the paper does on its output side; see
            `fxprune.decomposing`. Only what lies between the two goes, and the second makes up for it. (On the input
            side, least squares in the layer that reads it leave nothing for a 1x1 convolution to do: there is none.)
        damping: of the correction; as of `Joint`.
        tune: trains the network between rounds, such as by distillation; see `Tune`. `compile` then takes over the
            weights that it has found, and corrects no others.
        checkpoint: a file that holds where the search is, written after every round. Started again, it goes on.

    Raises:
        PlanError: a setting that makes no sense.

    Source: Purohit, Parvathgari, Bhattacharya: A Greedy Hierarchical Approach to Whole-Network Filter-Pruning in CNNs
    (TMLR 2024), algorithms 1 and 2 and the layer-wise error; the authors' code.
    """

    filters_per_round: int = 5
    backward: bool = False
    on: Source = "filters"
    remember: bool = True
    compensate: bool = True
    decompose: bool = False
    damping: float = DAMPING
    tune: Tune | None = None
    checkpoint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check(self)

    def offering(self, problem: Problem) -> Offering:
        """Return the search itself, to be asked for one budget after another."""
        return Offering(problem, self, judge="layers")


@dataclass(frozen=True, slots=True)
class HBGTS(_Searching):
    """Commit, in each round, the filters whose loss changes the network's output least.

    As `HBGS`, but an offer is judged by the end of the network: by `|out - out0| / |out0|`, or by the rise of the
    tasks' losses. (The paper speaks of the final classification error; its code compares the last features.)

    The published search runs the network once for every group in every round. Here, what an offer adds to the error (to
    its square, for outputs) is remembered, and taken for a bound on what the group's next offer adds: only the offer
    that would be committed is made and measured again, where anything has changed since. And all offers of a round
    start from activations that are remembered: only what depends on a group's weights is run. `search` says how much
    was run.

    Attributes:
        filters_per_round: as of `HBGS`, like `backward`, `on`, `compensate`, `decompose`, `damping`, `tune` and
            `checkpoint`.
        judge: "outputs", or "loss", for which tasks are needed.
        beam: how many networks are carried on from round to round, those with the least error; 1 as published.
        remember: see above; without, every offer is measured in every round, as published.

    Raises:
        PlanError: a setting that makes no sense.

    Source: as of `HBGS`; what is remembered: lazy greedy search (Minoux, 1978).
    """

    filters_per_round: int = 5
    backward: bool = False
    on: Source = "filters"
    judge: str = "outputs"
    beam: int = 1
    remember: bool = True
    compensate: bool = True
    decompose: bool = False
    damping: float = DAMPING
    tune: Tune | None = None
    checkpoint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check(self)
        if self.judge not in ("outputs", "loss"):
            raise PlanError(f'HBGTS(judge={self.judge!r}) makes no sense. Pass "outputs" or "loss".')
        if not self.beam >= 1:
            raise PlanError(f"HBGTS(beam={self.beam!r}) makes no sense. Pass 1 or more.")
        if self.tune is not None and self.beam > 1:
            raise PlanError("HBGTS tunes one network: pass `beam=1`, or no `tune`.")

    def offering(self, problem: Problem) -> Offering:
        """Return the search itself, to be asked for one budget after another."""
        return Offering(problem, self, judge=self.judge, beam=self.beam)


def _chosen(found: Found) -> np.ndarray | Choice:
    return found.keep if found.weights is None else Choice(found.keep, found.weights)


def _check(method: HBGS | HBGTS) -> None:
    name = type(method).__name__
    if not method.filters_per_round >= 1:
        raise PlanError(f"{name}(filters_per_round={method.filters_per_round!r}) makes no sense. Pass 1 or more.")
    if method.on not in ("filters", "activations"):
        raise PlanError(f'{name}(on={method.on!r}) makes no sense. Pass "filters" or "activations".')
    if method.decompose and not (method.compensate and method.tune is None):
        raise PlanError(f"{name}(decompose=True) needs `compensate=True`, and no `tune`.")
    if method.tune is not None and not callable(method.tune):
        raise PlanError(f"{name}(tune={method.tune!r}) cannot be called. Pass a function `(student, teacher) -> None`.")
    if method.tune is not None and method.checkpoint is not None:
        raise PlanError(f"{name} does not write down weights that were tuned. Pass `tune` or `checkpoint`, not both.")
