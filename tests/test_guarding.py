"""Tolerances: the worst task decides, on data that planning has not seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, PlanError, Task, methods
from fxprune.calibrating import calibrate, split
from fxprune.probing import Probe


class TwoTasks(nn.Module):
    """A shared trunk and two heads; `fit` gives each something to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.more = nn.Linear(10, 48), nn.Linear(48, 32)
        self.easy, self.hard = nn.Linear(32, 2), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.more(self.trunk(x).relu()).relu()
        return self.easy(x), self.hard(x)


def easy(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs[0], batch[1][0])


def hard(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs[1], batch[1][1])


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(1024, 10, generator=generator)
    targets = torch.sin(2 * x @ torch.randn(10, 2, generator=generator)) + x[:, :2], torch.cos(3 * x[:, :6])
    model = TwoTasks()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        outputs = model(x)
        (F.mse_loss(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])).backward()
        optimizer.step()
    return model.eval(), [(x[i : i + 128], tuple(t[i : i + 128] for t in targets)) for i in range(0, 1024, 128)]


def tasks(easy_limit: float | None, hard_limit: float | None) -> dict[str, Task]:
    return {"easy": Task(easy, easy_limit), "hard": Task(hard, hard_limit)}


def worse(coupling: fxprune.Coupling, plan: fxprune.Plan, data: list[Any]) -> dict[str, float]:
    """Return how much the losses of the rewritten network are above the dense one's on the held-out batches."""
    slim, held_out = fxprune.rewrite(coupling, plan), split(data)[1]
    found = {}
    with torch.no_grad():
        for name, loss in (("easy", easy), ("hard", hard)):
            after, before = (sum(float(loss(m(b[0]), b)) for b in held_out) for m in (slim, coupling.traced.model))
            found[name] = after / before - 1
    return found


def test_every_fourth_batch_is_held_out() -> None:
    used, held_out = map(list, split(range(10)))
    assert (used, held_out) == ([0, 2, 3, 4, 6, 7, 8], [1, 5, 9])
    with pytest.raises(PlanError, match="the calibration has 1 batch"):
        split([0])


@pytest.mark.parametrize("method", [methods.Magnitude(), methods.Joint(compensate=False)])
def test_a_conflict_names_the_worst_task_and_closest_stays_inside(fitted: Any, method: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    asked: dict[str, Any] = {"method": method, "calibration": data, "tasks": tasks(0.5, 0.5)}
    with pytest.raises(PlanError, match=r"at macs 20\.0%, the loss of task '(easy|hard)' rises by \d+\.\d%"):
        fxprune.plan(coupling, Budget(macs=0.2), **asked)
    plan = fxprune.plan(coupling, Budget(macs=0.2), on_conflict="closest", **asked)
    assert 0.2 < plan.costs.share("macs") < 1
    assert max(worse(coupling, plan, data).values()) <= 0.5


def test_tolerances_that_hold_change_nothing(fitted: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    method = methods.Magnitude()
    loose = fxprune.plan(coupling, Budget(macs=0.6), method=method, calibration=data, tasks=tasks(1e6, None))
    assert np.array_equal(loose.keep, fxprune.plan(coupling, Budget(macs=0.6)).keep)


def test_tasks_are_weighed_anew_so_that_the_weaker_one_is_protected(fitted: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    free = fxprune.plan(coupling, Budget(macs=0.7), method=methods.Joint(), calibration=data, tasks=tasks(None, None))
    found = calibrate(coupling, split(data)[0], tasks(None, None))
    probe = Probe(coupling, found, damping=0.01, compensate=True, batches=split(data)[1])
    rises = (probe.losses(free.keep) - probe.dense) / probe.dense
    weaker = int(np.argmax(rises))
    limits: list[float | None] = [None, None]
    limits[weaker] = 0.8 * float(rises[weaker])
    guarded = fxprune.plan(
        coupling,
        Budget(macs=0.7),
        method=methods.Joint(),
        calibration=data,
        tasks=tasks(*limits),
        on_conflict="closest",
    )
    after = (probe.losses(guarded.keep) - probe.dense) / probe.dense
    assert after[weaker] <= limits[weaker] * (1 + 1e-6)


def test_what_is_asked_wrongly_has_its_error(fitted: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    with pytest.raises(PlanError, match="neither 'error' nor 'closest'"):
        fxprune.plan(coupling, Budget(macs=0.5), on_conflict="never")
    with pytest.raises(PlanError, match="no calibration batches"):
        fxprune.plan(coupling, Budget(macs=0.5), tasks=tasks(0.1, 0.1))


def test_tolerances_beside_a_calibration_count(fitted: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    used, held_out = map(list, split(data))
    found = calibrate(coupling, used, tasks(None, None))
    assert fxprune.plan(coupling, Budget(macs=0.2), calibration=found).costs.share("macs") <= 0.2
    asked: dict[str, Any] = {"calibration": found, "tasks": tasks(0.5, 0.5)}
    for call in (fxprune.plan, lambda c, b, **k: fxprune.sweep(c, [b], **k)):
        with pytest.raises(PlanError, match="held out, and this calibration has none"):
            call(coupling, Budget(macs=0.2), **asked)
        with pytest.raises(PlanError, match=r"the loss of task '(easy|hard)' rises by"):
            call(coupling, Budget(macs=0.2), **asked | {"calibration": replace(found, held_out=held_out)})


@pytest.mark.parametrize("method", [methods.Joint(), methods.PAGCP(), methods.Taylor(), methods.HBGS(decompose=True)])
def test_tasks_that_a_calibration_was_not_gathered_with_are_refused(fitted: Any, method: Any) -> None:
    model, data = fitted
    example, half = data[0][0], Budget(macs=0.5)
    coupling = fxprune.couple(fxprune.trace(model, example))
    asked: dict[str, Any] = {"method": method, "progress": False}
    found = calibrate(coupling, data, tasks(None, None))
    with pytest.raises(PlanError, match=r"with the tasks \['easy', 'hard'\], and the tasks are \['other'\]"):
        fxprune.compile(model, example, half, calibration=found, tasks={"other": Task(easy)}, **asked)
    of_two = tasks(None, None) | {"hard": Task(hard, classes=[0, 1])}
    with pytest.raises(PlanError, match=r"for all classes of task 'hard', and the task is of the classes \[0, 1\]"):
        fxprune.compile(model, example, half, calibration=found, tasks=of_two, **asked)
    with pytest.raises(PlanError, match="gathered without tasks"):
        fxprune.compile(model, example, half, calibration=calibrate(coupling, data), tasks=tasks(None, None), **asked)


def test_losses_beside_a_calibration_are_those_measured_in_any_order(fitted: Any) -> None:
    model, data = fitted
    coupling = fxprune.couple(fxprune.trace(model, data[0][0]))
    found = calibrate(coupling, data, tasks(None, None))
    twice = {"hard": Task(hard), "easy": Task(lambda outputs, batch: 2 * easy(outputs, batch) + 1)}
    rises = [
        fxprune.sweep(coupling, [Budget(macs=0.7)], method=methods.Magnitude(), calibration=found, tasks=some)[0].rises
        for some in (None, twice)
    ]
    assert list(rises[1]) == ["easy", "hard"]
    assert rises[0]["hard"] == rises[1]["hard"]
    assert rises[0]["easy"] != rises[1]["easy"]
