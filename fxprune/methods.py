"""Named methods: a criterion that scores channels, and the scope in which they are ranked.

A method is a frozen dataclass with `scope` and `scores(coupling, calibration, tasks) -> (channels,) array`; a lower
score goes first. Any object with these two works as `method=`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from fxprune.coupling import Coupling
from fxprune.criteria.batch_norm import batch_norm_scale
from fxprune.criteria.magnitude import magnitude
from fxprune.criteria.random import random
from fxprune.criteria.taylor import taylor
from fxprune.tasks import Task

__all__ = ["BatchNormScale", "Magnitude", "Method", "Random", "Taylor"]

Scope = Literal["uniform", "global"]
SCOPES: tuple[Scope, ...] = ("uniform", "global")


class Method(Protocol):
    """What `plan` asks of a method."""

    @property
    def scope(self) -> Scope:
        """How groups share: "uniform" (all lose the same part) or "global" (scores over their group's mean compete)."""
        ...

    def scores(
        self, coupling: Coupling, calibration: Iterable[Any] | None, tasks: Mapping[str, Task] | None
    ) -> np.ndarray:
        """Return (channels,) scores; the lowest goes first."""
        ...


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Rank channels by the norm of their weights. See `fxprune.criteria.magnitude`.

    Attributes:
        p: which norm.
        scope: "uniform" or "global".
    """

    p: float = 2.0
    scope: Scope = "uniform"

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
