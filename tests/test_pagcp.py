"""PAGCP is what a direct evaluation of its steps gives, and meets budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from two_tasks import TASKS, asked, square, trained

import fxprune
from fxprune import Budget, Constraints, PlanError, Task, methods
from fxprune.methods import PAGCP, Problem
from fxprune.planning import plan_of
from fxprune.tolerating import decay
from fxprune.units import Units
from fxprune.visiting import RATIOS, Search
from fxprune.visits import Found

torch.set_num_threads(1)


def slim_losses(keep: np.ndarray) -> np.ndarray:
    """Return (tasks,) mean losses of the slim network, rewritten for the purpose."""
    _, data, coupling = trained()
    slim = fxprune.rewrite(coupling, plan_of(coupling, keep))
    with torch.no_grad():
        return np.mean([[float(task.loss(slim(b[0]), b)) for task in TASKS.values()] for b in data], axis=0)


@pytest.mark.parametrize(
    ("first", "total", "lam", "last"), [(0.06, 6, 0.9738, 0.0125), (0.05, 5, 0.9770, 0.0126), (0.05, 30, 1.005, None)]
)
def test_the_schedule_is_that_of_the_paper(first: float, total: float, lam: float, last: float | None) -> None:
    found = decay(first, total, 60)
    assert math.prod(1 + first * found**i for i in range(60)) == pytest.approx(total)
    assert found == pytest.approx(lam, abs=5e-4)
    assert last is None or first * found**59 == pytest.approx(last, abs=2e-4)


def test_the_schedule_has_its_ends() -> None:
    assert decay(0.1, 1.1**7, 7) == pytest.approx(1)
    assert decay(0.1, 1.1, 7) == pytest.approx(0, abs=0.2)
    assert decay(0.1, 3, 1) == 1


def brute_force(method: PAGCP) -> list[tuple[int, float, str | None]]:
    """Do one round on rewritten networks: order, oracle, tolerances; return group, ratio, task of each visit."""
    model, _, coupling = trained()
    makers = {"stem": ["stem"], "a": ["a"], "c": ["c", "b"], "wide": ["wide"]}
    weights = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
    names = [next(n for n, m in makers.items() if g.name.split(".")[0] in m) for g in coupling.groups()]
    inputs = {"a": "stem", "c": "stem", "b": "a", "wide": "c"}
    left = {name: list(range(len(weights[f"{name}.weight"]))) for name in makers}

    def ranked(name: str) -> list[int]:
        score = sum(
            np.abs(weights[f"{m}.weight"][left[name]][:, left[inputs[m]] if m in inputs else slice(None)]).mean(
                (1, 2, 3)
            )
            for m in makers[name]
        )
        return [left[name][i] for i in np.argsort(score, kind="stable")]

    def keep(gone: dict[str, list[int]]) -> np.ndarray:
        stays = np.ones(coupling.num_channels, dtype=bool)
        for name, positions in gone.items():
            site = next(s for s in coupling.sites if s.name == f"{name}.weight" and s.dim == 0)
            stays[site.channels.ravel()[positions]] = False
        return coupling.settle(stays)

    def macs(gone: dict[str, list[int]]) -> int:
        return coupling.costs(keep(gone)).macs

    first, lam = method.tolerances(len(names))
    saved = [macs({}) - macs({n: ranked(n)[: int(0.3 * len(left[n]) + 1e-9)]}) for n in names]
    order = np.argsort(saved, kind="stable")
    base, tolerance, gone, visits = slim_losses(keep({})), first, {}, []
    for index in order[::-1] if lam <= 1 else order:
        path, accepted, task, last = ranked(names[index]), 0.0, None, base
        for ratio in [round(0.05 * i, 2) for i in range(1, 20)]:
            count = int(ratio * len(path) + 1e-9)
            if not count:
                continue
            found = slim_losses(keep(gone | {names[index]: path[:count]}))
            if (found / base).max() > 1 + tolerance:
                task = list(TASKS)[int(np.argmax(found / base))]
                break
            accepted, last = ratio, found
        if accepted:
            gone[names[index]] = path[: int(accepted * len(path) + 1e-9)]
            left[names[index]] = [c for c in left[names[index]] if c not in gone[names[index]]]
            base, tolerance = np.maximum(base, last), tolerance * lam
        visits.append((int(index), accepted, task))
    return visits


def first_round(method: PAGCP, **settings: Any) -> Found:
    """Return the search at the end of the round that meets the loosest budget: one channel of anything."""
    return method.search(asked(0.999, **settings))


@pytest.mark.parametrize(("rate", "total"), [(0.3, 2.0), (0.1, 3.0), (0.4, 40.0)])
def test_the_oracle_accepts_what_rewritten_networks_say(rate: float, total: float) -> None:
    method = PAGCP(initial_rate=rate, global_tolerance=total)
    found = first_round(method)
    assert found.rounds == 1
    assert [(v.group, v.ratio, v.task) for v in found.visits] == brute_force(method)
    assert sum(v.ratio > 0 for v in found.visits) > 1


def test_the_worst_task_decides() -> None:
    def fragile(outputs: Any, batch: Any) -> Tensor:
        return square(outputs, batch) ** 3

    method = PAGCP(initial_rate=0.4, global_tolerance=3.0)
    alone = first_round(method, tasks={"square": Task(square)}).visits
    both = first_round(method, tasks={"square": Task(square), "fragile": Task(fragile)}).visits
    assert {v.task for v in both} == {"fragile"}
    assert sum(v.ratio for v in both) < sum(v.ratio for v in alone)


def test_a_unit_that_no_ratio_harms_is_pruned_at_the_last() -> None:
    def still(outputs: Any, batch: Any) -> Tensor:
        return 1 + 0 * outputs[0].sum()

    found = first_round(PAGCP(topk=1.0), tasks={"still": Task(still)})
    assert [v.ratio for v in found.visits] == [RATIOS[-1]] * len(found.visits)
    assert all(v.steps == int(0.95 * trained()[2].groups()[v.group].width) for v in found.visits)


def test_only_the_share_topk_of_units_is_pruned_the_cheapest() -> None:
    method = PAGCP(initial_rate=0.3, global_tolerance=3.0, topk=0.5)
    _, _, coupling = trained()
    found = method.search(asked(0.6))
    assert found.rounds > 1
    searched = Search(asked(0.6), method)
    state = searched._round(searched._resumed())
    visits = replace(method, topk=1.0).search(asked(0.999)).visits
    cheapest = sorted((v for v in visits if v.steps), key=lambda v: v.price)[: len(coupling.groups()) // 2]
    lost = {g.index for g in coupling.groups() if np.isin(g.choices, np.array(state.gone, dtype=int)).any()}
    assert lost == {v.group for v in cheapest}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_the_budget_is_met_and_used(fast: bool, share: float) -> None:
    method = PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=fast)
    _, data, coupling = trained()
    plan = fxprune.plan(coupling, Budget(macs=share), method=method, calibration=data, tasks=TASKS)
    assert 0.98 * share < plan.costs.share("macs") <= share
    assert plan.method == repr(method)
    found = method.search(asked(share))
    assert np.array_equal(found.keep, plan.keep)


def test_constraints_hold() -> None:
    _, data, coupling = trained()
    constraints = Constraints(multiple_of=4, min_width=8, keep_outputs=["a"])
    method = PAGCP(initial_rate=0.2, global_tolerance=2.5, rate_slope=0.2)
    plan = fxprune.plan(
        coupling, Budget(macs=0.6), method=method, calibration=data, tasks=TASKS, constraints=constraints
    )
    assert ("a.weight", 0) not in plan.kept
    assert all(g.after % 4 == 0 and g.after >= 8 for g in plan.groups)


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up, self.head = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.stem(x)).relu()
        return self.head(self.up(x + self.b(self.a(x).relu())).relu())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("min_width", [0, 1])
def test_groups_of_all_kinds_are_units(fast: bool, min_width: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x) + 0.1
    slim = fxprune.compile(
        model, x, Budget(macs=0.6, params=0.7), method=PAGCP(initial_rate=0.3, fast=fast), progress=False,
        calibration=[(x, wanted)], tasks={"same": Task(lambda outputs, batch: F.mse_loss(outputs, batch[1]))},
        constraints=Constraints(min_width=min_width),
    )  # fmt: skip
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.passed
    assert {"balanced", "channels"} <= {g.kind for g in report.plan.groups}
    assert report.plan.costs.share("macs") <= 0.6
    assert report.plan.costs.share("params") <= 0.7


def test_channels_are_scored_on_the_weights_that_make_them() -> None:
    model = Mixed().eval()
    coupling = fxprune.couple(fxprune.trace(model, torch.randn(1, 3, 8, 8)))
    units = Units(coupling, Constraints(), 1)
    keep = np.ones(coupling.num_channels, dtype=bool)
    site = next(s for s in coupling.sites if s.name == "up.weight" and s.dim == 1)
    group = next(g for g in coupling.groups() if np.isin(site.channels, g.choices).all())
    wanted = model.up.weight.detach().double().abs().mean((0, 2, 3)).numpy()
    assert np.allclose(units.score(group, keep)[site.channels.ravel()], wanted)


def test_compile_takes_it_and_corrects_weights_where_asked() -> None:
    model, data, _ = trained()
    losses = []
    for compensate in (False, True):
        method = PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=True, compensate=compensate)
        slim = fxprune.compile(
            model, data[0][0], Budget(macs=0.4), method=method, calibration=data, tasks=TASKS, progress=False
        )
        assert fxprune.report(slim).verification.passed
        with torch.no_grad():
            losses.append(sum(float(t.loss(slim(b[0]), b)) for b in data for t in TASKS.values()))
    assert losses[1] < losses[0]


def test_the_fast_search_measures_less_and_plans_as_well() -> None:
    method = PAGCP(initial_rate=0.1, global_tolerance=1.6)
    full, fast = (replace(method, fast=flag).search(asked(0.5)) for flag in (False, True))
    assert fast.evaluations * 6 <= full.evaluations
    assert slim_losses(fast.keep).sum() <= 1.1 * slim_losses(full.keep).sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": None}, r"PAGCP needs calibration batches: pass `calibration=\[\(inputs"),
        ({"tasks": None}, r"PAGCP needs tasks: pass `tasks=\{'name'"),
        ({"tasks": {"none": Task(lambda o, b: 0 * o[0].sum())}}, r"task 'none' is 0\.0.*finite and above 0"),
        ({"bounds": {"macs": 5.0}}, "the budget cannot be met"),
    ],
)
def test_what_is_missing_is_named(settings: dict[str, Any], message: str) -> None:
    problem = replace(asked(), **settings)
    with pytest.raises(PlanError, match=message):
        PAGCP().search(problem)


def test_a_budget_beyond_the_tolerances_is_refused_with_how_far_it_got() -> None:
    for settings, fix in (
        ({"rounds": 1}, "Raise `rounds`, `initial_rate`"),
        ({"rate_slope": 0.0}, "Raise `rate_slope`"),
    ):
        method = PAGCP(**({"initial_rate": 1e-4, "global_tolerance": 1.001, "tolerance_slope": 0.0} | settings))
        with pytest.raises(PlanError, match=r"(?s)does not meet the budget.*\(30\.0% of the dense.*reached") as raised:
            method.search(asked(0.3))
        assert fix in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_rate": 0.0}, "a positive share"),
        ({"global_tolerance": 1.01}, r"above 1 \+ initial_rate = 1\.06"),
        ({"topk": 1.5}, "a share such as"),
        ({"rounds": 0}, "1 or more"),
        ({"norm": 3}, "1 or 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PAGCP(**settings)


def test_any_object_that_chooses_is_a_method() -> None:
    class Chooses:
        def __init__(self, keep: Any) -> None:
            self.keep = keep

        def choose(self, problem: Problem) -> Any:
            return self.keep

    _, _, coupling = trained()
    keep = methods.PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=True).search(asked(0.5)).keep
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=Chooses(keep))
    assert np.array_equal(plan.keep, keep)
    with pytest.raises(PlanError, match="expected bool of shape"):
        fxprune.plan(coupling, Budget(macs=0.5), method=Chooses([1, 2]))
    with pytest.raises(PlanError, match=r"Stop at `problem\.bounds`"):
        fxprune.plan(coupling, Budget(macs=0.5), method=Chooses(np.ones(len(keep), dtype=bool)))
    with pytest.raises(PlanError, match="the class PAGCP, not an instance"):
        fxprune.plan(coupling, Budget(macs=0.5), method=methods.PAGCP)  # type: ignore[arg-type]
