"""Named methods: a criterion that says in which order channels go, and the scope in which groups share the loss.

A method is a frozen dataclass with `scope` and `scores(coupling, calibration, tasks) -> (channels,) array`; a lower
score goes first. Any object with these two works as `method=`. One whose order depends on what else goes has, instead
of `scores`, `rounds` and `paths(coupling, calibration, keep)`: see `PathMethod`. One that searches by itself has
`choose(problem) -> (channels,) bool` and nothing else: see `SearchMethod`.

Methods of `merge` are others: any object with `share_out(merger)`, see `fxprune.merging`. `Separate`, `Shared`,
`PAM` and `MTZ` are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from fxprune.calibrations import Calibration
from fxprune.committing import HBGS, HBGTS
from fxprune.coupling import Coupling
from fxprune.criteria.approximation import Approximator, Source
from fxprune.criteria.batch_norm import batch_norm_scale
from fxprune.criteria.class_aware import weigh_classes
from fxprune.criteria.joint import joint_paths
from fxprune.criteria.magnitude import magnitude
from fxprune.criteria.random import random
from fxprune.criteria.taylor import taylor
from fxprune.criteria.torch_pruning import torch_pruning_scores
from fxprune.discriminating import CATRO
from fxprune.eliminating import DAMPING
from fxprune.errors import PlanError
from fxprune.paths import RemovalPath
from fxprune.probing import SHARES, Probe, measured
from fxprune.problems import Choice, Problem
from fxprune.regrouping import PAM
from fxprune.separating import Separate, Shared
from fxprune.tasks import Task
from fxprune.tolerating import PAGCP
from fxprune.zipping import MTZ

__all__ = [
    "CATRO",
    "HBGS",
    "HBGTS",
    "MTZ",
    "PAGCP",
    "PAM",
    "BatchNormScale",
    "Choice",
    "FilterBackward",
    "FilterOMP",
    "FromTorchPruning",
    "Joint",
    "Magnitude",
    "Method",
    "PathMethod",
    "Problem",
    "Random",
    "SearchMethod",
    "Separate",
    "Shared",
    "Taylor",
]

Scope = Literal["uniform", "global", "optimal"]
SCOPES: tuple[Scope, ...] = ("uniform", "global", "optimal")


class Method(Protocol):
    """What `plan` asks of a method."""

    @property
    def scope(self) -> Scope:
        """How groups share.

        "uniform": all lose the same part. "global": scores over their group's mean compete. "optimal": the least sum of
        scores within the budget, which must be in one unit for all groups.
        """
        ...

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None, tasks: Mapping[str, Task] | None
    ) -> np.ndarray:
        """Return (channels,) scores; the lowest goes first.

        Args:
            coupling: the coupled network.
            calibration: the batches, as they were passed, or those of a `Calibration`; None if there are none.
            tasks: name -> Task; None if there are none.

        Returns:
            (channels,) finite numbers, anything else is a PlanError.
        """
        ...


@runtime_checkable
class PathMethod(Protocol):
    """What `plan` asks of a method that reads moments and says what every step costs every task."""

    @property
    def scope(self) -> Scope:
        """As of `Method`."""
        ...

    @property
    def rounds(self) -> int:
        """How often to plan; each time at the widths of the last plan."""
        ...

    def paths(self, coupling: Coupling, calibration: Calibration, keep: np.ndarray | None) -> Sequence[RemovalPath]:
        """Return the removal path of every group.

        Args:
            coupling: the coupled network.
            calibration: what was gathered on it.
            keep: (channels,) what the last plan keeps; None at first.
        """
        ...


@runtime_checkable
class SearchMethod(Protocol):
    """What `plan` asks of a method that searches by itself.

    If it has an attribute `compensate` that is true, `compile` gathers moments once, gives them as calibration, and
    corrects the weights that stay. If it has an attribute `decompose` that is true, it is given a network of pairs; see
    `fxprune.decomposing`. If it has a method `start`, `start(problem)(bounds)` is asked in place of `choose`, so that a
    sweep need not search anew for each budget.
    """

    def choose(self, problem: Problem) -> np.ndarray | Choice:
        """Return (channels,) bool, what to keep: within the bounds, and what `coupling.violation` accepts.

        A method that has trained the network as well returns a `Choice`.
        """
        ...


AnyMethod = Method | PathMethod | SearchMethod


@dataclass(frozen=True, slots=True)
class Joint:
    """Rank channels by what their removal costs each task's loss, once the other weights make up for it.

    Second-order errors of all layers that read a channel, in the metric of the tasks' gradients, say in which order
    channels go, and what every width of a group costs. That cost is then measured at a few widths of every group, and
    scaled. Widths are those of the least total cost within the budget; with more `rounds`, found again at those widths.
    See `fxprune.criteria.joint`. Without tasks, all outputs count alike; without data, weights and batch-norm
    statistics stand in for them (see `fxprune.assuming`), and nothing is measured.

    Attributes:
        scope: "optimal", or as of other methods.
        compensate: `compile` corrects the weights that stay; see `fxprune.compensate`.
        sequential: it corrects them layer by layer, each for what the slim network by then feeds it. The calibration
            must have its batches.
        rounds: how often to plan.
        within: weight of what varies within classes, from 0 to 1, where the means of classes have weight 1: what tells
            classes apart is kept, and of channels that tell the same, one. At 1, classes make no difference; below,
            some task needs labels, see `Task`.
        damping: added to moments before they are inverted, as a share of their mean diagonal.
        samples: how many losses are measured on, at every width that is measured; 0 for no measurement. By default as
            many as make all measurements together cost six passes over the calibration data, from 16 to 256.
    """

    scope: Scope = "optimal"
    compensate: bool = True
    sequential: bool = False
    rounds: int = 1
    within: float = 1.0
    damping: float = DAMPING
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.sequential and not self.compensate:
            raise PlanError(
                "Joint(sequential=True, compensate=False): weights are corrected or not. Leave one of them out."
            )
        if not isinstance(self.within, (int, float)) or not 0 <= self.within <= 1:
            raise PlanError(f"Joint(within={self.within!r}) is no weight. Pass a number from 0 to 1.")

    def paths(
        self, coupling: Coupling, calibration: Calibration, keep: np.ndarray | None = None
    ) -> Sequence[RemovalPath]:
        """Return the removal path of every group."""
        seen = weigh_classes(calibration, self.within)
        paths = joint_paths(coupling, seen, keep=keep, damping=self.damping, compensate=self.compensate)
        if self.samples == 0 or calibration.batches is None:
            return paths
        share = 6 * calibration.samples // (len(SHARES) * max(len(paths), 1))
        samples = min(max(share, 16), 256) if self.samples is None else self.samples
        probe = Probe(coupling, calibration, samples=samples, damping=self.damping, compensate=self.compensate)
        return measured(probe, paths)


@dataclass(frozen=True, slots=True)
class FilterOMP:
    """Rank channels by orthogonal matching pursuit: what linear combinations of the others give goes first.

    See `fxprune.criteria.approximation`, and `HBGS`, whose criterion it is. Filters are normalised in the search;
    errors and coefficients are those of the filters as they are.

    Attributes:
        on: "filters" as published, for which no data are needed, or "activations", for which calibration is.
        scope: "uniform", "global" or "optimal": errors are shares of each group's squared size.
        compensate: `compile` corrects the weights that stay.

    Source: Purohit et al. (TMLR 2024), algorithm FP-OMP.
    """

    on: Source = "filters"
    scope: Scope = "uniform"
    compensate: bool = True
    rounds: ClassVar[int] = 1

    def paths(
        self, coupling: Coupling, calibration: Calibration, keep: np.ndarray | None = None
    ) -> Sequence[RemovalPath]:
        """Return the removal path of every group."""
        return _approximated(Approximator(coupling, calibration, on=self.on, search="omp"))


@dataclass(frozen=True, slots=True)
class FilterBackward:
    """Rank channels by backward elimination: that goes next whose removal raises the error of approximation least.

    As `FilterOMP`, with the exact error `|Lam[k]|^2 / G[k, k]` of each removal; one path gives every width.

    Attributes:
        on: as of `FilterOMP`, like `scope` and `compensate`.

    Source: Purohit et al. (TMLR 2024), algorithm FP-Backward.
    """

    on: Source = "filters"
    scope: Scope = "uniform"
    compensate: bool = True
    rounds: ClassVar[int] = 1

    def paths(
        self, coupling: Coupling, calibration: Calibration, keep: np.ndarray | None = None
    ) -> Sequence[RemovalPath]:
        """Return the removal path of every group."""
        return _approximated(Approximator(coupling, calibration, on=self.on, search="backward"))


def _approximated(approximator: Approximator) -> list[RemovalPath]:
    every = np.ones(approximator.coupling.num_channels, dtype=bool)
    return [approximator.path(group, every) for group in approximator.coupling.groups()]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Rank channels by the norm of their weights. See `fxprune.criteria.magnitude`.

    Attributes:
        p: which norm.
        scope: "uniform" or "global".
    """

    p: float = 2.0
    scope: Scope = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.p, (int, float)) or not 0 < self.p < math.inf:
            raise PlanError(f"Magnitude(p={self.p!r}) is no norm to rank by. Pass a positive number such as 1 or 2.")

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None = None, tasks: Mapping[str, Task] | None = None
    ) -> np.ndarray:
        """Return (channels,) scores. No data is needed."""
        return magnitude(coupling, self.p)


@dataclass(frozen=True, slots=True)
class Taylor:
    """Rank channels by the first-order change of the loss. See `fxprune.criteria.taylor`. Needs calibration and tasks.

    The loss of each task is called as `loss(outputs, batch)`: what the network returned, and the batch as it came.

    Attributes:
        scope: "uniform" or "global".
    """

    scope: Scope = "uniform"

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None = None, tasks: Mapping[str, Task] | None = None
    ) -> np.ndarray:
        """Return (channels,) scores."""
        return taylor(coupling, calibration, tasks)


@dataclass(frozen=True, slots=True)
class BatchNormScale:
    """Rank channels by the scale of their batch norms. See `fxprune.criteria.batch_norm`.

    Attributes:
        scope: "uniform" or "global".
    """

    scope: Scope = "uniform"

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None = None, tasks: Mapping[str, Task] | None = None
    ) -> np.ndarray:
        """Return (channels,) scores. No data is needed."""
        return batch_norm_scale(coupling)


@dataclass(frozen=True, slots=True)
class FromTorchPruning:
    """Rank channels by an importance of Torch-Pruning. See `fxprune.criteria.torch_pruning`.

    Attributes:
        importance: an object of `torch_pruning.importance`. Those that read gradients need calibration and tasks.
        scope: "uniform" or "global".
    """

    importance: Any
    scope: Scope = "uniform"

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None = None, tasks: Mapping[str, Task] | None = None
    ) -> np.ndarray:
        """Return (channels,) scores."""
        return torch_pruning_scores(coupling, self.importance, calibration, tasks)


def corrects(method: AnyMethod) -> bool:
    """Say whether the weights that stay are corrected after a method's choice."""
    return isinstance(method, (PathMethod, SearchMethod)) and bool(getattr(method, "compensate", False))


def damping_of(method: AnyMethod) -> float:
    """Return the damping of that correction, as a share of the mean diagonal."""
    return float(getattr(method, "damping", DAMPING))


def is_sequential(method: AnyMethod) -> bool:
    """Say whether they are corrected layer by layer, each for what the slim network feeds it."""
    return corrects(method) and bool(getattr(method, "sequential", False))


def default_method(calibration: object) -> AnyMethod:
    """Return the method that is used where none is asked for."""
    return Magnitude() if calibration is None else Joint()


@dataclass(frozen=True, slots=True)
class Random:
    """Rank channels at random: the baseline.

    Attributes:
        seed: of the random numbers.
        scope: "uniform" or "global".
    """

    seed: int = 0
    scope: Scope = "uniform"

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None = None, tasks: Mapping[str, Task] | None = None
    ) -> np.ndarray:
        """Return (channels,) scores. No data is needed."""
        return random(coupling, self.seed)
