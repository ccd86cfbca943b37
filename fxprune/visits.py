"""What a search of units notes: each visit, where it is, and what it has found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Visit:
    """What a visit to a unit has found.

    Attributes:
        group: index of the group.
        ratio: the last ratio that held; 0 where none did.
        steps: how many steps of the group's path that takes.
        rise: by how much the sum of all losses rose.
        saved: how many multiply-accumulates it saves after the units before it.
        task: which task stopped it; None where none did, or a block was confirmed as a whole.
    """

    group: int
    ratio: float
    steps: int
    rise: float
    saved: int
    task: str | None

    @property
    def price(self) -> float:
        """The rise per multiply-accumulate."""
        return self.rise / self.saved if self.saved else math.inf


@dataclass(frozen=True, slots=True)
class State:
    """Where a search is.

    Attributes:
        number: of the round, from 0.
        gone: channels that went in the rounds before.
        base: (tasks,) losses that candidates are compared with.
        tolerance: of the next unit.
        visits: of this round.
        evaluations: how often losses were measured on all batches.
        scale: (tasks,) how many times what is forecast has turned out to be; 1 without `fast`.
        done: the budget is met: `gone` is the answer.
    """

    number: int
    gone: tuple[int, ...]
    base: tuple[float, ...]
    tolerance: float
    visits: tuple[Visit, ...]
    evaluations: int
    scale: tuple[float, ...]
    done: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found.

    Attributes:
        keep: (channels,) what to keep.
        rounds: how many rounds it took.
        evaluations: how often losses were measured on all batches.
        visits: of the last round.
    """

    keep: np.ndarray
    rounds: int
    evaluations: int
    visits: tuple[Visit, ...]
