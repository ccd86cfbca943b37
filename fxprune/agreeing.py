"""Ranks agree: the same network and request before planning, and the same plan after."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from fxprune import sharing
from fxprune.coupling import Coupling
from fxprune.plans import Plan
from fxprune.tasks import Task
from fxprune.values import hash_of


def check_network(coupling: Coupling) -> None:
    """Check that all ranks have the same network, with the same weights.

    Raises:
        PlanError: they do not: what differs.
    """
    if sharing.size() == 1:
        return
    facts = {"the hash of the coupling": coupling.fingerprint}
    facts |= {f"the hash of {name!r}": hash_of(tensor) for name, tensor, _ in coupling.traced.state}
    sharing.same(
        "the network",
        facts,
        "Give every rank the same model and example inputs, and the weights of the first: `for t in "
        "model.state_dict().values(): torch.distributed.broadcast(t, 0)`.",
    )


def check_same_request(tasks: Mapping[str, Task] | None, **settings: object) -> None:
    """Check that all ranks are asked the same, as far as it prints: of tasks all but the loss.

    Raises:
        PlanError: they are not: what differs.
    """
    if sharing.size() > 1:
        what = settings | {"tasks": {name: _settings(task) for name, task in (tasks or {}).items()}}
        facts = {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)) for name, value in what.items()}
        sharing.same("the request", facts, "Pass the same on every rank; only the batches differ.")


def check_plan(plan: Plan) -> Plan:
    """Return a plan; check that it is the same on all ranks.

    Raises:
        PlanError: it is not.
    """
    if sharing.size() > 1:
        sharing.same(
            "the plan",
            {"its hash": plan.digest},
            "Plan with the same model, budget, method and calibration on every rank; only the batches differ. A method "
            "of one's own that reads batches must add up over ranks what it finds.",
        )
    return plan


def _settings(task: Task) -> dict[str, object]:
    return {f.name: getattr(task, f.name) for f in fields(task) if f.name != "loss"}
