"""Ranks plan what one process plans, and none waits for one that has failed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import two_tasks
from processes import in_ranks
from small import Multitask, settled
from torch import Tensor, nn
from torch_pruning import importance

import fxprune
from fxprune import Budget, PlanError, Task, methods, sharing
from fxprune.assuming import assume
from fxprune.shares import Share

BUDGET = Budget(macs=0.5)


@pytest.mark.parametrize("counts", [(1,), (3, 3), (4, 3), (2, 0, 1), (0, 2), (5, 1, 3, 3)])
def test_batches_have_the_places_that_one_process_gives_them(counts: tuple[int, ...]) -> None:
    ranks = [[(r, i) for i in range(count)] for r, count in enumerate(counts)]
    order = [batch for turn in zip_longest(*ranks) for batch in turn if batch is not None]
    shares = []
    for r, batches in enumerate(ranks):
        found = {"size": lambda: len(counts), "rank": lambda r=r: r, "gather": lambda what, value: list(counts)}
        with mock.patch.multiple(sharing, **found):
            shares.append(Share.of(batches))
    for chosen in (lambda place: True, lambda place: place % 4 != 1, lambda place: place % 4 == 1):
        parts = [share.where(chosen) for share in shares]
        wanted = [batch for place, batch in enumerate(order) if chosen(place)]
        merged = {place: batch for p in parts for place, batch in zip(p.places, p, strict=True)}
        assert merged == dict(enumerate(wanted))
        assert {p.total for p in parts} == {len(wanted)}
        assert all(bool(p) == bool(wanted) for p in parts)


def network() -> nn.Module:
    torch.manual_seed(0)
    return settled(Multitask(8))


def data(count: int) -> list[Tensor]:
    """Return batches of unequal sizes."""
    return [torch.randn(4 + i % 3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def labelled(batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the batches with classes, which occur in another order on each rank."""
    return [(x, (x.mean((1, 2, 3)) * 100).long() % 3) for x in batches]


def error_of(name: str) -> Callable[[Any, Any], Tensor]:
    return lambda outputs, batch: (outputs[name] - batch.mean()).square().mean()


def tasks(tolerance: float | None = None) -> dict[str, Task]:
    return {name: Task(error_of(name), tolerance) for name in ("seg", "depth", "present")}


def results(batches: list[Tensor]) -> dict[str, Any]:
    """Do everything that reads batches."""
    model, example = network(), torch.zeros(1, 3, 8, 8)
    coupling = fxprune.couple(fxprune.trace(model, example))
    guarded = {"calibration": batches, "tasks": tasks(0.1), "on_conflict": "closest"}
    search = methods.PAGCP(initial_rate=0.2, global_tolerance=2.0, rate_slope=0.2)
    jobs: dict[str, dict[str, Any]] = {
        "joint": {"calibration": batches, "tasks": tasks()},
        "joint without tasks": {"calibration": iter(batches)},
        "joint within tolerances": guarded,
        "taylor": {"method": methods.Taylor("global"), "calibration": batches, "tasks": tasks()},
        "taylor within tolerances": {"method": methods.Taylor(), **guarded},
        "pagcp": {"method": search, "calibration": batches, "tasks": tasks()},
        "pagcp, fast": {"method": replace(search, fast=True), "calibration": batches, "tasks": tasks()},
        "torch pruning": {
            "method": methods.FromTorchPruning(importance.GroupHessianImportance()),
            "calibration": batches,
            "tasks": tasks(),
        },
    }
    pairs: dict[str, Any] = {
        "calibration": labelled(batches),
        "tasks": {"seg": Task(lambda outputs, _: outputs["seg"].square().mean())},
    }
    jobs["joint, aware of classes"] = {"method": methods.Joint(within=0.2), **pairs}
    jobs["hbgs"] = {"method": methods.HBGS(), "calibration": batches}
    jobs["hbgts"] = {"method": methods.HBGTS(backward=True, judge="loss"), "calibration": batches, "tasks": tasks()}
    jobs["catro"] = {"method": methods.CATRO(), **pairs}
    plans = {name: fxprune.plan(coupling, BUDGET, **asked).digest for name, asked in jobs.items()}
    calibration = fxprune.calibrate(coupling, batches, tasks())
    by_class = fxprune.calibrate(coupling, pairs["calibration"], pairs["tasks"], by_class=True)
    curve = fxprune.sweep(coupling, [Budget(macs=0.7), BUDGET], calibration=batches, tasks=tasks())
    slim = fxprune.compile(model, example, BUDGET, progress=False, **guarded)
    refitted = fxprune.compile(
        model, example, BUDGET, method=methods.Joint(sequential=True), progress=False, **jobs["joint"]
    )
    return {
        "plans": plans,
        "moments": {n: (m.second, m.mean, *m.sensitivity.values()) for n, m in calibration.moments.items()},
        "between": {n: (m.between,) for n, m in by_class.moments.items()},
        "norms": dict(calibration.norms),
        "told": (dict(calibration.losses), calibration.samples),
        "curve": [(point.plan.digest, point.rises) for point in curve],
        "weights": slim.state_dict(),
        "refitted": refitted.state_dict(),
    }


def on_a_share(count: int) -> dict[str, Any]:
    return results(data(count)[sharing.rank() :: sharing.size()])


@pytest.mark.parametrize(("ranks", "count"), [(2, 7), (3, 2)])
def test_ranks_find_what_one_process_finds(ranks: int, count: int) -> None:
    wanted = results(data(count))
    for found in in_ranks(ranks, on_a_share, count):
        for name in ("plans", "told", "curve"):
            assert found[name] == wanted[name]
        assert list(found["moments"]) == list(wanted["moments"])
        for kind in ("moments", "between"):
            for name, moments in wanted[kind].items():
                for mine, theirs in zip(moments, found[kind][name], strict=True):
                    assert (mine - theirs).norm() <= 1e-12 * mine.norm()
        for name in ("norms", "weights", "refitted"):
            assert found[name].keys() == wanted[name].keys()
            for key, value in wanted[name].items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-6, atol=1e-7)


@dataclass(frozen=True)
class Differs:
    """Gives other scores on each rank."""

    scope: str = "uniform"

    def scores(self, coupling: fxprune.Coupling, calibration: Any = None, tasks: Any = None) -> np.ndarray:
        return np.random.default_rng(sharing.rank()).random(coupling.num_channels)


@dataclass(frozen=True)
class Late:
    """Takes its time on rank 1."""

    scope: str = "uniform"

    def scores(self, coupling: fxprune.Coupling, calibration: Any = None, tasks: Any = None) -> np.ndarray:
        time.sleep(sharing.rank())
        return np.arange(float(coupling.num_channels))


def failing(outputs: Any, batch: Tensor) -> Tensor:
    if sharing.rank() == 1:
        raise RuntimeError("a bad batch")
    return outputs["seg"].square().mean()


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistakes() -> list[str]:
    """Make mistakes on rank 1, one after the other; the last ends it."""
    model, batches, odd = network(), data(4)[sharing.rank() :: sharing.size()], sharing.rank() == 1
    coupling = fxprune.couple(fxprune.trace(model, batches[0]))
    asked: dict[str, Any] = {"calibration": batches, "tasks": tasks()}
    found: list[str] = []

    def tell(budget: Budget = BUDGET, coupling: fxprune.Coupling = coupling, **settings: Any) -> None:
        found.append(message(lambda: fxprune.plan(coupling, budget, **settings)))

    other = network()
    if odd:
        nn.init.ones_(other.seg[0].bias)  # pyright: ignore[reportArgumentType, reportIndexIssue]
    tell(coupling=fxprune.couple(fxprune.trace(other, batches[0])), **asked)
    tell(Budget(macs=0.4 if odd else 0.5), **asked)
    tell(method=Differs())
    tell(method=methods.Taylor(), calibration=batches, tasks={"seg": Task(failing)})
    tell(method=methods.Joint(), calibration=assume(coupling) if odd else batches)
    with mock.patch.multiple(sharing, PATIENCE=0.2), mock.patch.object(sharing.logger, "warning") as warn:
        fxprune.plan(coupling, BUDGET, method=Late())
        found += [text % tuple(values) for (text, *values), _ in warn.call_args_list]
    tell(Budget(macs=1e-6), **asked)
    tell(**asked)
    if odd:
        os.kill(os.getpid(), signal.SIGKILL)
    tell(**asked)
    return found


def test_mistakes_are_told_on_every_rank_and_none_waits() -> None:
    found, ended = in_ranks(2, mistakes)
    assert ended is None
    weights, budgets, plans, batch, calls, late, macs, right, gone = found
    assert "the network is not the same on all ranks: the hash of 'seg.0.bias' is" in weights
    assert "torch.distributed.broadcast(t, 0)" in weights
    assert "the request is not the same on all ranks: budget is Budget(macs=0.5," in budgets
    assert "on rank 0 and Budget(macs=0.4," in budgets
    assert "the plan is not the same on all ranks: its hash is" in plans
    assert "because another has failed: rank 1 raised RuntimeError: a bad batch" in batch
    assert batch.startswith("PlanError")
    assert "the ranks do not do the same: rank 0 at 'the request', rank 1 at 'paths'" in calls
    assert late == "rank 0 has waited 0 s at 'the plan' for another. Call fxprune on every rank, not on one alone."
    assert "the budget cannot be met" in macs
    assert right == "no error"
    assert "rank 0 has lost the others at" in gone


def searched(state: dict[str, Tensor], method: methods.PAGCP, end: int = 0) -> Any:
    """Search; the first rank is killed when it computes its loss number `end`."""
    calls = 0

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if sharing.rank() == 0 and calls == end:
            os.kill(os.getpid(), signal.SIGKILL)
        return two_tasks.signs(outputs, batch)

    mine = two_tasks.batches(3, 2)[sharing.rank() :: sharing.size()]
    asked = two_tasks.problem(two_tasks.rebuilt(state), mine, 0.6)
    try:
        return method.search(replace(asked, tasks=two_tasks.TASKS | {"signs": Task(loss)}))
    except PlanError as error:
        return str(error)


@pytest.mark.parametrize("fast", [False, True])
def test_a_search_of_killed_ranks_goes_on_with_as_many_or_fewer(fast: bool, tmp_path: Path) -> None:
    state = two_tasks.trained()[0].state_dict()
    method = methods.PAGCP(initial_rate=0.1, global_tolerance=1.6, fast=fast)
    wanted = searched(state, method)
    many, one = (replace(method, checkpoint=str(tmp_path / name)) for name in ("many.json", "one.json"))
    killed, lost = in_ranks(2, searched, state, many, 14)
    assert killed is None
    assert "rank 1 has lost the others at 'losses'" in lost
    shutil.copy(tmp_path / "many.json", tmp_path / "one.json")
    for found in (*in_ranks(2, searched, state, many), searched(state, one)):
        assert np.array_equal(found.keep, wanted.keep)
        assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)
        assert [(v.group, v.steps) for v in found.visits] == [(v.group, v.steps) for v in wanted.visits]
