"""Scatter by class, trace-ratio selection, lazy greedy growth and CATRO, against brute force and scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from small import Chain, Multitask, Residual, settled
from torch import Tensor, nn

import fxprune
from fxprune import Budget, Constraints, PlanError, Task, methods
from fxprune.allocating import steps_of_all
from fxprune.criteria.trace_ratio import TraceRatio, trace_ratio_of
from fxprune.growing import Growth, concave, lazy_greedy
from fxprune.memberships import LabelReader, Memberships
from fxprune.paths import paths_by_score
from fxprune.scattering import Rows, ScatterSums, scatter

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 4, (24,), generator=GENERATOR)
BATCHES = [(X[i : i + 8], LABELS[i : i + 8]) for i in (0, 8, 16)]

positive = st.floats(0.01, 10)


def coupled(model: nn.Module) -> fxprune.Coupling:
    return fxprune.couple(fxprune.trace(settled(model), X[:1]))


def slow_scatter(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two scatters by their definition; features (n, ..), of which all but the first dim are summed over."""
    between, within = 0.0, 0.0
    for c in np.unique(labels[labels >= 0]):
        mine = features[labels == c]
        between += len(mine) * (mine.mean(0) - features[labels >= 0].mean(0)) ** 2
        within += ((mine - mine.mean(0)) ** 2).sum(0)
    return np.asarray(between), np.asarray(within)


def test_streamed_scatters_are_those_of_the_definition_however_batches_are_cut() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(1e4, 1, (50, 7)), rng.integers(0, 5, 50)
    wanted = slow_scatter(features, labels)
    lda = LinearDiscriminantAnalysis(store_covariance=True).fit(features, labels)
    assert wanted[1] == pytest.approx(np.diag(lda.covariance_) * 50)
    for size in (1, 7, 50):
        reader, sums = LabelReader(None), None
        for i in range(0, 50, size):
            x = torch.from_numpy(features[i : i + size])
            shares = reader.read((x, torch.from_numpy(labels[i : i + size])))["labels"].of_samples
            sums = ScatterSums(x) if sums is None else sums
            sums.add(x, Rows(shares))
        assert sums is not None
        for found, expected in zip(sums.scatters(), wanted, strict=True):
            assert found.numpy() == pytest.approx(expected, rel=1e-8)


def test_a_sample_of_several_classes_counts_in_each() -> None:
    x = torch.randn(9, 2, dtype=torch.float64, generator=GENERATOR)
    shares = torch.randint(0, 2, (9, 3), generator=GENERATOR).double()
    sums = ScatterSums(x)
    sums.add(x, Rows(shares))
    sample, label = shares.nonzero(as_tuple=True)
    wanted = slow_scatter(x[sample].numpy(), label.numpy())  # a sample is repeated once for each of its classes
    for found, expected in zip(sums.scatters(), wanted, strict=True):
        assert found.numpy() == pytest.approx(expected)


def features_of(model: nn.Module, where: str) -> Tensor:
    """What goes into a module, for all samples."""
    seen: list[Tensor] = []
    handle = model.get_submodule(where).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(X)
    handle.remove()
    return seen[0]


def test_a_channel_scatters_in_every_tensor_that_carries_it_each_once() -> None:
    coupling = coupled(Residual())
    model = coupling.traced.model
    found = scatter(coupling, BATCHES)
    stream = [F.adaptive_avg_pool2d(features_of(model, name), 2).flatten(2) for name in ("a1", "b1")]
    stream.append(features_of(model, "head")[:, :, None])
    parts = [slow_scatter(s.double().numpy(), LABELS.numpy()) for s in stream]
    channels = coupling.tensors["stem.weight"][1][0].ravel()
    for i, values in enumerate((found.between, found.within)):
        assert values[channels] == pytest.approx(sum(part[i].sum(-1) for part in parts), rel=1e-5)
    assert found.seen[channels].all()


def test_positions_have_classes_of_their_own_where_labels_say_so() -> None:
    coupling = coupled(Multitask())
    maps = torch.randint(-1, 3, (24, 8, 8), generator=GENERATOR)
    found = scatter(coupling, [(X[:10], {"seg": maps[:10]}), (X[10:], {"seg": maps[10:]})])
    x = features_of(coupling.traced.model, "seg.2").movedim(1, -1).flatten(0, -2)
    wanted = slow_scatter(x.double().numpy(), maps.flatten().numpy())
    channels = coupling.tensors["seg.2.weight"][1][1].ravel()
    assert found.between[channels] == pytest.approx(wanted[0], rel=1e-4)
    assert found.within[channels] == pytest.approx(wanted[1], rel=1e-4)


def test_labels_at_another_resolution_are_those_at_the_centres() -> None:
    labels = torch.arange(36).reshape(1, 6, 6)
    places = torch.unravel_index(torch.arange(4), (1, 2, 2))
    assert Memberships(labels, 36).at(places, (1, 2, 2)).argmax(1).tolist() == [7, 10, 25, 28]
    assert Memberships(labels, 36).at(places, (1, 4)).shape == (4, 36)


def test_what_no_layer_reads_counts_where_it_is_made() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2)
            found = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
            return self.head(found.mean(1))

    x = torch.randn(12, 3, 2, 4, generator=GENERATOR)
    coupling = fxprune.couple(fxprune.trace(Attention().eval(), x))
    found = scatter(coupling, [(x, LABELS[:12])])
    with torch.no_grad():
        made = [getattr(coupling.traced.model, name)(x.flatten(2)).transpose(1, 2).double() for name in "qk"]
    wanted = sum(slow_scatter(F.adaptive_avg_pool1d(t, 2).numpy(), LABELS[:12].numpy())[0].sum(1) for t in made)
    assert found.between[coupling.tensors["q.weight"][1][0].ravel()] == pytest.approx(wanted, rel=1e-4)


@st.composite
def criteria(draw: st.DrawFn, choices: int = 8) -> tuple[TraceRatio, int]:
    cells = draw(st.sampled_from([1, 2]))
    n = draw(st.integers(cells, choices // cells)) * cells
    values = [np.array(draw(st.lists(positive, min_size=n, max_size=n))) for _ in range(2)]
    held = np.zeros(n, dtype=bool)
    parts = np.arange(n).reshape(cells, -1)
    held[draw(st.sampled_from([[], [0]]))] = True
    found = TraceRatio(*values, list(parts), [1] * cells, held)
    return found, draw(st.integers(1, n // cells))


@given(criteria())
def test_no_selection_has_a_greater_trace_ratio(drawn: tuple[TraceRatio, int]) -> None:
    criterion, steps = drawn
    found = criterion.select(steps)
    best = 0.0
    for kept in combinations(range(len(criterion.between)), steps * len(criterion.cells)):
        even = all(np.isin(cell, kept).sum() == steps for cell in criterion.cells)
        if even and np.isin(np.flatnonzero(criterion.held), kept).all():
            index = list(kept)
            best = max(best, criterion.between[index].sum() / criterion.within[index].sum())
    assert found.ratio == pytest.approx(best)
    assert found.ratio == pytest.approx(criterion.between[found.kept].sum() / criterion.within[found.kept].sum())


@given(criteria())
def test_the_best_ratio_falls_with_the_width(drawn: tuple[TraceRatio, int]) -> None:
    criterion, steps = replace(drawn[0], held=np.zeros_like(drawn[0].held)), drawn[1]
    ratios = [criterion.select(n).ratio for n in range(1, steps + 1)]
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(ratios))


def test_one_sample_of_each_class_ranks_by_what_is_between() -> None:
    coupling = coupled(Chain())
    first = [LABELS.tolist().index(c) for c in range(4)]
    found = scatter(coupling, [(X[first], LABELS[first])])
    assert found.within.max() < 1e-9 * found.between.max()
    for group in coupling.groups():
        criterion = trace_ratio_of(coupling, group, found)
        kept = criterion.select(5).kept
        assert criterion.between[kept].min() >= criterion.between[~kept].max()


def test_a_search_on_scatters_that_are_not_finite_ends() -> None:
    scatters = np.array([np.nan, 1.0, np.inf, 2.0])
    found = TraceRatio(scatters, scatters[::-1], [np.arange(4)], [1], np.zeros(4, dtype=bool)).select(2)
    assert found.kept.sum() == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_is_told_with_the_layer_that_meets_it(value: float) -> None:
    x = X.clone()
    x[5, 0, 0, 0] = value
    with pytest.raises(PlanError, match=r"features that go into layer 'conv2.weight' are NaN or infinite"):
        scatter(coupled(Chain()), [(x, LABELS)])


class Covered:
    """sum over groups of weight * concave(worth of the chosen / worth of all), over a ground set of items."""

    def __init__(self, worth: np.ndarray, group: np.ndarray, weight: np.ndarray) -> None:
        self.worth, self.group, self.weight = worth, group, weight

    def __call__(self, chosen: set[int]) -> float:
        mine = np.isin(np.arange(len(self.worth)), list(chosen))
        total = np.bincount(self.group, self.worth, len(self.weight))
        share = np.bincount(self.group, self.worth * mine, len(self.weight)) / np.maximum(total, 1e-300)
        return float((self.weight * concave(share)).sum())


@st.composite
def functions(draw: st.DrawFn, items: int = 8) -> Covered:
    n = draw(st.integers(2, items))
    worth = np.array(draw(st.lists(positive, min_size=n, max_size=n)))
    group = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    return Covered(worth, group, np.array(draw(st.lists(positive, min_size=3, max_size=3))))


@given(functions(), st.data())
def test_the_objective_is_monotone_and_submodular(f: Covered, data: st.DataObject) -> None:
    items = st.sets(st.integers(0, len(f.worth) - 1))
    small, more = data.draw(items), data.draw(items)
    large, i = small | more, data.draw(st.integers(0, len(f.worth) - 1))
    assert f(large) >= f(small) - 1e-12
    if i not in large:
        assert f(small | {i}) - f(small) >= f(large | {i}) - f(large) - 1e-9


def run_greedy(f: Covered, cost: np.ndarray, budget: float, *, lazy: bool) -> list[int]:
    order: list[int] = []

    def rate(i: int) -> float | None:
        chosen = set(order)
        if i in chosen or cost[order].sum() + cost[i] > budget:
            return None
        return (f(chosen | {i}) - f(chosen)) / cost[i]

    if lazy:
        lazy_greedy(len(cost), rate, order.append)
        return order
    while True:
        rates = [(-value, i) for i in range(len(cost)) if (value := rate(i)) is not None]
        if not rates:
            return order
        order.append(min(rates)[1])


@given(functions(), st.data())
def test_lazy_greedy_takes_what_plain_greedy_takes_and_its_bound_holds(f: Covered, data: st.DataObject) -> None:
    n = len(f.worth)
    cost = np.array(data.draw(st.lists(positive, min_size=n, max_size=n)))
    budget = data.draw(st.floats(float(cost.min()), float(cost.sum())))
    order = run_greedy(f, cost, budget, lazy=True)
    plain = run_greedy(f, cost, budget, lazy=False)
    assert f(set(order)) == pytest.approx(f(set(plain)))
    if len({round(r, 9) for r in f.worth / cost}) == n:  # equal rates may differ by rounding, and then in order
        assert order == plain
    sets = [set(c) for k in range(n + 1) for c in combinations(range(n), k) if cost[list(c)].sum() <= budget]
    best = max(map(f, sets))
    alone = max(f({i}) for i in range(n) if cost[i] <= budget)
    assert max(f(set(order)), alone) >= (1 - np.exp(-1)) / 2 * best  # Leskovec et al., 2007, theorem 2


def growth_of(coupling: fxprune.Coupling, constraints: Constraints, share: float) -> Growth:
    rng = np.random.default_rng(0)
    paths = paths_by_score(coupling, rng.random(coupling.num_channels))
    allocation = steps_of_all(coupling, paths, "uniform", constraints)
    total = np.bincount(allocation.group, allocation.errors, len(coupling.groups()))
    bounds = Budget(macs=share, params=share).bounds(coupling.costs(np.ones(coupling.num_channels, dtype=bool)))
    return Growth(allocation, allocation.errors, total, bounds)


def test_a_network_grown_lazily_is_the_one_grown_plainly_and_nothing_more_fits() -> None:
    coupling = coupled(Residual())
    for share in (0.3, 0.6):
        lazy, plain = (growth_of(coupling, Constraints(), share) for _ in range(2))
        keep = lazy.run()
        groups = range(len(np.unique(plain.allocation.group)))
        while rates := [(-rate, g) for g in groups if (rate := plain.rate(g)) is not None]:
            plain.take(min(rates)[1])
        assert np.array_equal(keep, plain.allocation.keep(plain.taken))
        assert all(lazy.rate(g) is None for g in groups)


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.5), Budget(macs=0.7, memory=0.8)])
@pytest.mark.parametrize("kind", [Chain, Residual, Multitask])
def test_catro_meets_budgets_and_constraints(kind: Any, budget: Budget) -> None:
    coupling = coupled(kind())
    constraints = Constraints(multiple_of=4, min_width=4)
    plan = fxprune.plan(coupling, budget, method=methods.CATRO(), calibration=BATCHES, constraints=constraints)
    for name, bound in budget.to_dict().items():
        assert plan.costs.share(name) <= bound
    assert all(g.after >= 4 for g in plan.groups)
    assert all(g.after % 4 == 0 or g.kind != "channels" for g in plan.groups)
    assert any(g.after < g.before for g in plan.groups)


def test_catro_keeps_what_the_trace_ratio_selects_at_its_widths() -> None:
    coupling = coupled(Chain())
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=methods.CATRO(), calibration=BATCHES)
    found = scatter(coupling, BATCHES)
    assert plan.keep is not None
    for group in coupling.groups():
        choices = group.choices
        kept = plan.keep[choices]
        assert 0 < kept.sum() < len(kept)
        assert np.array_equal(kept, trace_ratio_of(coupling, group, found).select(int(kept.sum())).kept)


def test_catro_keeps_the_channels_that_tell_classes_apart() -> None:
    """Half of the hidden units see the class, half see noise; the weights are alike."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (64,), generator=generator)
    x = torch.randn(64, 8, generator=generator)
    x[:, ::2] += 4.0 * labels[:, None]
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    coupling = fxprune.couple(fxprune.trace(model.eval(), x[:1]))
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=methods.CATRO(), calibration=[(x, labels)])
    assert plan.kept["0.weight", 0].tolist() == [0, 2, 4, 6]


def test_catro_says_what_it_lacks() -> None:
    coupling = coupled(Multitask())
    request: dict[str, Any] = {"budget": Budget(macs=0.5), "method": methods.CATRO()}
    with pytest.raises(PlanError, match=r"CATRO needs labelled batches: pass `calibration=\[\(inputs, labels\)"):
        fxprune.plan(coupling, **request)
    with pytest.raises(PlanError, match=r"a calibration batch is a Tensor without labels. Pass `\(inputs, targets\)`"):
        fxprune.plan(coupling, calibration=[X], **request)
    with pytest.raises(PlanError, match=r"no task of \['labels'\] has class labels. Pass `Task\(loss, target=...\)`"):
        fxprune.plan(coupling, calibration=[(X, {"a": LABELS, "b": LABELS})], **request)
    with pytest.raises(PlanError, match="the budget cannot be met"):
        fxprune.plan(coupling, Budget(macs=1e-6), method=methods.CATRO(), calibration=BATCHES)
    tasks = {"one": Task(lambda o, b: o, target="c")}
    with pytest.raises(PlanError, match=r"the targets are a dict of \['a'\], and Task\(target='c'\) names none"):
        fxprune.plan(coupling, calibration=[(X, {"a": LABELS})], tasks=tasks, **request)
