"""HBGS and HBGTS commit what a direct evaluation on rewritten networks says, meet budgets, and survive being killed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pagcp import Mixed, slim_losses
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from two_tasks import TASKS, asked, batches, trained

import fxprune
from fxprune import Budget, Constraints, PlanError, Task, methods, rerunning
from fxprune.calibrating import calibrate
from fxprune.calibrations import Calibration
from fxprune.methods import HBGS, HBGTS, FilterBackward, FilterOMP, PathMethod, Problem
from fxprune.offering import Offering
from fxprune.planning import plan_of

MAKERS = {"stem": ["stem"], "a": ["a"], "c": ["b", "c"], "wide": ["wide"]}
READERS = {"stem": ["a", "c"], "a": ["b"], "c": ["wide"], "wide": ["signs", "square"]}


@cache
def calibrated() -> Calibration:
    _, data, coupling = trained()
    return calibrate(coupling, data, TASKS)


def names() -> list[str]:
    """Return the short name of each group."""
    groups = trained()[2].groups()
    return [next(n for n, m in MAKERS.items() if g.name.split(".")[0] in (n, *m)) for g in groups]


def slimmed(keep: np.ndarray) -> tuple[nn.Module, fxprune.Plan]:
    """Return the network of `keep`, rewritten, its weights corrected by least squares but no statistics estimated."""
    _, _, coupling = trained()
    plan = plan_of(coupling, keep)
    slim = fxprune.rewrite(coupling, plan)
    fxprune.compensate(coupling, plan, slim, replace(calibrated(), batches=None))
    return slim, plan


def seen(module: nn.Module, layers: list[str], x: Tensor) -> list[Tensor]:
    """Return what some layers of a network return."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, out))
        for name in layers
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in layers]


def norm_of(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return |a - b| / |b| over all pairs."""
    change = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (change / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def layer_error(keep: np.ndarray, group: str) -> float:
    """Return the relative error of the layers that read a group, from the rewritten network."""
    model, data, _ = trained()
    slim, plan = slimmed(keep)
    total = 0.0
    for layer in READERS[group]:
        kept = np.array(plan.kept.get((f"{layer}.weight", 0), range(getattr(model, layer).weight.shape[0])))
        pairs = [(seen(slim, [layer], b[0])[0], seen(model, [layer], b[0])[0][:, kept]) for b in data]
        total += norm_of(pairs)
    return total


def end_error(keep: np.ndarray, group: str) -> float:
    model, data, _ = trained()
    slim, _ = slimmed(keep)
    with torch.no_grad():
        answers = [(slim(b[0]), model(b[0])) for b in data]
    return sum(norm_of([(a[i], b[i]) for a, b in answers]) for i in range(2)) / 2


def loss_error(keep: np.ndarray, group: str) -> float:
    _, data, _ = trained()
    slim, _ = slimmed(keep)
    with torch.no_grad():
        losses = np.mean([[float(task.loss(slim(b[0]), b)) for task in TASKS.values()] for b in data], axis=0)
    dense = slim_losses(np.ones(len(keep), dtype=bool))
    return float(np.mean(losses / dense - 1))


def worst_filters(keep: np.ndarray, group: str, count: int) -> list[int]:
    """Return which channels backward elimination drops from the rewritten network, by exhaustive least squares."""
    _, _, coupling = trained()
    slim, _ = slimmed(keep)
    made = [dict(slim.named_parameters())[f"{m}.weight"].detach().double().numpy() for m in MAKERS[group]]
    f = np.concatenate([w.reshape(len(w), -1) for w in made], axis=1).T
    site = next(s for s in coupling.sites if s.name == f"{MAKERS[group][0]}.weight" and s.dim == 0)
    channels = [c for c in site.channels.ravel() if keep[c]]
    left = list(range(len(channels)))

    def without(k: int) -> float:
        kept = [i for i in left if i != k]
        return float(((f - f[:, kept] @ np.linalg.lstsq(f[:, kept], f, rcond=1e-10)[0]) ** 2).sum())

    for _ in range(count):
        left.remove(min(left, key=without))
    return [channels[i] for i in range(len(channels)) if i not in left]


def brute_force(judge: Any, rounds: int, count: int) -> list[tuple[int, float]]:
    """Do some rounds on rewritten networks; return group and error of each commit."""
    _, _, coupling = trained()
    keep, found = np.ones(coupling.num_channels, dtype=bool), []
    for _ in range(rounds):
        offers = []
        for index, name in enumerate(names()):
            trial = keep.copy()
            trial[worst_filters(keep, name, count)] = False
            trial = coupling.settle(trial)
            offers.append((judge(trial, name), index, trial))
        error, index, keep = min(offers, key=lambda offer: offer[0])
        found.append((index, error))
    return found


@pytest.mark.parametrize(
    ("method", "judge"),
    [
        (HBGS(filters_per_round=2, backward=True, remember=False), layer_error),
        (HBGTS(filters_per_round=2, backward=True, remember=False), end_error),
        (HBGTS(filters_per_round=2, backward=True, remember=False, judge="loss"), loss_error),
    ],
    ids=["layers", "outputs", "loss"],
)
def test_commits_are_what_rewritten_networks_say(method: Any, judge: Any) -> None:
    found = method.search(asked(0.8, calibration=calibrated()))
    assert len(found.commits) >= 3
    wanted = brute_force(judge, len(found.commits), 2)
    assert [group for group, _, _ in found.commits] == [group for group, _ in wanted]
    assert [error for *_, error in found.commits] == pytest.approx([error for _, error in wanted], rel=1e-3)


def test_what_is_remembered_saves_measurements() -> None:
    method = HBGTS(filters_per_round=2, backward=True)
    every, lazy = (
        replace(method, remember=flag).search(asked(0.5, calibration=calibrated())) for flag in (False, True)
    )
    assert every.evaluations == every.published
    assert every.forwards < 0.7 * every.evaluations  # what lies before a group is not run
    assert lazy.evaluations < 0.75 * lazy.published
    assert lazy.forwards < 0.7 * lazy.evaluations
    assert np.array_equal(lazy.keep, every.keep)  # here; it is a bound that need not hold


@pytest.mark.parametrize(
    "method", [HBGS(), HBGS(backward=True, on="activations"), HBGTS(), HBGTS(judge="loss")], ids=repr
)
def test_narrow_networks_find_what_wide_ones_find(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = method.search(asked(0.2, calibration=calibrated()))
    monkeypatch.setattr(rerunning, "NARROW", 0)
    wide = method.search(asked(0.2, calibration=calibrated()))
    assert np.array_equal(narrow.keep, wide.keep)
    assert [c[:2] for c in narrow.commits] == [c[:2] for c in wide.commits]
    assert [c[2] for c in narrow.commits] == pytest.approx([c[2] for c in wide.commits], rel=1e-3)
    assert narrow.forwards < 0.8 * wide.forwards


@pytest.mark.parametrize("method", [HBGS(), HBGS(remember=False), HBGTS(), HBGTS(beam=2)], ids=repr)
def test_one_search_for_many_budgets_finds_what_each_would_find(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(0.8, calibration=calibrated())
    shares = (0.8, 0.5, 0.3, 0.6)  # the last needs a search of its own
    bounds = [{"macs": share * first.bounds["macs"] / 0.8} for share in shares]
    alone = [method.search(replace(first, bounds=b)) for b in bounds]
    rounds = []
    children = Offering._children
    monkeypatch.setattr(Offering, "_children", lambda self, *args: rounds.append(1) or children(self, *args))
    offering = method.offering(first)
    together = [offering.run(b) for b in bounds]
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.keep, other.keep)
        assert one.commits == other.commits
        assert (one.evaluations, one.published) == (other.evaluations, other.published)
        assert one.forwards == pytest.approx(other.forwards)
    needed = [len(found.commits) for found in alone]
    if getattr(method, "beam", 1) == 1:
        assert len(rounds) == needed[2] + 2 + needed[3]  # the round that meets a budget is made anew for the next
    else:
        assert len(rounds) >= sum(needed)


def test_a_sweep_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = Offering.__init__
    monkeypatch.setattr(Offering, "__init__", lambda self, *args, **kw: made.append(1) or init(self, *args, **kw))
    budgets = [fxprune.Budget(macs=share) for share in (0.7, 0.4)]
    coupling, data = asked(0.5).coupling, calibrated()
    points = fxprune.sweep(coupling, budgets, method=HBGS(), calibration=data)
    assert len(made) == 1
    for budget, point in zip(budgets, points, strict=True):
        assert point.plan.groups == fxprune.plan(coupling, budget, method=HBGS(), calibration=data).groups


def test_a_wider_beam_ends_with_no_larger_error() -> None:
    narrow, wide = (HBGTS(filters_per_round=4, backward=True, beam=beam).search(asked(0.5)) for beam in (1, 3))
    assert wide.error <= narrow.error * (1 + 1e-6)  # ways to the same channels differ by rounding
    assert wide.evaluations > narrow.evaluations


ALL = [
    HBGS(),
    HBGS(backward=True, on="activations"),
    HBGS(compensate=False),
    HBGTS(filters_per_round=8),
    FilterOMP(),
    FilterOMP(on="activations", scope="global"),
    FilterBackward(),
    FilterBackward(on="activations", scope="optimal"),
]


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_budgets_and_constraints_hold(method: Any) -> None:
    model, data, _ = trained()
    slim = fxprune.compile(
        model, data[0][0], Budget(macs=0.5), method=method, calibration=data, tasks=TASKS, progress=False,
        constraints=Constraints(multiple_of=2, min_width=4, keep_outputs=["a"]),
    )  # fmt: skip
    plan, verification = fxprune.report(slim).plan, fxprune.report(slim).verification
    assert verification is not None
    assert verification.passed
    assert 0.4 < plan.costs.share("macs") <= 0.5
    assert ("a.weight", 0) not in plan.kept
    assert all(g.after % 2 == 0 and g.after >= 4 for g in plan.groups)


class Branches(nn.Module):
    """A concatenation, a residual stream, and an inplace op on what is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.mix, self.skip = nn.Conv2d(20, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.mix(torch.cat([self.a(x).sigmoid(), self.b(x)], 1)))
        x = x + self.skip(x)
        x += 1
        return self.head(self.relu(x).mean((2, 3)))


@pytest.mark.parametrize("method", [m for m in ALL if m.compensate], ids=repr)
@pytest.mark.parametrize("kind", [Mixed, Branches])
def test_groups_of_all_kinds_go(method: Any, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, data = kind().eval(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    slim = fxprune.compile(model, data[0], Budget(macs=0.6), method=method, calibration=data, progress=False)
    plan = fxprune.report(slim).plan
    assert plan.costs.share("macs") <= 0.6
    if not isinstance(method, PathMethod):
        assert plan.costs.share("macs") > 0.5
    with torch.no_grad():
        assert norm_of([(slim(x), model(x)) for x in data]) < 0.9


def test_correcting_weights_pays() -> None:
    model, data, _ = trained()
    losses = []
    for compensate in (False, True):
        slim = fxprune.compile(
            model, data[0][0], Budget(macs=0.5), method=HBGS(backward=True, compensate=compensate), calibration=data,
            tasks=TASKS, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            losses.append(sum(float(t.loss(slim(b[0]), b)) for b in data for t in TASKS.values()))
    assert losses[1] < 0.8 * losses[0]


def test_weights_tuned_between_rounds_are_those_of_the_slim_network() -> None:
    model, data, _ = trained()
    students: list[nn.Module] = []

    def tune(student: nn.Module, teacher: nn.Module) -> None:
        students.append(student)
        optimizer = torch.optim.SGD(student.parameters(), 0.01)
        for batch in data:
            optimizer.zero_grad()
            with torch.no_grad():
                wanted = teacher(batch[0])
            sum(F.mse_loss(a, b) for a, b in zip(student(batch[0]), wanted, strict=True)).backward()
            optimizer.step()

    before = {name: t.clone() for name, t in model.state_dict().items()}
    method = HBGS(filters_per_round=4, tune=tune)
    slim = fxprune.compile(model, data[0][0], Budget(macs=0.5), method=method, calibration=data, progress=False)
    assert len(students) >= 3
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    plan = fxprune.report(slim).plan
    wanted = students[-1].state_dict()["wide.weight"]
    if ("wide.weight", 0) in plan.kept or ("wide.weight", 1) in plan.kept:
        wanted = plan.cut("wide.weight", wanted)
    assert torch.equal(slim.state_dict()["wide.weight"], wanted)


class KilledError(Exception):
    """What stands for the end of the process."""


@pytest.mark.parametrize("beam", [1, 2])
def test_a_killed_search_goes_on_and_ends_with_the_same_plan(beam: int, tmp_path: Path) -> None:
    calibration = calibrated()
    method = HBGTS(filters_per_round=4, judge="loss", beam=beam)
    wanted = method.search(asked(0.5, calibration=calibration))
    left, kills, found = 0, 0, None

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError
        return TASKS["signs"].loss(outputs, batch)

    tasks = {"signs": Task(loss), "square": TASKS["square"]}
    written = replace(method, checkpoint=str(tmp_path / "search.json"))
    while found is None:
        left = 24 if kills < 3 else -1
        try:
            found = written.search(asked(0.5, tasks=tasks, calibration=replace(calibration, tasks=tasks)))
        except KilledError:
            kills += 1
    assert kills == 3
    assert np.array_equal(found.keep, wanted.keep)
    assert [group for group, *_ in found.commits] == [group for group, *_ in wanted.commits]
    with pytest.raises(PlanError, match=r'its method is "HBGTS\(filters_per_round=4.*Delete it'):
        replace(written, filters_per_round=3).search(asked(0.5, calibration=calibration))


@pytest.mark.parametrize("judge", ["layers", "outputs", "loss"])
def test_a_checkpoint_is_of_its_data_in_any_order(judge: str, tmp_path: Path) -> None:
    model, data, _ = trained()
    path = str(tmp_path / "search.json")
    method: Any = HBGS(20, checkpoint=path) if judge == "layers" else HBGTS(20, judge=judge, checkpoint=path)
    request: dict[str, Any] = {"method": method, "progress": False, "tasks": TASKS, "verify": False}

    def run(batches: list[Any]) -> str:
        slim = fxprune.compile(model, data[0][0], Budget(macs=0.6), calibration=batches, **request)
        return fxprune.report(slim).plan.digest

    digest = run(data)
    assert run(data[::-1]) == digest
    others = [[(-x, y) for x, y in data], data[1:], [(x, (a, b + 1)) for x, (a, b) in data]]
    if judge == "loss":  # the same inputs and targets, but not of each other
        others.append([(x, other) for (x, _), (_, other) in zip(data, data[1:] + data[:1], strict=True)])
    for other in others:
        with pytest.raises(PlanError, match=r"search\.json is of other data: .* Delete it, or pass another path"):
            run(other)


def test_a_checkpoint_without_a_folder_is_refused_before_the_first_round(tmp_path: Path) -> None:
    path = str(tmp_path / "missing" / "search.json")
    rounds: list[int] = []
    tasks = {"signs": Task(lambda outputs, batch: rounds.append(0) or TASKS["signs"].loss(outputs, batch))}
    dense = 2 * len(trained()[1])  # once for what it starts from, and once to calibrate
    for method in (HBGS(checkpoint=path), HBGTS(judge="loss", checkpoint=path), methods.PAGCP(checkpoint=path)):
        rounds.clear()
        with pytest.raises(PlanError, match=r"search\.json cannot be written: .*missing is no folder"):
            method.choose(asked(0.5, tasks=tasks, calibration=trained()[1]))
        assert len(rounds) <= dense


def test_what_cannot_tune_or_tunes_to_nan_is_refused() -> None:
    model, data, _ = trained()

    def diverge(student: nn.Module, teacher: nn.Module) -> None:
        with torch.no_grad():
            student.wide.weight[0] *= torch.nan

    with pytest.raises(PlanError, match=r"HBGTS\(tune=3\) cannot be called"):
        HBGTS(tune=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=r"`tune` left 'wide\.weight' with values that are not finite"):
        fxprune.compile(model, data[0][0], Budget(macs=0.5), method=HBGS(tune=diverge), calibration=data)


def test_batches_may_have_no_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.cat([x for x, _ in trained()[1]]))

    model, data, _ = trained()
    loader = DataLoader(Stream(), len(data[0][0]))
    for method in (HBGS(20), HBGTS(20)):
        request: dict[str, Any] = {"method": method, "progress": False, "verify": False}
        plans = [
            fxprune.report(fxprune.compile(model, data[0][0], Budget(macs=0.7), calibration=some, **request)).plan
            for some in ([x for x, _ in data], loader)
        ]
        assert plans[0].digest == plans[1].digest


def test_without_data_or_with_nothing_to_give_it_is_refused() -> None:
    with pytest.raises(PlanError, match=r"HBGS needs calibration batches: pass `calibration=\["):
        HBGS().search(asked(calibration=None))
    with pytest.raises(PlanError, match="HBGTS needs tasks"):
        HBGTS(judge="loss").search(asked(tasks=None))
    with pytest.raises(PlanError, match="the budget cannot be met"):
        HBGS().search(asked(bounds={"macs": 5.0}))
    coupling = trained()[2]
    without = Calibration.of_batches(coupling, batches(1, 0), None)
    with pytest.raises(PlanError, match="activations need moments"):
        fxprune.plan(coupling, Budget(macs=0.5), method=FilterOMP(on="activations"), calibration=without)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HBGS, {"filters_per_round": 0}, "Pass 1 or more"),
        (HBGS, {"on": "weights"}, 'Pass "filters"'),
        (HBGTS, {"judge": "accuracy"}, 'Pass "outputs"'),
        (HBGTS, {"beam": 0}, "Pass 1 or more"),
        (HBGTS, {"beam": 2, "tune": print}, "tunes one network"),
        (HBGS, {"checkpoint": "x", "tune": print}, "not both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        kind(**settings)


def test_filters_need_no_data() -> None:
    _, _, coupling = trained()
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=FilterBackward())
    assert plan.costs.share("macs") <= 0.5
    assert isinstance(Problem(coupling, {}, Constraints()), Problem)
