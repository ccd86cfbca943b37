"""Latency budgets, by models made by hand: no test depends on how fast a machine is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import random_keep
from small import Chain, Multitask, Residual, settled
from torch import nn

import fxprune
from fxprune import Budget, LatencyModel, PlanError, methods
from fxprune.allocating import least_error, steps_of_all
from fxprune.constraining import Constraints
from fxprune.coupling import Coupling
from fxprune.latencies import OpLatency, fit, shares, terms
from fxprune.operands import Operands, calls_of
from fxprune.paths import paths_by_score
from fxprune.planning import counted
from fxprune.products import Counter, Sizes

X = torch.randn(2, 3, 8, 8)


def coupled(model: nn.Module, x: Any = X) -> Coupling:
    return fxprune.couple(fxprune.trace(settled(model), x))


def synthetic(coupling: Coupling, block: int = 4, seed: int = 0) -> LatencyModel:
    """Return a model with weights of chance, in which every op with a batch of images counts its channels in blocks."""
    rng = np.random.default_rng(seed)
    sizes, graph = Sizes(coupling.channels), coupling.traced.graph
    operands = Operands(sizes, coupling.record, graph)
    counter = Counter(sizes.rows)
    dense = operands(counter.sizes(counter.by_row(np.ones(coupling.num_channels, dtype=bool))))
    ops = []
    for n, inputs, outputs in zip(calls_of(graph), *dense.astype(int).tolist(), strict=True):
        channels = [t.shape[1] for t in coupling.record.nodes[n.name] if len(t.shape) == 4] or [0]
        weights = tuple(map(float, rng.integers(0, 2000, 5)))
        ops.append(OpLatency("op", (n.name,), inputs, outputs, 0, channels[0], weights))
    return LatencyModel(tuple(ops), block, 1.0, 10.0, 0.0, "cpu", 2, "a machine", torch.__version__, 1)


def one_block_model(coupling: Coupling) -> LatencyModel:
    """Return a model in which only convolutions take time: 1000 us for all their blocks."""
    model = synthetic(coupling)
    ops = [replace(op, weights=(0.0, 0.0, 1000.0 if op.channels_out else 0.0, 0.0, 0.0)) for op in model.ops]
    return replace(model, ops=tuple(ops), overhead=0.0)


# the cost


def test_latency_counts_whole_blocks() -> None:
    found = shares(np.array([160.0, 90.0, 80.0, 10.0]), 160, 16, 4)
    assert found.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert shares(np.array([90.0]), 160, 0, 4).tolist() == [0.5625]
    assert shares(np.array([0.0]), 0, 0, 4).tolist() == [1.0]


def test_predicted_latency_is_the_sum_of_the_ops() -> None:
    coupling = coupled(Chain(16))
    model = synthetic(coupling)
    costs = counted(coupling, Budget(macs=0.5, latency_model=model)).costs
    keep = np.ones(coupling.num_channels, dtype=bool)
    assert costs(keep).latency == 10 + sum(sum(op.weights) for op in model.ops)
    site = next(s for s in coupling.sites if s.name == "conv2.weight" and s.dim == 0)
    keep[site.channels.ravel()[9:]] = False  # 9 of 32 channels: 3 of 8 blocks
    expected = 10.0
    for op in model.ops:
        shapes = [t.shape for t in coupling.record.nodes[op.nodes[0]]]
        reads = [t.shape for n in calls_of(coupling.traced.graph) if n.name == op.nodes[0]
                 for s in n.all_input_nodes for t in coupling.record.nodes[s.name]]  # fmt: skip
        x = 9 / 32 if reads[0][1] == 32 else 1.0
        y = (3 / 8 if op.channels_out else 9 / 32) if shapes[0][1] == 32 else 1.0
        expected += float((terms(np.array([x]), np.array([y])) * op.weights).sum())
    assert costs(keep).latency == round(expected)


@pytest.mark.parametrize("network", [Chain, Residual, Multitask])
@pytest.mark.parametrize("seed", range(4))
def test_more_channels_never_take_less_time(network: type[nn.Module], seed: int) -> None:
    coupling = coupled(network())
    costs = counted(coupling, Budget(macs=0.5, latency_model=synthetic(coupling, seed=seed))).costs
    one, other = random_keep(coupling, seed), random_keep(coupling, seed + 10)
    both = costs(coupling.settle(one & other)).latency
    for keep in (one, other):
        found = costs(keep).latency
        assert found is not None
        assert both is not None
        assert both <= found


def test_costs_have_no_latency_without_a_model() -> None:
    plan = fxprune.plan(coupled(Chain()), Budget(macs=0.5))
    assert plan.costs.before.latency is None
    assert "latency" not in plan.costs.before.to_dict()
    assert "latency" not in str(plan)


# allocation


@pytest.mark.parametrize("scope", ["uniform", "global", "optimal"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_latency_budgets_are_met_together_with_others(scope: str, share: float) -> None:
    coupling = coupled(Residual(32))
    budget = Budget(latency=share, macs=0.9, params=0.9, memory=0.95, latency_model=one_block_model(coupling))
    plan = fxprune.plan(coupling, budget, method=methods.Magnitude(scope=scope))
    assert plan.costs.share("latency") <= share
    assert plan.costs.share("latency") > share - 0.15  # a block of 4 of 32 channels of a convolution
    for name, bound in {"macs": 0.9, "params": 0.9, "memory": 0.95}.items():
        assert plan.costs.share(name) <= bound


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_small_allocations_are_as_good_as_an_exhaustive_search(seed: int, share: float) -> None:
    coupling = coupled(Chain(6))
    model = synthetic(coupling, block=3, seed=seed)
    coupling = counted(coupling, Budget(latency=share, latency_model=model))
    score = np.random.default_rng(seed).random(coupling.num_channels)
    allocation = steps_of_all(coupling, paths_by_score(coupling, score), "optimal", Constraints())
    none = np.zeros(len(allocation), dtype=bool)
    dense = coupling.costs(allocation.keep(none)).latency
    least = coupling.costs(allocation.keep(~none)).latency
    assert dense is not None
    assert least is not None
    bounds = {"latency": least + share * (dense - least)}
    places = [np.flatnonzero(allocation.group == g) for g in np.unique(allocation.group)]
    best = np.inf
    for levels in itertools.product(*[range(len(p) + 1) for p in places]):
        taken = none.copy()
        for place, level in zip(places, levels, strict=True):
            taken[place[:level]] = True
        if coupling.costs.within(allocation.keep(taken), bounds):
            best = min(best, float(allocation.errors[taken].sum()))
    start = allocation.meet(bounds)
    assert start is not None
    found = least_error(allocation, start, bounds)
    assert coupling.costs.within(allocation.keep(found), bounds)
    assert allocation.errors[found].sum() == pytest.approx(best)


def test_channels_that_cost_no_time_stay() -> None:
    coupling = coupled(Chain(16))
    plan = fxprune.plan(coupling, Budget(latency=0.6, latency_model=one_block_model(coupling)))
    assert all(len(plan.kept[name, 0]) % 4 == 0 for name in ("conv1.weight", "conv2.weight"))


@pytest.mark.parametrize(
    "method", [methods.Magnitude(), methods.Joint(), methods.HBGS(), methods.CATRO()], ids=lambda m: type(m).__name__
)
def test_any_method_meets_a_latency_budget(method: Any) -> None:
    coupling = coupled(Chain(16))
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)]
    tasks = {"label": fxprune.Task(lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]))}
    budget = Budget(latency=0.6, latency_model=one_block_model(coupling))
    plan = fxprune.plan(coupling, budget, method=method, calibration=batches, tasks=tasks)
    assert plan.costs.share("latency") <= 0.6


def test_branches_that_go_take_no_time() -> None:
    coupling = coupled(Residual(8))
    model = one_block_model(coupling)
    constraints = Constraints(min_width=0)
    plan = fxprune.plan(coupling, Budget(latency=0.35, latency_model=model), constraints=constraints)
    assert plan.empties
    assert plan.costs.share("latency") <= 0.35


def test_an_unreachable_latency_budget_says_what_is_possible() -> None:
    coupling = coupled(Chain())
    with pytest.raises(PlanError, match=r"latency: at most .* asked .*is the least possible"):
        fxprune.plan(coupling, Budget(latency=0.01, latency_model=synthetic(coupling)))


def test_plans_reports_and_sweeps_tell_latency() -> None:
    model = settled(Chain(16))
    latency_model = one_block_model(coupled(model))
    budget = Budget(latency=0.6, latency_model=latency_model)
    slim = fxprune.compile(model, X, budget, progress=False)
    report = fxprune.report(slim)
    assert report.costs.share("latency") <= 0.6
    assert "latency" in str(report)
    assert any("was measured with machine 'a machine'" in note for note in report.notes)
    assert fxprune.Plan.from_json(report.plan.to_json()).costs == report.costs
    points = fxprune.sweep(coupled(model), [budget, Budget(macs=0.5)])
    assert all(point.plan.costs.after.latency for point in points)
    assert "latency" in str(points)
    with pytest.raises(PlanError, match="different latency models"):
        fxprune.sweep(coupled(model), [budget, Budget(macs=0.5, latency_model=synthetic(coupled(model)))])


# errors


def test_latency_needs_a_model() -> None:
    with pytest.raises(PlanError, match=r"needs a latency model.*LatencyModel.measure"):
        Budget(latency=0.5)
    with pytest.raises(PlanError, match="is no latency model"):
        Budget(latency=0.5, latency_model="model.json")  # pyright: ignore[reportArgumentType]


def test_a_model_of_another_network_is_refused() -> None:
    model = synthetic(coupled(Chain(16)))
    for other in (coupled(Residual(16)), coupled(Chain(8)), coupled(Chain(16), torch.randn(2, 3, 16, 16))):
        with pytest.raises(PlanError, match=r"latency model is of another network.*node"):
            fxprune.plan(other, Budget(latency=0.5, latency_model=model))


def test_a_model_knows_nothing_of_pairs_of_convolutions() -> None:
    coupling = coupled(Chain(16))
    with pytest.raises(PlanError, match="1x1 convolutions that `decompose=True` adds"):
        fxprune.compile(
            settled(Chain(16)), X, Budget(latency=0.5, latency_model=synthetic(coupling)),
            method=methods.HBGS(decompose=True), calibration=[(X, X)], progress=False,
        )  # fmt: skip


def test_what_cannot_be_measured_is_refused() -> None:
    traced = fxprune.trace(settled(Chain()), X)
    with pytest.raises(PlanError, match="batch=0"):
        LatencyModel.measure(traced, batch=0)
    with pytest.raises(PlanError, match="device='meta'"):
        LatencyModel.measure(traced, device="meta")
    with pytest.raises(PlanError, match="rounds=1"):
        fxprune.measure_latency(nn.ReLU(), nn.ReLU(), X, rounds=1)


# files


def test_a_model_is_the_same_after_json(tmp_path: Path) -> None:
    model = synthetic(coupled(Chain()))
    model.save(tmp_path / "made" / "model.json")
    assert LatencyModel.load(tmp_path / "made" / "model.json") == model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, "schema 99"),
        ({"scale": "fast"}, "'scale' is 'fast'"),
        ({"scale": -1.0}, "'scale' is -1.0"),
        ({"more": 1}, "more"),
        ({"ops": [{}]}, "damaged"),
        ({"ops": None}, "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "made" / "model.json"
    synthetic(coupled(Chain())).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(fxprune.ArtifactError, match=words):
        LatencyModel.load(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fxprune.ArtifactError, match="cannot be read"):
        LatencyModel.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(fxprune.ArtifactError, match="damaged JSON"):
        LatencyModel.load(tmp_path / "broken.json")


# measuring


def test_weights_are_found_again() -> None:
    rng = np.random.default_rng(0)
    rows = terms(rng.random(40), rng.random(40))
    weights = np.array([3.0, 0.0, 5.0, 40.0, 0.0])
    found, rest = fit(rows, rows @ weights, np.ones(40))
    assert np.allclose(found, weights)
    assert rest < 1e-12
    against, _ = fit(rows, 50 - 40 * rows[:, 1], np.ones(40))  # falls with x: a constant is the best that never does
    assert against[1] == against[3] == against[4] == 0


def test_a_measured_model_knows_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.measuring.NETWORKS", 4)
    monkeypatch.setattr("fxprune.measuring.ROUNDS", (2, 2))
    traced = fxprune.trace(settled(Chain(16)), X)
    model = LatencyModel.measure(traced, batch=3)
    assert set(model.nodes) == {n.name for n in calls_of(traced.graph)}
    assert model.batch == 3
    assert model.warnings() == ()
    assert all(weight >= 0 for op in model.ops for weight in op.weights)
    plan = fxprune.plan(fxprune.couple(traced), Budget(macs=0.5, latency_model=model))  # which is not bound
    assert plan.costs.before.latency is not None
    assert plan.costs.share("latency") <= 1


def test_latency_is_measured_in_pairs_and_leaves_the_mode() -> None:
    one, other = settled(Chain(8)).train(), settled(Chain(16))
    other.bn.train()
    found = fxprune.measure_latency(one, other, X, rounds=5)
    assert len(found.before) == len(found.after) == 5
    assert one.training
    assert not other.training
    assert other.bn.training


def test_measured_latency_pairs_the_runs() -> None:
    latency = fxprune.MeasuredLatency((2.0, 4.0, 8.0), (1.0, 1.0, 4.0))
    assert latency.share == 0.5
    assert latency.change == -0.5
    assert latency.to_dict()["quartiles"]["before"][1] == 4
    assert str(latency) == "4.00 ms before, 1.00 ms after: 50.0% (25.0% .. 50.0%) of 3 pairs"
