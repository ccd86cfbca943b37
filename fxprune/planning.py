"""What to keep: from a coupling and a budget to a plan, and from a plan back to channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxprune import agreeing, sharing
from fxprune.atoms import FIXED
from fxprune.branches import costs_of
from fxprune.budgets import Budget
from fxprune.calibrations import Calibration
from fxprune.choosing import Chooser
from fxprune.closing import owner
from fxprune.constraining import Constraints, constrain
from fxprune.costs import CostChange
from fxprune.coupling import Coupling
from fxprune.errors import ArtifactError, PlanError, check_kind
from fxprune.labels import Labels
from fxprune.methods import SCOPES, AnyMethod, PathMethod, SearchMethod, default_method
from fxprune.operands import check_model
from fxprune.pausing import without_collector
from fxprune.plans import GroupWidth, Plan, frozen
from fxprune.problems import agreed
from fxprune.tasks import Task, check_batches
from fxprune.weighing import shares_of


@torch.inference_mode(False)
@sharing.together("plan")
def plan(
    coupling: Coupling,
    budget: Budget,
    *,
    method: AnyMethod | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    tasks: Mapping[str, Task] | None = None,
    constraints: Constraints | None = None,
    on_conflict: str = "error",
) -> Plan:
    """Choose what to keep.

    Under `torchrun`, every rank asks the same and passes its own batches: rank r of n those that one process would read
    at r, r + n, r + 2n, and so on. All get the plan that one process makes of all batches.

    Args:
        coupling: from `couple`.
        budget: upper bounds.
        method: how channels are ranked; by default `methods.Joint()` with calibration, else `methods.Magnitude()`.
        calibration: batches, for methods that need data; or what `calibrate` has gathered, for those that read moments.
        tasks: name -> Task, for methods that need losses; without them, those of what `calibrate` has gathered.
        constraints: what must stay whatever the method says.
        on_conflict: where the budget and the tolerances of tasks cannot both be met, "error", or "closest" for the
            cheapest plan that was found within the tolerances.

    Raises:
        PlanError: the budget cannot be met, a pattern matches nothing, the method lacks its data, a task would get
            worse than its tolerance, or ranks differ.
    """
    check_kind(coupling, Coupling)
    check_request(budget, method, calibration, tasks, constraints, on_conflict)
    method, constraints = method or default_method(calibration), constraints or Constraints()
    agreeing.check_same_request(tasks, method=method, budget=budget, constraints=constraints, on_conflict=on_conflict)
    agreeing.check_network(coupling)
    work = without_collector(_plan) if calibration is None else _plan
    return agreeing.check_plan(
        work(coupling, budget, method, calibration, tasks, constraints, closest=on_conflict == "closest")
    )


def _plan(
    coupling: Coupling,
    budget: Budget,
    method: AnyMethod,
    calibration: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
    constraints: Constraints,
    *,
    closest: bool,
) -> Plan:
    from fxprune.restricting import restrict  # it rewrites, and rewriting reads plans

    coupling = counted(coupling, budget)
    if isinstance(calibration, Calibration):
        calibration = agreed(coupling, calibration, tasks)
        tasks = calibration.tasks
    restriction = restrict(coupling, tasks, calibration)
    dense = coupling.costs.dense
    if restriction is not None:
        coupling, calibration = restriction.part, restriction.cut(calibration)
    bound = constrain(coupling, constraints)
    chooser = Chooser(bound, method, constraints, calibration, tasks)
    keep = chooser.keep(budget.bounds(dense), closest=closest)
    chosen = plan_of(bound, keep, method=repr(method), budget=budget.to_dict())
    chosen = replace(chosen, weights=chooser.weights(keep))
    return chosen if restriction is None else restriction.widened(chosen)


def counted(coupling: Coupling, *budgets: Budget) -> Coupling:
    """Return a coupling whose costs tell all that budgets ask for: latency, macs and params over combinations of tasks.

    Raises:
        PlanError: a latency model is of another network, a task is not there, or budgets differ in either.
    """
    traced = coupling.traced
    models = list({id(b.latency_model): b.latency_model for b in budgets if b.latency_model is not None}.values())
    if len(models) > 1:
        raise PlanError("the budgets have different latency models. Pass one and the same to all.")
    if models:
        check_model(models[0], coupling.record, coupling.channels, traced.graph)
        traced = replace(traced, latency_model=models[0])
    shares = [shares_of(traced, b.combinations) for b in budgets if b.combinations is not None]
    if any(other != shares[0] for other in shares):
        raise PlanError("the budgets count over different combinations of tasks. Sweep each of them on its own.")
    if shares:
        traced = replace(traced, combinations=shares[0])
    return coupling if traced is coupling.traced else replace(coupling, traced=traced)


def check_request(
    budget: Budget,
    method: AnyMethod | None,
    calibration: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
    constraints: Constraints | None,
    on_conflict: str = "error",
) -> None:
    """Check what `plan` and `compile` are asked, as far as that needs no network.

    Raises:
        PlanError: one of them is something else.
    """
    if not isinstance(budget, Budget):
        raise PlanError(f"the budget is {budget!r}. Pass `fxprune.Budget(macs=0.5)`.")
    if on_conflict not in ("error", "closest"):
        raise PlanError(f"on_conflict={on_conflict!r} is neither 'error' nor 'closest'. Pass one of the two.")
    check_settings(method, calibration, tasks, constraints)


def check_settings(
    method: AnyMethod | None,
    calibration: Iterable[Any] | Calibration | None,
    tasks: Mapping[str, Task] | None,
    constraints: Constraints | None,
) -> None:
    """Check the types of what is asked besides budgets.

    Raises:
        PlanError: one of them is something else.
    """
    if method is not None:
        ranks = callable(getattr(method, "scores", None)) or isinstance(method, PathMethod)
        if isinstance(method, type) or not (isinstance(method, SearchMethod) or (ranks and hasattr(method, "scope"))):
            what = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
            raise PlanError(f"the method is {what}, not an instance of a method. Pass `methods.Magnitude()`.")
        if not isinstance(method, SearchMethod) and method.scope not in SCOPES:
            raise PlanError(f"the method {method!r} has scope {method.scope!r}. Pass one of {SCOPES}.")
    if not isinstance(calibration, (Calibration, type(None))):
        check_batches(calibration)
    if tasks is not None:
        if not isinstance(tasks, Mapping):
            raise PlanError(
                f"tasks is a {type(tasks).__name__}, not a mapping. Pass `tasks={{'name': fxprune.Task(loss)}}`."
            )
        for name, task in tasks.items():
            if not isinstance(name, str) or not isinstance(task, Task):
                raise PlanError(f"tasks has {name!r}: {task!r}. Pass `tasks={{'name': fxprune.Task(loss)}}`.")
        if tasks and calibration is None and all(task.classes is None for task in tasks.values()):
            raise PlanError(
                "tasks were given, and no calibration batches to measure their losses on. Pass `calibration=` with "
                "some batches of training data, or leave out `tasks`."
            )
    if constraints is not None and not isinstance(constraints, Constraints):
        raise PlanError(f"the constraints are {constraints!r}. Pass `fxprune.Constraints(min_width=8)`.")


@without_collector
def plan_of(
    coupling: Coupling, keep: np.ndarray, *, method: str = "by hand", budget: Mapping[str, float] | None = None
) -> Plan:
    """Return the plan that keeps exactly the channels `keep` (channels,) bool.

    Raises:
        PlanError: the choice breaks the coupling: a frozen channel would go, or rows would lose their balance.
    """
    problem = coupling.violation(keep, may_empty=True)
    if problem:
        raise PlanError(
            f"these channels cannot be kept: {problem}. Start from `coupling.groups()`, and call "
            "`coupling.settle(keep)`."
        )
    dense = coupling.costs.dense
    kept, sizes = _kept(coupling, keep)
    counts = sites_of_choices(coupling)
    groups = []
    for group in coupling.groups():
        choices = group.choices
        groups.append(
            GroupWidth(group.name, group.kind, int(counts[choices].max()), len(choices), int(keep[choices].sum()))
        )
    return Plan(
        kept,
        sizes,
        CostChange(dense, costs_of(coupling, keep)),
        tuple(groups),
        method,
        dict(budget or {}),
        coupling.fingerprint,
        frozen(keep.copy()),
    )


def sites_of_choices(coupling: Coupling) -> np.ndarray:
    """Return (channels,) how many dims of parameters and buffers each choice cuts."""
    per_channel = np.zeros(coupling.num_channels + 1)
    for channels, where in coupling.arrays:
        per_channel[channels] += len(where)  # once, however often a channel occurs
    return coupling.members.total(per_channel[:-1])


def _kept(coupling: Coupling, keep: np.ndarray) -> tuple[dict[tuple[str, int], np.ndarray], dict[tuple[str, int], int]]:
    kept, sizes = {}, {}
    keep = np.append(keep, True)
    frees = np.append(~coupling.is_frozen, False)
    known: dict[int, np.ndarray | None] = {}
    for name, (shape, labels) in coupling.tensors.items():
        for dim, ids in enumerate(labels):
            if ids is None:
                continue
            if ids.size != shape[dim]:
                if frees[ids].any():
                    sizes[name, dim], kept[name, dim] = shape[dim], _kept_by_row(labels, dim, keep, frees)
                continue
            home = id(owner(ids))
            if home not in known:
                known[home] = frozen(np.flatnonzero(keep[ids])) if frees[ids].any() else None
            positions = known[home]
            if positions is not None:
                sizes[name, dim], kept[name, dim] = shape[dim], positions
    return kept, sizes


def _kept_by_row(labels: Labels, dim: int, keep: np.ndarray, frees: np.ndarray) -> np.ndarray:
    """Return (rows that stay, n) positions that stay along a dim that differs from row to row."""
    ids = labels[dim]
    assert ids is not None
    rows = np.moveaxis(keep[ids], dim, -1)
    stay = np.ones(rows.shape[:-1], dtype=bool)
    for other, row in enumerate(labels):
        if other != dim and row is not None and frees[row].any():
            stay &= np.moveaxis(keep[row], dim, -1)[..., 0]
    rows = rows[stay]
    if not rows.any():
        return frozen(np.empty(0, dtype=np.int64))
    return frozen(np.nonzero(rows)[1].reshape(len(rows), -1))


def keep_of(coupling: Coupling, plan: Plan) -> np.ndarray:
    """Return the kept channels (channels,) that a plan means on a coupling.

    Raises:
        ArtifactError: the plan is of another network: which parameter, what was expected and what found.
    """
    if plan.keep is not None and plan.fingerprint == coupling.fingerprint and len(plan.keep) == coupling.num_channels:
        return plan.keep
    tensors = coupling.tensors
    keep = np.ones(coupling.num_channels + 1, dtype=bool)
    for (name, dim), positions in plan.kept.items():
        if name not in tensors or dim >= len(tensors[name][0]):
            raise ArtifactError(
                f"the plan cuts {name!r} along dim {dim}, and this network has no such parameter. Use the model class "
                "the plan was made for."
            )
        shape, labels = tensors[name]
        if shape[dim] != plan.sizes[name, dim]:
            raise ArtifactError(
                f"{name!r}: the plan expects size {plan.sizes[name, dim]} along dim {dim}, found {shape[dim]}. Use the "
                "model the plan was made for."
            )
        if positions.size and not 0 <= positions.min() <= positions.max() < shape[dim]:
            raise ArtifactError(
                f"{name!r}: the plan keeps position {positions.max()} along dim {dim}, which has size {shape[dim]}. "
                "The plan is damaged."
            )
        ids = labels[dim]
        by_row = ids is not None and ids.size != shape[dim]
        if positions.size and positions.ndim != 1 + by_row:
            expected, found = ("rows of positions", "one row") if by_row else ("one row of positions", "several")
            raise ArtifactError(
                f"{name!r} along dim {dim}: expected {expected}, found {found}. The plan is damaged, or of another "
                "network."
            )
        if ids is None or positions.ndim > 1:
            continue
        if not positions.size:
            keep[ids] = False
            continue
        gone = np.ones(shape[dim], dtype=bool)
        gone[positions] = False
        keep[ids.ravel()[gone]] = False
    keep = _rows_of(plan, tensors, keep)
    keep = _parents_of(coupling, keep)
    keep[FIXED] = True
    return _checked(coupling, plan, keep[:-1])


def _parents_of(coupling: Coupling, keep: np.ndarray) -> np.ndarray:
    """Let parents go that occur in no parameter: those of crossings that are gone although their other parent stays."""
    p, known = coupling.products, np.append(coupling.has_site, False)
    for parent, other in ((p.row, p.column), (p.column, p.row)):
        gone = known[p.channel] & ~keep[p.channel] & ~known[parent] & known[other] & keep[other]
        keep[parent[gone]] = False
    return keep


def _rows_of(plan: Plan, tensors: Mapping[str, Any], keep: np.ndarray) -> np.ndarray:
    """Read off what the rows of grouped parameters keep."""
    for (name, dim), positions in plan.kept.items():
        if positions.ndim < 2:
            continue
        shape, labels = tensors[name]
        ids = np.moveaxis(labels[dim], dim, -1).reshape(-1, shape[dim])
        first = plan.kept.get((name, 0))
        rows = range(len(ids)) if first is None or first.ndim > 1 else first
        for row, stays in zip(rows, positions, strict=False):
            gone = np.ones(shape[dim], dtype=bool)
            gone[stays] = False
            keep[ids[row][gone]] = False
    return keep


def _checked(coupling: Coupling, plan: Plan, keep: np.ndarray) -> np.ndarray:
    keep = coupling.settle(keep)
    found, _ = _kept(coupling, keep)
    for (name, dim), positions in plan.kept.items():
        mine = found.get((name, dim))
        if mine is None or not np.array_equal(mine, positions):
            have = "all positions" if mine is None else f"{mine.shape[-1]} positions"
            raise ArtifactError(
                f"{name!r}: the plan keeps {positions.shape[-1]} positions along dim {dim}, but the channels coupled "
                f"to them leave {have}. The plan is damaged, or of another network."
            )
    return keep
