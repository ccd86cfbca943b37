"""The one call, as five steps: trace, couple, plan, rewrite, verify."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from tqdm.auto import tqdm

from fxprune.budgets import Budget
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.errors import PlanError, RewriteError
from fxprune.methods import Method
from fxprune.planning import Plan, plan
from fxprune.reporting import Compiled, make_report
from fxprune.rewriting import rewrite
from fxprune.saving import describe_inputs
from fxprune.slimming import RECORD
from fxprune.tasks import Task
from fxprune.tracing import Traced, trace
from fxprune.verifying import verify as verify_slim

logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""How often planning starts over with nodes frozen whose sizes cannot be rewritten."""


def compile(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    method: Method | None = None,
    calibration: Iterable[Any] | None = None,
    tasks: Mapping[str, Task] | None = None,
    constraints: Constraints | None = None,
    verify: bool = True,
    unknown: str = "freeze",
    progress: bool = True,
) -> fx.GraphModule:
    """Make a trained network physically smaller.

    Args:
        model: any module. It is not touched.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; costs are counted on them.
        budget: upper bounds, such as `Budget(macs=0.5)`.
        method: how channels are ranked, from `fxprune.methods`; default `Magnitude()`.
        calibration: batches `(inputs, targets)`, for methods that need data.
        tasks: name -> Task, for methods that need losses.
        constraints: what must stay whatever the method says.
        verify: compare the slim network with the masked original in float64. Without it nothing is run on the original.
        unknown: what to do about ops without a rule: "freeze" what reaches them, or "error".
        progress: show a progress bar.

    Returns:
        The slim network: same forward signature, outputs and parameter names. `fxprune.report(slim)` tells what was
        done.

    Raises:
        TraceError: the model cannot be traced, or does not run on the example inputs.
        CouplingError: `unknown="error"`, and there are ops without a rule.
        PlanError: the budget cannot be met, or the request makes no sense.
        VerificationError: the slim network differs from the masked original.
    """
    if not isinstance(budget, Budget):
        raise PlanError(f"the budget is {budget!r}. Pass `fxprune.Budget(macs=0.5)`.")
    with tqdm(
        total=5, desc="trace", disable=not progress, bar_format="{desc:<8} {bar:20} {n}/{total} [{elapsed}]"
    ) as bar:

        def step(name: str) -> None:
            bar.update()
            bar.set_description(name)

        traced = trace(model, example_inputs)
        step("couple")
        coupling = couple(traced, unknown=unknown)
        step("plan")
        coupling, chosen, slim, freeze = _plan_and_rewrite(
            traced, coupling, unknown, budget, method, calibration, tasks, constraints
        )
        step("verify")
        bar.update()
        verification = verify_slim(coupling, chosen, slim) if verify else None
        step("done")
    notes = tuple(f"node {node!r} was frozen: {reason}" for node, reason in freeze.items())
    report = make_report(coupling, chosen, verification, notes)
    slim.meta[RECORD] = Compiled(report, describe_inputs(traced.args, traced.kwargs), unknown, freeze)
    return slim


def _plan_and_rewrite(
    traced: Traced,
    coupling: Coupling,
    unknown: str,
    budget: Budget,
    method: Any,
    calibration: Any,
    tasks: Any,
    constraints: Any,
) -> tuple[Coupling, Plan, fx.GraphModule, dict[str, str]]:
    """Plan and rewrite; where sizes in the graph cannot be rewritten, freeze those nodes and start over."""
    freeze: dict[str, str] = {}
    for attempt in range(ATTEMPTS):
        chosen = plan(coupling, budget, method=method, calibration=calibration, tasks=tasks, constraints=constraints)
        try:
            return coupling, chosen, rewrite(coupling, chosen), freeze
        except RewriteError as error:
            fresh = {node: reason for node, reason in error.nodes.items() if node not in freeze}
            if not fresh or attempt == ATTEMPTS - 1:
                raise
            logger.info("frozen and planned again: %s", fresh)
            freeze |= {node: f"holds a size that cannot be rewritten ({reason})" for node, reason in fresh.items()}
            coupling = couple(traced, unknown=unknown, freeze=freeze)
    raise AssertionError("unreachable")
