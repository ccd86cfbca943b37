"""Budgets over combinations of tasks: what is counted is what the selected networks take, by the counters of torch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations as subsets
from typing import Any

import numpy as np
import pytest
import torch
import two_tasks
from hypothesis import given, settings
from plans import cut, random_keep
from small import Chain, macs_by_torch, settled
from strategies import Network, build, example_inputs, networks
from torch import Tensor, nn

import fxprune
from fxprune import Budget, Constraints, PlanError, methods
from fxprune.allocating import steps_of_all
from fxprune.paths import paths_in_any_order
from fxprune.planning import counted, plan_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TASKS = ("seg", "depth", "present")
ALL = [names for count in (1, 2, 3) for names in subsets(TASKS, count)]
GIVEN = {("seg",): 3, ("depth", "seg"): 2, ("present", "seg", "depth"): 1}


class Heads(nn.Module):
    """All tasks share a trunk; two of them share a block and a table without labels besides."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.grow, self.back = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 1)
        self.shift = nn.Parameter(torch.randn(1))
        self.seg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1))
        self.depth = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.present = nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        y = x + self.back(self.grow(x).relu()) + self.shift
        return {"seg": self.seg(y), "depth": self.depth(y), "present": self.present(x.mean((2, 3)))}


def coupled(model: nn.Module | None = None) -> fxprune.Coupling:
    return fxprune.couple(fxprune.trace(settled(Heads()) if model is None else model, X))


def independent(slim: Any, shares: Mapping[tuple[str, ...], float]) -> tuple[float, float]:
    """Return the weighted means of macs and params over networks of some tasks each."""
    total, macs, params = sum(shares.values()), 0.0, 0.0
    for tasks, share in shares.items():
        some = fxprune.select_tasks(slim, tasks)
        macs += share / total * macs_by_torch(some, X)
        params += share / total * sum(p.numel() for p in some.parameters())
    return macs, params


# what is counted


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_means_over_the_selected_networks(seed: int) -> None:
    coupling = coupled()
    keep = random_keep(coupling, seed)
    slim = fxprune.rewrite(coupling, plan_of(coupling, keep))
    for combinations, shares in {"mean": dict.fromkeys(ALL, 1), "max": {TASKS: 1}, None: GIVEN}.items():
        costs = counted(coupling, Budget(macs=0.5, combinations=combinations or GIVEN)).costs(keep)
        assert costs.to_dict().keys() >= {"combined_macs", "combined_params"}
        assert np.abs(np.subtract((costs.combined_macs, costs.combined_params), independent(slim, shares))).max() < 0.51
        if combinations == "max":
            assert (costs.combined_macs, costs.combined_params) == (costs.macs, costs.params)


@given(network=networks().filter(lambda network: len(network.outputs) > 1))
@settings(max_examples=10)
def test_figures_of_random_networks_are_those_of_their_combinations(network: Network) -> None:
    model, inputs = build(network), example_inputs(network)
    coupling, plan, slim = cut(model, inputs, seed=1)
    assert plan.keep is not None
    entries = list(fxprune.combination_costs(slim, inputs))
    costs = counted(coupling, Budget(macs=0.5, combinations="mean")).costs(plan.keep)
    most = counted(coupling, Budget(macs=0.5, combinations="max")).costs(plan.keep)
    assert costs.combined_params == round(np.mean([entry.costs.params for entry in entries]))
    assert most.combined_params == max(entry.costs.params for entry in entries)
    if entries[-1].costs.macs == costs.macs:  # else torch takes another way through what is left, as through one head
        assert costs.combined_macs == round(np.mean([entry.costs.macs for entry in entries]))
        assert most.combined_macs == max(entry.costs.macs for entry in entries)


def test_macs_of_several_parts_at_once_are_those_of_each() -> None:
    coupling = counted(coupled(), Budget(macs=0.5, combinations=GIVEN))
    keep = random_keep(coupling, 3)
    gone = np.flatnonzero(~keep & ~coupling.entangled)[:5]
    part = np.full(coupling.num_channels, -1)
    part[gone] = np.arange(len(gone))
    alone = [coupling.costs(keep | (part == i)).combined_macs for i in range(len(gone))]
    assert len(gone) == 5
    assert np.allclose(coupling.costs.macs_with("combined_macs", keep, part, len(gone)), alone, atol=0.5)


def test_branches_that_go_as_a_whole_count_no_more() -> None:
    coupling = counted(coupled(), Budget(macs=0.5, combinations="mean"))
    paths = paths_in_any_order(coupling)
    allocation = steps_of_all(coupling, paths, "uniform", Constraints(min_width=0))
    branch = next(group.index for group in coupling.groups() if group.name == "grow.weight")
    plan = plan_of(coupling, allocation.keep(allocation.group == branch))
    assert plan.empties
    slim = fxprune.rewrite(coupling, plan)
    assert not any(name.startswith("grow") for name, _ in slim.named_parameters())
    found = plan.costs.after.combined_macs, plan.costs.after.combined_params
    assert np.abs(np.subtract(found, independent(slim, dict.fromkeys(ALL, 1)))).max() < 0.51


# budgets

LOSSES = {
    task: fxprune.Task(lambda outputs, batch, task=task: (outputs[task] - batch[1][task]).square().mean())
    for task in TASKS
}


def batches(model: nn.Module) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]
    with torch.no_grad():
        return [(x, {task: 1.5 * y for task, y in model(x).items()}) for x in images]


@pytest.mark.parametrize("combinations", ["mean", "max", GIVEN], ids=["mean", "max", "given"])
@pytest.mark.parametrize("method", [methods.Magnitude(), methods.Joint(), methods.Taylor(), methods.HBGS()], ids=repr)
def test_budgets_are_met_and_used(method: Any, combinations: Any) -> None:
    model = settled(Heads(32))
    shares = dict.fromkeys(ALL, 1) if combinations == "mean" else {TASKS: 1} if combinations == "max" else GIVEN
    asked = Budget(macs=0.5, combinations=combinations)
    plan = fxprune.plan(coupled(model), asked, method=method, calibration=batches(model), tasks=LOSSES)
    slim = fxprune.rewrite(coupled(model), plan)
    share = independent(slim, shares)[0] / independent(fxprune.trace(model, X), shares)[0]
    assert 0.98 * 0.5 <= share <= 0.5 * (1 + 1e-6)
    assert plan.costs.share("combined_macs") == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_searches_of_pagcp_meet_them(fast: bool) -> None:
    _, data, coupling = two_tasks.trained()
    weights = {("0",): 1.0, ("1",): 3.0}
    budget = Budget(macs=0.6, params=0.9, combinations=weights)
    method = methods.PAGCP(initial_rate=0.3, fast=fast)
    plan = fxprune.plan(coupling, budget, method=method, calibration=data, tasks=two_tasks.TASKS)
    assert plan.costs.share("combined_macs") <= 0.6
    assert plan.costs.share("combined_params") <= 0.9


def test_pairs_of_convolutions_count_as_they_run() -> None:
    model = settled(Heads(20))
    budget = Budget(macs=0.6, combinations="mean")
    slim = fxprune.compile(
        model, X, budget, method=methods.HBGS(decompose=True), calibration=batches(model), progress=False
    )
    costs = fxprune.report(slim).costs
    assert costs.share("combined_macs") <= 0.6
    macs, params = independent(slim, dict.fromkeys(ALL, 1))
    assert (costs.after.combined_macs, costs.after.combined_params) == (round(macs), round(params))
    assert any(name.startswith("decomposed.") for name, _ in slim.named_parameters())


def test_what_runs_often_shrinks_most() -> None:
    widths = []
    for often in ("seg", "present"):
        shares = {("seg",): 0.05, ("present",): 0.05} | {(often,): 0.95}
        plan = fxprune.plan(coupled(), Budget(macs=0.4, combinations=shares), method=methods.Joint())
        assert plan.costs.share("combined_macs") <= 0.4
        widths.append({group.name: group.after for group in plan.groups})
    assert widths[0]["grow.weight"] < widths[1]["grow.weight"]  # that block runs for `seg`, the trunk for both
    assert widths[0]["trunk.0.weight"] > widths[1]["trunk.0.weight"]


def test_tolerances_and_absolute_bounds_hold_too() -> None:
    model = settled(Heads(20))
    tasks = {name: fxprune.Task(task.loss, tolerance=0.02) for name, task in LOSSES.items()}
    with pytest.raises(PlanError, match=r"conflict: at combined_macs 20\.0%"):
        fxprune.plan(
            coupled(model),
            Budget(macs=0.2, combinations="mean"),
            method=methods.Magnitude(),
            calibration=batches(model),
            tasks=tasks,
        )
    dense = counted(coupled(model), Budget(macs=1.0, combinations="mean")).costs.dense.combined_macs
    assert dense is not None
    plan = fxprune.plan(coupled(model), Budget(macs=dense // 2, params=1.0, combinations="mean"))
    assert plan.costs.after.combined_macs is not None
    assert 0.98 * dense // 2 <= plan.costs.after.combined_macs <= dense // 2


# what is told


def test_plans_reports_and_sweeps_tell_the_figures() -> None:
    model = settled(Heads())
    budget = Budget(macs=0.5, combinations="mean")
    report = fxprune.report(fxprune.compile(model, X, budget, progress=False))
    assert report.budget == {"combined_macs": 0.5}
    assert "combined_macs" in str(report.plan)
    assert report.notes[-1] == (
        "combined_macs and combined_params are means over the 7 combinations of the tasks seg, depth, present"
    )
    assert fxprune.Plan.from_json(report.plan.to_json()).costs == report.costs
    points = fxprune.sweep(coupled(model), [budget, Budget(macs=0.5)])
    assert points[1].plan.costs.after.macs <= 0.5 * points[1].plan.costs.before.macs
    assert all(point.plan.costs.after.combined_macs for point in points)
    assert "combined_macs" in str(points)


def test_notes_name_what_is_counted() -> None:
    model = settled(Heads())
    notes = [
        fxprune.report(fxprune.compile(model, X, Budget(macs=0.5, combinations=c), progress=False)).notes[-1]
        for c in ("max", GIVEN | {("seg", "depth"): 4})
    ]
    assert notes == [
        "combined_macs and combined_params are the most that any of the 7 combinations of the tasks seg, depth, "
        "present takes",
        "combined_macs and combined_params are means over combinations of tasks: seg 30.0%, seg + depth 60.0%, "
        "seg + depth + present 10.0%",
    ]


# errors


@pytest.mark.parametrize(
    ("combinations", "message"),
    [
        ("all", "combinations='all' is not known"),
        ([("seg",)], r"combinations=\[\('seg',\)\] is not known"),
        ({}, "names no combination"),
        ({"seg": 1.0}, "has the key 'seg', not a tuple"),
        ({(): 1.0}, r"has the key \(\), not a tuple"),
        ({("seg",): 0.0}, r"gives \('seg',\) the share 0.0"),
        ({("seg",): True}, r"gives \('seg',\) the share True"),
        ({("seg",): float("nan")}, "the share nan"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(combinations: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Budget(macs=0.5, combinations=combinations)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(PlanError, match="bounds neither macs nor params"):
        Budget(memory=0.5, combinations="mean")
    with pytest.raises(PlanError, match="no task 'ghost'"):
        fxprune.plan(coupled(), Budget(macs=0.5, combinations={("seg", "ghost"): 1.0}))
    for combinations in ("mean", {("0",): 1.0}):
        with pytest.raises(PlanError, match="one output only"):
            fxprune.compile(Chain(), X, Budget(macs=0.5, combinations=combinations), progress=False)
    with pytest.raises(PlanError, match="over different combinations"):
        fxprune.sweep(coupled(), [Budget(macs=0.5, combinations=c) for c in ("mean", "max")])
    with pytest.raises(PlanError, match=r"combined_macs: at most .* is the least possible"):
        fxprune.plan(coupled(), Budget(macs=0.001, combinations="mean"))
