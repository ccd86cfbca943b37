"""A sweep is what single plans are, with the losses that the rewritten networks have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small import Chain
from torch import Tensor

import fxprune
from fxprune import Budget, PlanError, Task, methods

BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
BUDGETS = [Budget(macs=m) for m in (0.8, 0.5, 0.3)]


def loss(outputs: Any, batch: Tensor) -> Tensor:
    return (outputs - 1).square().mean()


TASKS = {"one": Task(loss)}


def coupled() -> fxprune.Coupling:
    torch.manual_seed(0)
    return fxprune.couple(fxprune.trace(Chain().eval(), BATCHES[0]))


@pytest.mark.parametrize("method", [methods.Magnitude(), methods.Taylor(), methods.Joint()], ids=str)
def test_points_are_the_plans_and_the_losses_of_their_networks(method: Any) -> None:
    coupling = coupled()
    found = fxprune.sweep(coupling, BUDGETS, method=method, calibration=BATCHES, tasks=TASKS)
    assert len(found) == 3
    calibration = fxprune.calibrate(coupling, BATCHES, TASKS)
    for point, budget in zip(found, BUDGETS, strict=True):
        data = calibration if isinstance(method, methods.Joint) else BATCHES
        alone = fxprune.plan(coupling, budget, method=method, calibration=data, tasks=TASKS)
        assert np.array_equal(point.plan.keep, alone.keep)
        slim = fxprune.rewrite(coupling, point.plan)
        if isinstance(method, methods.Joint):
            fxprune.compensate(coupling, point.plan, slim, replace(calibration, batches=None))
        with torch.no_grad():
            after, before = (np.mean([float(loss(m(x), x)) for x in BATCHES]) for m in (slim, coupling.traced.model))
        assert point.rises["one"] == pytest.approx(after / before - 1, rel=1e-3, abs=1e-5)
    assert "one loss" in str(found)
    assert str(found).count("\n") == 4


def test_sweeps_need_no_data_and_say_what_is_wrong() -> None:
    coupling = coupled()
    found = fxprune.sweep(coupling, iter(BUDGETS))
    assert found[1].rises == {}
    assert found[1].plan.costs.share("macs") <= 0.5
    with pytest.raises(PlanError, match="was given no budgets"):
        fxprune.sweep(coupling, [])
    with pytest.raises(PlanError, match="was given one budget, not several"):
        fxprune.sweep(coupling, Budget(macs=0.5))  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=r"the budget is 0\.5"):
        fxprune.sweep(coupling, [0.5])  # pyright: ignore[reportArgumentType]
