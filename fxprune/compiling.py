"""The one call, as five steps: trace, couple, plan, rewrite, verify."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from fxprune import sharing
from fxprune.budgets import Budget
from fxprune.calibrations import Calibration
from fxprune.compensating import check_sequential, compensate, take_over
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.decomposing import plan_decomposed
from fxprune.methods import AnyMethod, PathMethod, SearchMethod, corrects, damping_of, default_method, is_sequential
from fxprune.planning import check_request, plan
from fxprune.problems import gathered
from fxprune.reporting import Compiled, make_report
from fxprune.rewriting import plan_and_rewrite, rewrite
from fxprune.saving import describe_inputs
from fxprune.slimming import RECORD
from fxprune.tasks import Task
from fxprune.tracing import trace
from fxprune.verifying import verify as verify_slim
from fxprune.weighing import described

BAR = "{desc:<8} {bar:20} {n}/{total} [{elapsed}]"


@torch.inference_mode(False)
@sharing.together("compile")
def compile(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    method: AnyMethod | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    tasks: Mapping[str, Task] | None = None,
    constraints: Constraints | None = None,
    on_conflict: str = "error",
    verify: bool = True,
    unknown: str = "freeze",
    progress: bool = True,
) -> fx.GraphModule:
    """Make a trained network physically smaller.

    Args:
        model: any module. It is not touched.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; costs are counted on them.
        budget: upper bounds, such as `Budget(macs=0.5)`.
        method: how channels are ranked, from `fxprune.methods`; by default `Joint()` with calibration, else
            `Magnitude()`.
        calibration: batches `(inputs, targets)`, for methods that need data; an iterator is read into a list. Under
            `torchrun`, each rank passes its own, and all get the same network; see `plan`.
        tasks: name -> Task, for methods that need losses.
        constraints: what must stay whatever the method says.
        on_conflict: where the budget and the tolerances of tasks cannot both be met, "error" or "closest"; see `plan`.
        verify: compare the slim network with the masked original in float64, before its weights are corrected. Without
            it and without calibration, the original is run only to trace it.
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
        RewriteError: a node cannot be rewritten although what reaches it was frozen: a mistake in a rule.
    """
    check_request(budget, method, calibration, tasks, constraints, on_conflict)
    method = method or default_method(calibration)
    batches = list(calibration) if isinstance(calibration, Iterator) else calibration  # it is read more than once
    if is_sequential(method):
        check_sequential(batches)
    with tqdm(total=5, desc="trace", disable=not progress or sharing.rank() > 0, bar_format=BAR) as bar:
        traced = trace(model, example_inputs)
        _step(bar, "couple")
        coupling = couple(traced, unknown=unknown)
        _step(bar, "plan")
        request: dict[str, Any] = {
            "budget": budget, "method": method, "tasks": tasks, "constraints": constraints, "on_conflict": on_conflict
        }  # fmt: skip
        names: tuple[str, ...] = ()
        if getattr(method, "decompose", False):
            found = plan_decomposed(coupling, **request, calibration=batches, unknown=unknown)
            names, known, freeze = found.names, found.calibration, {}
            coupling, chosen = found.coupling, found.plan
            slim = rewrite(coupling, chosen)
        else:
            known = _read(coupling, method, batches, tasks)
            choose = partial(plan, **request, calibration=known)
            coupling, chosen, slim, freeze = plan_and_rewrite(coupling, choose, unknown=unknown)
        bar.update()
        _step(bar, "verify")
        verification = verify_slim(coupling, chosen, slim) if verify else None
        if chosen.weights is not None:
            take_over(chosen, slim)
        elif isinstance(known, Calibration) and corrects(method):
            compensate(coupling, chosen, slim, known, damping=damping_of(method), sequential=is_sequential(method))
        _step(bar, "done")
    notes = tuple(f"node {node!r} was frozen: {reason}" for node, reason in freeze.items())
    notes += () if budget.latency_model is None else budget.latency_model.warnings()
    notes += () if budget.combinations is None else (described(traced, budget.combinations),)
    report = make_report(coupling, chosen, verification, notes)
    slim.meta[RECORD] = Compiled(
        report, describe_inputs(traced.args, traced.kwargs), freeze, names, training=traced.model.training
    )
    return slim


def _step(bar: tqdm[Any], name: str) -> None:
    bar.update()
    bar.set_description(name)


def _read(
    coupling: Coupling,
    method: AnyMethod,
    batches: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
) -> Iterable[Any] | Calibration | None:
    """Return what planning reads: the batches, or moments, where the method or the correction needs them."""
    measures = isinstance(method, SearchMethod)  # on batches, so that nothing can be assumed in their place
    if isinstance(method, PathMethod) or (corrects(method) and not (measures and batches is None)):
        return gathered(coupling, method, batches, tasks)
    return batches
