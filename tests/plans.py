"""Random legal plans: every one keeps what must stay and leaves balanced rows equally long."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import fx, nn

import fxprune
from fxprune.allocating import steps_of_all
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.paths import paths_by_score
from fxprune.planning import plan_of
from fxprune.plans import Plan
from fxprune.rewriting import plan_and_rewrite


def random_keep(coupling: Coupling, seed: int) -> np.ndarray:
    """Return kept channels (channels,): every group gives up a random number of steps of a random order."""
    rng = np.random.default_rng(seed)
    allocation = steps_of_all(
        coupling, paths_by_score(coupling, rng.random(coupling.num_channels)), "uniform", Constraints()
    )
    taken = np.zeros(len(allocation), dtype=bool)
    for group in np.unique(allocation.group):
        steps = np.flatnonzero(allocation.group == group)
        taken[steps[: rng.integers(0, len(steps) + 1)]] = True
    return allocation.keep(taken)


def random_plan(coupling: Coupling, seed: int) -> Plan:
    """Return a random legal plan; the same for the same seed."""
    return plan_of(coupling, random_keep(coupling, seed))


def all_kept(coupling: Coupling) -> Plan:
    """Return the plan that removes nothing."""
    return plan_of(coupling, np.ones(coupling.num_channels, dtype=bool))


def cut(model: nn.Module, inputs: Any, seed: int | None) -> tuple[Coupling, Plan, fx.GraphModule]:
    """Trace, couple and rewrite by a random plan (None: keep all); freeze what cannot be rewritten."""
    choose = all_kept if seed is None else partial(random_plan, seed=seed)
    return plan_and_rewrite(fxprune.couple(fxprune.trace(model, inputs)), choose)[:3]
