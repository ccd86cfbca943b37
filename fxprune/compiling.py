"""The one call, as five steps: trace, couple, plan, rewrite, verify."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import fx, nn
from tqdm import tqdm

from fxprune import sharing
from fxprune.budgets import Budget
from fxprune.calibrating import Calibration
from fxprune.cloning import submodule
from fxprune.compensating import check_batches, compensate, take_over
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling, couple
from fxprune.decomposing import plan_decomposed
from fxprune.errors import PlanError, RewriteError
from fxprune.methods import AnyMethod, PathMethod, SearchMethod, corrects, damping_of, default_method, is_sequential
from fxprune.planning import check_request, plan
from fxprune.plans import Plan
from fxprune.problems import gathered
from fxprune.reporting import Compiled, make_report
from fxprune.rewriting import rewrite
from fxprune.saving import describe_inputs
from fxprune.slimming import RECORD
from fxprune.tasks import Task
from fxprune.traced import Traced
from fxprune.tracing import trace
from fxprune.verifying import verify as verify_slim
from fxprune.weighing import described

logger = logging.getLogger(__name__)

BAR = "{desc:<8} {bar:20} {n}/{total} [{elapsed}]"


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
        check_batches(batches)
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
            coupling, chosen, slim, freeze = _plan_and_rewrite(coupling, unknown, choose)
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
    slim.meta[RECORD] = Compiled(report, describe_inputs(traced.args, traced.kwargs), freeze, names)
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


def _plan_and_rewrite(
    coupling: Coupling, unknown: str, choose: Callable[[Coupling], Plan]
) -> tuple[Coupling, Plan, fx.GraphModule, dict[str, str]]:
    """Plan and rewrite; where sizes in the graph cannot be rewritten, freeze those nodes and start over.

    Each round freezes a node more, so that this ends.

    Returns:
        The coupling and the plan of the last round, the slim network, and the nodes frozen: node -> reason.
    """
    traced = coupling.traced
    freeze: dict[str, str] = {}
    while True:
        try:
            chosen = choose(coupling)
        except PlanError as error:
            if not freeze:
                raise
            lines = [f"  node {node!r}{traced.where(node)} {reason}" for node, reason in freeze.items()]
            raise PlanError(f"{error}\nThese nodes were frozen before:\n" + "\n".join(lines)) from error
        try:
            return coupling, chosen, rewrite(coupling, chosen), freeze
        except RewriteError as error:
            fresh = {node: _why(traced, node, reason) for node, reason in error.nodes.items() if node not in freeze}
            if not fresh:
                raise
        logger.info("frozen and planned again: %s", fresh)
        freeze |= fresh
        coupling = couple(traced, unknown=unknown, freeze=freeze)


def _why(traced: Traced, name: str, reason: str) -> str:
    """Say why a node whose sizes cannot be rewritten is frozen."""
    node = next(n for n in traced.graph.nodes if n.name == name)
    if node.op != "call_module":
        return f"holds a size that cannot be rewritten ({reason})"
    kind = type(submodule(traced.root, str(node.target)))
    known = f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
    article = "an" if known[0] in "aeiounAEIOU" else "a"
    return f"is {article} {known}, whose sizes cannot be rewritten yet ({reason})"
