"""Every method on the list of traps: what is cut is exact, whoever chose it; what cannot be planned is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch_pruning
from test_traps import made
from torch import Tensor
from traps import TRAPS

import fxprune
from fxprune import methods
from fxprune.values import tensors_in

METHODS = {
    "joint": methods.Joint(samples=2),
    "joint, uniform": methods.Joint(scope="uniform", compensate=False, samples=0),
    "pagcp": methods.PAGCP(initial_rate=1.0, global_tolerance=1e6),
    "pagcp, fast": methods.PAGCP(fast=True, compensate=True, initial_rate=1.0, global_tolerance=1e6),
    "taylor, global": methods.Taylor(scope="global"),
    "magnitude, global": methods.Magnitude(scope="global"),
    "from torch-pruning": methods.FromTorchPruning(torch_pruning.importance.MagnitudeImportance()),
}
REFUSED = {("from torch-pruning", "grouped transposed convolution"): "raised on the group of 'up.weight': IndexError"}
COARSE = ("pagcp", "pagcp, fast")
"""A step of these is a twentieth of a unit, or one channel, whatever that costs."""


def squares(outputs: Any, _: Any) -> Tensor:
    return sum((y.abs().square().mean() for y in tensors_in(outputs)), start=Tensor([0.0]).sum())


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_chooses_is_exact_on_every_trap(method: str) -> None:
    wrong = {}
    for name, trap in TRAPS.items():
        batches = [(trap.inputs, None)] * 2
        tasks = {"squares": fxprune.Task(squares)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = made(trap)
        request: dict[str, Any] = {"method": METHODS[method], "calibration": batches, "tasks": tasks}
        try:
            slim = fxprune.compile(model, trap.inputs, fxprune.Budget(macs=trap.macs), progress=False, **request)
        except fxprune.PlanError as error:
            if REFUSED.get((method, name), "never") not in str(error):
                wrong[name] = str(error)
            continue
        report = fxprune.report(slim)
        assert report.verification is not None
        share = report.costs.share("macs")
        least = 0.2 if method in COARSE else 0.6
        if not (report.verification.worst < 1e-9 and least * trap.macs < share <= trap.macs):
            wrong[name] = f"error {report.verification.worst:.1e}, {share:.1%} of macs left"
    assert not wrong
