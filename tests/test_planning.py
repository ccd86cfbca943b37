"""Planning: budgets, exact costs, constraints, methods, and the plan as data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import cut
from small import Chain, Multitask, Residual, settled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from traps import TRAPS

import fxprune
from fxprune import Budget, Constraints, PlanError, Task, methods
from fxprune.criteria import weight_sites
from fxprune.criteria.magnitude import magnitude
from fxprune.planning import plan_of
from fxprune.units import Units
from fxprune.workspaces import Machine

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GOLDEN = Path(__file__).parent / "golden"


def coupled(model: nn.Module, inputs: Any = X) -> fxprune.Coupling:
    return fxprune.couple(fxprune.trace(model, inputs))


def planned(model: nn.Module, budget: Budget, **settings: Any) -> fxprune.Plan:
    return fxprune.plan(coupled(model), budget, **settings)


def planned_on(model: nn.Module, inputs: Any) -> fxprune.Plan:
    return fxprune.plan(coupled(model, inputs), Budget(macs=1.0))


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Return the multiply-accumulates that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


# budgets


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Budget() bounds nothing"),
        ({"macs": 0}, "macs=0"),
        ({"macs": -0.5}, "macs=-0.5"),
        ({"params": -3}, "params=-3"),
        ({"memory": float("nan")}, "memory=nan"),
        ({"macs": "half"}, "macs='half'"),
        ({"macs": True}, "macs=True"),
        ({"latency": 0.5}, "latency model"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Budget(**given)
    assert words in str(caught.value)
    assert "`" in str(caught.value) or "Pass" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("resource", ["macs", "params", "memory"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_share_bounds_a_resource_and_is_used(resource: str, share: float) -> None:
    costs = planned(Residual(32), Budget(**{resource: share})).costs
    assert getattr(costs.after, resource) <= share * getattr(costs.before, resource)
    assert costs.share(resource) > share - 0.08


def test_an_absolute_bound_is_the_same_as_its_share() -> None:
    coupling = coupled(Residual(32))
    half = fxprune.plan(coupling, Budget(macs=0.5))
    absolute = fxprune.plan(coupling, Budget(macs=half.costs.before.macs // 2))
    assert absolute.costs == half.costs
    assert all(np.array_equal(half.kept[key], absolute.kept[key]) for key in half.kept)


def test_several_bounds_hold_at_once() -> None:
    coupling = coupled(Residual(32))
    bounds = {"macs": 0.7, "params": 0.4, "memory": 0.75}
    costs = fxprune.plan(coupling, Budget(**bounds)).costs
    assert all(costs.share(name) <= bound for name, bound in bounds.items())
    assert costs.after.params <= fxprune.plan(coupling, Budget(macs=0.7)).costs.after.params


def test_a_full_budget_removes_nothing() -> None:
    costs = planned(Residual(), Budget(macs=1.0, params=1.0)).costs
    assert costs.before == costs.after


def test_a_budget_out_of_reach_says_what_is_possible_and_what_binds() -> None:
    with pytest.raises(PlanError) as caught:
        planned(Chain(), Budget(macs=0.5, params=1e-6), constraints=Constraints(min_width=12))
    message = str(caught.value)
    for words in ("cannot be met", "params: at most", "is the least possible", "min_width=12", "frozen", "why_frozen("):
        assert words in message


@pytest.mark.parametrize("budget", [0.5, None, {"macs": 0.5}])
def test_anything_but_a_budget_is_refused(budget: Any) -> None:
    with pytest.raises(PlanError, match=r"Budget\(macs=0\.5\)"):
        fxprune.plan(coupled(Chain()), budget)


# costs


class Mixed(nn.Module):
    """Every kind of product that costs are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 12, 2, 2)
        self.one = nn.Conv1d(12, 8, 3)
        self.fc = nn.Linear(8, 20, bias=False)
        self.out = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.depthwise(self.grouped(self.conv(x))))
        x = self.one(self.up(x).flatten(2))
        x = self.fc(x.transpose(1, 2))
        return self.out(torch.einsum("bnc,bmc->bnm", x, x)[:, :2] @ x)


@pytest.mark.parametrize("model", [Chain(), Residual(), Multitask(), Mixed()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_costs_are_exact(model: nn.Module, seed: int) -> None:
    _, plan, slim = cut(model.eval(), X, seed)
    assert plan.costs.after.macs < plan.costs.before.macs
    assert plan.costs.before.macs == counted(model, X)
    assert plan.costs.after.macs == counted(slim, X)
    assert plan.costs.before.params == sum(p.numel() for p in model.parameters())
    assert plan.costs.after.params == sum(p.numel() for p in slim.parameters())


def test_memory_counts_weights_and_live_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    coupling = coupled(model, torch.zeros(16, 8))
    weights = 4 * (8 * 32 + 32 * 4)
    both = 4 * 16 * (32 + 32)  # input of the activation and its output, side by side
    dense = coupling.costs(np.ones(coupling.num_channels, dtype=bool))
    assert weights + both <= dense.memory <= weights + both + 4 * 16 * 8
    plan = fxprune.plan(coupling, Budget(params=0.5))
    assert plan.kept["0.weight", 0].shape == (16,)
    assert plan.costs.after.memory - dense.memory // 2 <= 4 * 16 * 8


def test_costs_of_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    costs = planned_on(Tied(), torch.zeros(1, 8)).costs
    assert costs.before.params == 64
    assert costs.before.macs == 128


# constraints


def widths(plan: fxprune.Plan) -> dict[tuple[str, int], int]:
    return {key: kept.shape[-1] for key, kept in plan.kept.items()}


def test_keep_outputs_holds_a_layer_but_not_its_inputs() -> None:
    plan = planned(Chain(), Budget(macs=0.4), constraints=Constraints(keep_outputs=["conv2"]))
    kept = widths(plan)
    assert kept.get(("conv2.weight", 0), 32) == kept.get(("head.weight", 1), 32) == 32
    assert kept["conv1.weight", 0] == kept["conv2.weight", 1] < 16


def test_keep_inputs_holds_what_a_layer_reads_but_not_its_outputs() -> None:
    plan = planned(Chain(), Budget(macs=0.5), constraints=Constraints(keep_inputs=["conv2"]))
    kept = widths(plan)
    assert (
        kept.get(("conv1.weight", 0), 16) == kept.get(("conv2.weight", 1), 16) == kept.get(("bn.weight", 0), 16) == 16
    )
    assert kept["conv2.weight", 0] < 32


def test_patterns_name_whole_blocks_and_use_wildcards() -> None:
    for pattern in ("seg", "seg.*", "s?g.0", "[s]eg.0"):
        plan = planned(Multitask(), Budget(macs=0.5), constraints=Constraints(keep_outputs=[pattern]))
        assert widths(plan).get(("seg.0.weight", 0), 16) == 16
        assert widths(plan)["depth.0.weight", 0] < 16


@pytest.mark.parametrize("field", ["keep_inputs", "keep_outputs"])
def test_a_pattern_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(Chain(), Budget(macs=0.5), constraints=Constraints(**{field: ["conv9*"]}))
    for words in (field, "'conv9*'", "matches no layer", "conv1"):
        assert words in str(caught.value)


def test_min_width_holds() -> None:
    plan = planned(Residual(), Budget(macs=0.7), constraints=Constraints(min_width=12))
    assert plan.groups
    assert min(group.after for group in plan.groups if group.before >= 12) == 12
    assert all(group.after == group.before for group in plan.groups if group.before < 12)


def test_max_ratio_holds() -> None:
    plan = planned(Residual(), Budget(macs=0.75), constraints=Constraints(max_ratio=0.25))
    assert min(group.after / group.before for group in plan.groups) >= 0.75
    with pytest.raises(PlanError, match=r"max_ratio=0\.25"):
        planned(Residual(), Budget(macs=0.3), constraints=Constraints(max_ratio=0.25))


def test_multiple_of_holds() -> None:
    plan = planned(Residual(32), Budget(macs=0.5), constraints=Constraints(multiple_of=8))
    assert {group.after % 8 for group in plan.groups if group.before % 8 == 0} == {0}
    assert any(group.after < group.before for group in plan.groups)


def test_multiple_of_may_differ_from_layer_to_layer() -> None:
    asked = {"*": 2, "seg": 8, "s*.0": 4, "depth": 1}  # the last that matches a layer counts
    kept = [
        widths(planned(Multitask(), Budget(macs=macs), constraints=Constraints(multiple_of=asked)))
        for macs in (0.7, 0.6, 0.5, 0.4, 0.3)
    ]
    found = {name: {k[f"{name}.weight", 0] for k in kept} for name in ("trunk.0", "seg.0", "depth.0")}
    assert [math.gcd(*found[name]) for name in found] == [2, 4, 1]


@pytest.mark.parametrize("method", [methods.Magnitude(), methods.PAGCP()])
def test_what_several_layers_make_is_a_multiple_for_each(method: Any) -> None:
    asked = {"a2": 4, "b2": 6}  # they are added
    task = {"loss": Task(lambda outputs, batch: outputs.square().mean())}
    data = {"calibration": [X], "tasks": task} if isinstance(method, methods.PAGCP) else {}
    plan = planned(Residual(36), Budget(macs=0.05), method=method, constraints=Constraints(multiple_of=asked), **data)
    assert widths(plan)["a2.weight", 0] == widths(plan)["b2.weight", 0] in (12, 24)


def test_multiples_name_layers() -> None:
    with pytest.raises(PlanError, match=r"multiple_of=\.\.\.\): 'sag' matches no layer"):
        planned(Multitask(), Budget(macs=0.5), constraints=Constraints(multiple_of={"sag": 8}))


def test_tie_keeps_the_same_positions() -> None:
    model = Multitask()
    loose = planned(model, Budget(macs=0.5))
    tied = planned(model, Budget(macs=0.5), constraints=Constraints(tie=[("seg.0", "depth.0")]))
    assert not np.array_equal(loose.kept["seg.0.weight", 0], loose.kept["depth.0.weight", 0])
    assert np.array_equal(tied.kept["seg.0.weight", 0], tied.kept["depth.0.weight", 0])
    with pytest.raises(PlanError, match="Tie equal layers"):
        planned(Chain(), Budget(macs=0.5), constraints=Constraints(tie=[("conv1", "conv2")]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_inputs": "stem"}, "is one string"),
        ({"tie": "stem"}, "is one string"),
        ({"min_width": -1}, "min_width=-1"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"max_ratio": 1.5}, "max_ratio=1.5"),
        ({"max_ratio": -0.1}, "max_ratio=-0.1"),
        ({"min_width": 2.0}, "min_width=2.0) is not a whole number"),
        ({"min_width": True}, "min_width=True) is not a whole number"),
        ({"multiple_of": "8"}, "multiple_of='8'): '8' is not a positive whole number"),
        ({"multiple_of": True}, "True is not a positive whole number"),
        ({"multiple_of": {"*": 8, "head": 0}}, "0 is not a positive whole number"),
        ({"multiple_of": {1: 8}}, "has keys that are no strings"),
        ({"max_ratio": "0.5"}, "max_ratio='0.5') is no number"),
        ({"max_ratio": None}, "max_ratio=None) is no number"),
        ({"max_ratio": float("nan")}, "max_ratio=nan) is not a share"),
        ({"keep_inputs": 3}, "keep_inputs=3) is not a list of strings"),
        ({"keep_outputs": [nn.ReLU()]}, "keep_outputs=[ReLU()]) is not a list of strings"),
        ({"tie": ["a1", "b1"]}, "tie=['a1', 'b1']) is not a list of tuples"),
        ({"tie": [("a1",)]}, "tie=[('a1',)]) is not a list of tuples of two or more"),
        ({"tie": [("a1", 2)]}, "is not a list of tuples"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Constraints(**given)
    assert words in str(caught.value)


def test_a_constrained_plan_fits_the_unconstrained_coupling() -> None:
    coupling = coupled(settled(Residual()))
    constraints = Constraints(keep_outputs=["stem"], tie=[("a1", "b1")])
    plan = fxprune.plan(coupling, Budget(macs=0.7), constraints=constraints)
    fxprune.verify(coupling, plan, fxprune.rewrite(coupling, plan))


# the plan as data


def test_a_plan_cannot_be_changed() -> None:
    plan = planned(Residual(), Budget(macs=0.5))
    for kept in plan.kept.values():
        assert not kept.flags.writeable
        assert kept.dtype == np.int64
        assert (np.diff(kept) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        plan.kept["stem.weight", 0][0] = 1
    with pytest.raises(AttributeError):
        plan.method = "other"  # type: ignore[misc]


def test_plans_cut_every_site_of_a_channel_alike() -> None:
    coupling = coupled(Residual())
    plan = fxprune.plan(coupling, Budget(macs=0.5))
    gone: set[int] = set()
    stay: set[int] = set()
    for site in coupling.sites:
        channels = site.channels.ravel()
        kept = plan.kept.get((site.name, site.dim))
        if kept is None or kept.ndim > 1 or channels.size != plan.sizes[site.name, site.dim]:
            continue
        stay.update(channels[kept].tolist())
        gone.update(np.delete(channels, kept).tolist())
    assert gone
    assert not stay & gone


def test_plans_that_break_the_coupling_are_refused() -> None:
    coupling = coupled(Residual())
    nothing = np.zeros(coupling.num_channels, dtype=bool)
    with pytest.raises(PlanError, match="is frozen and would go"):
        plan_of(coupling, nothing)
    site = next(s for s in coupling.sites if (s.name, s.dim) == ("b2.weight", 1))
    uneven = np.ones(coupling.num_channels, dtype=bool)
    uneven[site.channels.ravel()[0]] = False
    with pytest.raises(PlanError, match=r"rows at node '\w+' would keep unequally many"):
        plan_of(coupling, coupling.settle(uneven))


def test_the_printed_plan_is_the_golden_file(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(threads=1, block=16, multiple=4, blocked=frozenset({torch.float32}))
    monkeypatch.setattr("fxprune.labelling.this_machine", lambda: machine)  # memory depends on it
    model = settled(Residual())
    found = str(fxprune.plan(coupled(model), Budget(macs=0.5), method=methods.Random(seed=1))) + "\n"
    assert found == (GOLDEN / "plan.txt").read_text()


# methods


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator))
        for _ in range(count)
    ]


def tasks() -> dict[str, Task]:
    return {"class": Task(lambda outputs, batch: F.cross_entropy(outputs, batch[1]))}


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", ["Magnitude", "BatchNormScale", "Random", "Taylor"])
def test_methods_meet_the_budget_and_repeat_themselves(name: str, scope: str) -> None:
    data = {"calibration": batches(), "tasks": tasks()} if name == "Taylor" else {}
    torch.manual_seed(0)
    model = settled(Residual())
    plans = [planned(model, Budget(macs=0.5), method=getattr(methods, name)(scope=scope), **data) for _ in range(2)]
    assert all(np.array_equal(plans[0].kept[key], plans[1].kept[key]) for key in plans[0].kept)
    assert plans[0].costs.share("macs") <= 0.5
    assert name in plans[0].method


def removed(plan: fxprune.Plan, name: str) -> set[int]:
    return set(range(plan.sizes[name, 0])) - set(plan.kept[name, 0].tolist())


def test_magnitude_removes_the_weakest() -> None:
    model = settled(Chain())
    with torch.no_grad():
        model.conv1.weight[[2, 5, 11]] *= 1e-3
        model.conv2.weight[:, [2, 5, 11]] *= 1e-3
    assert len(removed(planned(model, Budget(macs=0.85)), "conv1.weight") & {2, 5, 11}) >= 1
    gone = removed(planned(model, Budget(macs=0.4)), "conv1.weight")
    assert len(gone) >= 3
    assert gone >= {2, 5, 11}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_magnitude_sums_over_all_weights_of_a_channel(p: int, dtype: torch.dtype) -> None:
    model = settled(TRAPS["qk-norm by LayerNorm"].make()).to(dtype)
    coupling = fxprune.couple(fxprune.trace(model, TRAPS["qk-norm by LayerNorm"].inputs[0].to(dtype)))
    wanted = np.zeros(coupling.num_channels + 1)
    vectors = 0
    for site in weight_sites(coupling):
        weight = model.get_parameter(site.name).detach().double().numpy()
        np.add.at(wanted, np.broadcast_to(site.channels, weight.shape), np.abs(weight) ** p)
        vectors += weight.ndim == 1
    assert vectors
    np.testing.assert_allclose(magnitude(coupling, p), wanted[:-1], rtol=1e-4 if dtype == torch.float32 else 0.05)
    units = Units(coupling, fxprune.Constraints(), p)
    for group in coupling.groups():
        score = units.score(group, np.ones(coupling.num_channels, dtype=bool))
        assert len(set(score[np.isfinite(score)].tolist())) > 1  # each by its own weights


def test_batch_norm_scale_removes_the_smallest_scale() -> None:
    model = settled(Chain())
    with torch.no_grad():
        model.bn.weight[:8] = 1e-4
    gone = removed(planned(model, Budget(macs=0.4), method=methods.BatchNormScale()), "bn.weight")
    assert gone
    assert gone <= set(range(8)) or gone >= set(range(8))


def test_random_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    model = settled(Residual())
    first, again, other = (planned(model, Budget(macs=0.5), method=methods.Random(seed=s)).kept for s in (1, 1, 2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)


def test_taylor_needs_data_and_says_so() -> None:
    coupling = coupled(Residual())
    for data, words in (
        ({}, "calibration batches"),
        ({"tasks": tasks()}, "calibration batches"),
        ({"calibration": batches()}, "needs tasks"),
        ({"calibration": batches(), "tasks": {}}, "needs tasks"),
        ({"calibration": [], "tasks": tasks()}, "no batches"),
    ):
        with pytest.raises(PlanError, match=words):
            fxprune.plan(coupling, Budget(macs=0.5), method=methods.Taylor(), **data)


def test_taylor_removes_what_no_loss_depends_on() -> None:
    model = settled(Residual())
    dead = [1, 4, 9, 12]
    with torch.no_grad():
        model.a2.weight[:, dead] = 0  # what a1 makes there goes nowhere
    plan = planned(model, Budget(macs=0.8), method=methods.Taylor(), calibration=batches(), tasks=tasks())
    gone = removed(plan, "a1.weight")
    assert gone
    assert gone <= set(dead) or set(dead) <= gone


def test_taylor_leaves_gradients_modes_and_flags_alone() -> None:
    model = settled(Residual())
    model.train()
    model.a1.weight.requires_grad_(False)
    planned(model, Budget(macs=0.5), method=methods.Taylor(), calibration=batches(), tasks=tasks())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not model.a1.weight.requires_grad


def test_taylor_reads_every_form_of_batch() -> None:
    model = settled(Residual())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    size = {"size": Task(lambda outputs, batch: outputs.pow(2).mean())}
    plans = [
        planned(model, Budget(macs=0.5), method=methods.Taylor(), calibration=[batch], tasks=size)
        for batch in (x, (x, None), ((x,), None), ({"x": x}, None))
    ]
    for other in plans[1:]:
        assert all(np.array_equal(plans[0].kept[key], other.kept[key]) for key in other.kept)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(PlanError, match=r"task 'wide'.*not a scalar"):
        planned(
            Residual(), Budget(macs=0.5), method=methods.Taylor(), calibration=batches(),
            tasks={"wide": Task(lambda outputs, batch: outputs)},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": 3}, "cannot be called"),
        ({"loss": max, "tolerance": -1}, "negative"),
        ({"loss": max, "tolerance": "1%"}, "is no number"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Task(**given)


def test_any_object_with_scope_and_scores_is_a_method() -> None:
    class First:
        scope = "uniform"

        def scores(self, coupling: fxprune.Coupling, calibration: Any, tasks: Any) -> np.ndarray:
            return -np.arange(coupling.num_channels, dtype=float)

    class Broken(First):
        def scores(self, coupling: fxprune.Coupling, calibration: Any, tasks: Any) -> np.ndarray:
            return np.where(np.arange(coupling.num_channels) == 3, value, 1.0)

    class Short(First):
        def scores(self, coupling: fxprune.Coupling, calibration: Any, tasks: Any) -> np.ndarray:
            return np.ones(2)

    kept = planned(Chain(), Budget(macs=0.5), method=First()).kept["conv1.weight", 0]
    assert np.array_equal(kept, np.arange(len(kept)))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(PlanError, match=rf"1 of \d+ scores that are not finite: {value} for channel 3"):
            planned(Chain(), Budget(macs=0.5), method=Broken())
    with pytest.raises(PlanError, match=r"scores of shape \(2,\), expected \(\d+,\)"):
        planned(Chain(), Budget(macs=0.5), method=Short())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "magnitude"}, r"the method is 'magnitude'.*Pass `methods\.Magnitude\(\)`"),
        ({"method": methods.Magnitude}, r"the method is the class Magnitude.*Pass `methods\.Magnitude\(\)`"),
        ({"method": methods.Magnitude(scope="galactic")}, r"has scope 'galactic'.*uniform"),  # type: ignore[arg-type]
        ({"tasks": [Task(max)]}, r"tasks is a list, not a mapping.*fxprune\.Task\(loss\)"),
        ({"tasks": {"size": max}}, r"tasks has 'size'.*fxprune\.Task\(loss\)"),
        ({"tasks": {3: Task(max)}}, r"tasks has 3"),
        ({"calibration": 3}, "the calibration is 3, which cannot be iterated"),
        ({"calibration": torch.zeros(4, 3, 8, 8)}, r"the calibration is a single batch.*`\[batch\]`"),
        ({"calibration": (torch.zeros(4, 3, 8, 8), torch.zeros(4))}, "the calibration is a single batch"),
        ({"calibration": {"x": torch.zeros(4, 3, 8, 8)}}, "the calibration is a single batch"),
        ({"tasks": {"size": Task(max)}}, "no calibration batches to measure their losses on"),
        ({"constraints": {"min_width": 8}}, r"Pass `fxprune\.Constraints\("),
    ],
)
def test_settings_of_the_wrong_type_are_refused_by_plan_and_compile(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        planned(Chain(), Budget(macs=0.5), **given)
    with pytest.raises(PlanError, match=words):
        fxprune.compile(Chain(), X, Budget(macs=0.5), progress=False, **given)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_taylor_works_where_gradients_are_switched_off(off: Any) -> None:
    model, data = settled(Residual()), batches()
    coupling = coupled(model)
    settings: dict[str, Any] = {"method": methods.Taylor(), "calibration": data, "tasks": tasks()}
    expected = fxprune.plan(coupling, Budget(macs=0.5), **settings)
    with off():
        found = fxprune.plan(coupling, Budget(macs=0.5), **settings)
    assert all(np.array_equal(found.kept[key], kept) for key, kept in expected.kept.items())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [methods.Joint(sequential=True), methods.HBGTS(), methods.Taylor()], ids=repr)
def test_networks_compiled_where_gradients_are_switched_off_are_the_same_and_train(off: Any, method: Any) -> None:
    model, data = settled(Residual()), batches()
    settings: dict[str, Any] = {"method": method, "tasks": tasks(), "progress": False}
    expected = fxprune.compile(model, X, Budget(macs=0.5), calibration=data, **settings)
    with off():  # batches are made there, too
        made = (tuple(t.clone() for t in batch) for batch in data)
        found = fxprune.compile(model, X, Budget(macs=0.5), calibration=made, **settings)
        assert torch.is_inference_mode_enabled() == (off is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found.state_dict()[name], t) for name, t in expected.state_dict().items())
    found.train()(X).sum().backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, batch: outputs.detach().sum(),
        lambda outputs, batch: torch.ones((), requires_grad=True) * 2,
    ],
)
def test_a_loss_that_does_not_depend_on_the_weights_names_its_task(loss: Any) -> None:
    with pytest.raises(PlanError, match=r"the loss of task 'flat' does not depend on the weights.*`\.detach\(\)`"):
        planned(
            Residual(), Budget(macs=0.5), method=methods.Taylor(), calibration=batches(), tasks={"flat": Task(loss)}
        )


def test_a_budget_out_of_reach_without_groups_names_what_holds_most() -> None:
    with pytest.raises(PlanError) as caught:
        planned(nn.Sequential(nn.Conv2d(3, 8, 1)), Budget(macs=0.5))
    assert "because node 'output' is an output of the network" in str(caught.value)
    assert "why_frozen" not in str(caught.value)


@pytest.mark.parametrize("p", [0, -1, float("inf"), float("nan"), "2"])
def test_magnitude_needs_a_norm_that_ranks(p: Any) -> None:
    """Of weights to the power of 0 all are alike, and to that of infinity none is finite."""
    with pytest.raises(PlanError, match=r"Magnitude\(p=.*\) is no norm to rank by"):
        methods.Magnitude(p)


def test_weights_without_values_are_not_scored() -> None:
    with pytest.raises(PlanError, match=r"'conv1\.weight' is on the meta device, and has no values"):
        fxprune.compile(Chain().to("meta"), torch.zeros(2, 3, 8, 8), Budget(macs=0.5), progress=False)
