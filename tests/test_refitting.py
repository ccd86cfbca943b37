"""Sequential compensation: each layer is fitted to the dense one's answers, from what the slim network feeds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rows import rows_of
from small import Multitask, settled
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, PlanError, methods
from fxprune.accumulating import Gram
from fxprune.compensating import compensate
from fxprune.fitting import Answers, best_fit
from fxprune.walking import Walk

BUDGET = Budget(macs=0.3)


class Deep(nn.Module):
    """Convolutions with batch norms, biases and neither, grouped, depthwise and used twice, in and between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.second = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.each = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.bare = nn.Conv2d(32, 16, 1, bias=False)
        self.twice = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        y = F.relu(self.second(self.wide(x)), inplace=True)
        x = x + self.bare(F.gelu(self.grouped(self.each(y))))
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


def images(count: int, seed: int, size: int = 16) -> list[Tensor]:
    """Return batches of smooth images: what is read at neighbouring positions goes together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return list(F.interpolate(coarse, size=(size, size), mode="bicubic").split(16))


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, list[Tensor], fxprune.Coupling, fxprune.Calibration]:
    torch.manual_seed(0)
    model, batches = Deep(), images(128, 0)
    model.train()
    for x in batches:
        model(x)
    model.eval()
    coupling = fxprune.couple(fxprune.trace(model, batches[0][:1]))
    return model, batches, coupling, fxprune.calibrate(coupling, batches)


def pruned(setting: Any, **settings: Any) -> tuple[Any, tuple[str, ...]]:
    _, _, coupling, known = setting
    plan = fxprune.plan(coupling, BUDGET, method=methods.Joint(), calibration=known)
    slim = fxprune.rewrite(coupling, plan)
    return slim, compensate(coupling, plan, slim, known, **settings)


def far(slim: nn.Module, model: nn.Module) -> float:
    """Return the squared error of a network's outputs on images that it was not fitted to, relative to their spread."""
    with torch.no_grad():
        x = torch.cat(images(256, 1))
        wanted = model(x)
        return float((slim(x) - wanted).square().mean() / wanted.var(0).mean())


def test_a_network_is_nearer_to_the_dense_one(setting: Any) -> None:
    at_once, names = pruned(setting)
    in_turn, more = pruned(setting, sequential=True)
    assert set(names) <= set(more)
    assert far(in_turn, setting[0]) < 0.8 * far(at_once, setting[0])


def test_what_it_cannot_fit_stays(setting: Any) -> None:
    at_once, _ = pruned(setting)
    in_turn, names = pruned(setting, sequential=True)
    for layer in ("each", "twice"):
        for of in ("weight", "bias"):
            assert torch.equal(in_turn.get_parameter(f"{layer}.{of}"), at_once.get_parameter(f"{layer}.{of}"))
    fitted = {f"{layer}.weight" for layer in ("wide", "grouped", "bare", "head")}
    assert fitted <= {
        name for name in names if not torch.equal(in_turn.get_parameter(name), at_once.get_parameter(name))
    }


def test_the_same_data_give_the_same_weights_and_the_dense_network_stays_as_it_is(setting: Any) -> None:
    model = setting[0]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (pruned(setting, sequential=True)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    model.eval()


def test_a_layer_is_the_least_squares_fit_to_the_dense_one_from_what_the_slim_one_reads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    batches = [torch.randn(64, 6, dtype=torch.float64) for _ in range(8)]
    coupling = fxprune.couple(fxprune.trace(model, batches[0]))
    known = fxprune.calibrate(coupling, batches)
    plan = fxprune.plan(coupling, Budget(macs=0.4), method=methods.Joint(), calibration=known)
    slim = fxprune.rewrite(coupling, plan)
    compensate(coupling, plan, slim, known, damping=1e-12, sequential=True)
    x, _ = rows_of(slim, "4", batches)
    _, y = rows_of(model, "4", batches)
    rows = np.hstack([x.flatten(1).numpy(), np.ones((len(x), 1))])
    wanted = np.linalg.lstsq(rows, y.flatten(1).numpy(), rcond=None)[0]
    head: Any = slim.get_submodule("4")
    found = np.vstack([head.weight.detach().numpy().T, head.bias.detach().numpy()])
    np.testing.assert_allclose(found, wanted, atol=1e-7)


def sums(rows: np.ndarray) -> Gram:
    gram = Gram()
    gram.add(torch.from_numpy(rows)[None])
    return gram


@pytest.mark.parametrize("centred", [False, True])
def test_a_fit_is_ridge_regression_around_the_weight(centred: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight, damping = rng.normal(1, 2, (50, 6)), rng.normal(size=(6, 3)), 0.3
    y = x @ rng.normal(size=(6, 3)) + 5
    grams = [sums(np.hstack([x[i : i + 25], y[i : i + 25]])) for i in (0, 25)]
    answers = Answers.of(grams, 6, centred=centred)
    found = answers.fitted(torch.from_numpy(weight)[None], damping)[0].numpy()
    a, b = (x - x.mean(0), y - y.mean(0)) if centred else (x, y)
    level = damping * np.square(a).sum(0).mean()
    wider = np.vstack([a, np.sqrt(level) * np.eye(6)])
    wanted = weight + np.linalg.lstsq(wider, np.vstack([b - a @ weight, np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    errors = [answers.error(torch.from_numpy(w)[None]) for w in (weight, wanted)]
    direct = [np.square(b - a @ w).sum() / len(a) for w in (weight, wanted)]
    np.testing.assert_allclose(errors[0] - errors[1], direct[0] - direct[1])


def test_few_data_draw_a_fit_to_the_weight() -> None:
    rng = np.random.default_rng(0)
    right = rng.normal(size=(20, 3))
    off = torch.from_numpy(right)[None] + 0.01

    def answers(count: int) -> Answers:
        x = rng.normal(size=(count, 20))
        return Answers.of([sums(np.hstack([x, x @ right + rng.normal(size=(count, 3))]))], 20, centred=False)

    def miss(weight: Tensor) -> float:
        return float((weight - torch.from_numpy(right)).abs().max())

    others, few, many = answers(2_000), answers(21), answers(5_000)
    assert miss(best_fit(off, few, others, few, 0.01)) < miss(few.fitted(off, 0.01)) / 3
    fits = [many.fitted(2 * off, damping) for damping in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert torch.equal(best_fit(2 * off, many, others, many, 1e-4), min(fits, key=others.error))


def test_a_calibration_without_batches_is_told(setting: Any) -> None:
    _, _, coupling, known = setting
    plan = fxprune.plan(coupling, BUDGET, method=methods.Joint(), calibration=known)
    slim = fxprune.rewrite(coupling, plan)
    with pytest.raises(PlanError, match="sequential=True reads batches, and this calibration has none"):
        compensate(coupling, plan, slim, replace(known, batches=None), sequential=True)
    with pytest.raises(PlanError, match="weights are corrected or not"):
        methods.Joint(sequential=True, compensate=False)


def test_compile_refits_several_heads() -> None:
    torch.manual_seed(0)
    model, batches = settled(Multitask(12)), images(96, 0, 8)
    wanted = model(batches[0])
    found = []
    for method in (methods.Joint(), methods.Joint(sequential=True)):
        slim = fxprune.compile(model, batches[0][:1], BUDGET, method=method, calibration=batches, progress=False)
        with torch.no_grad():
            found.append(sum(float((slim(batches[0])[name] - wanted[name]).square().mean()) for name in wanted))
    assert found[1] < found[0]


class Greedy(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(0.5))


def test_what_a_network_writes_to_its_input_is_not_read_by_the_other() -> None:
    torch.manual_seed(0)
    model, x = Greedy().eval(), torch.randn(64, 6)
    coupling = fxprune.couple(fxprune.trace(model, x.clone()))
    known = fxprune.calibrate(coupling, [x.clone()])
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=methods.Joint(samples=0), calibration=known)
    slim = fxprune.rewrite(coupling, plan)
    compensate(coupling, plan, slim, replace(known, batches=[given := x.clone()]), sequential=True)
    assert torch.equal(given, x / 2)  # by the one run for the statistics of batch norms
    with torch.no_grad():
        errors = [
            (slim(x.clone()) - model(x.clone())).square().mean() for slim in (slim, fxprune.rewrite(coupling, plan))
        ]
    assert errors[0] < 0.5 * errors[1]


class Tied(nn.Module):
    """Looks words up in the weight that its head answers with."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.words(x)).relu())


def test_a_weight_that_something_else_reads_too_is_not_refitted() -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.arange(20).reshape(5, 4)
    coupling = fxprune.couple(fxprune.trace(model, x))
    known = fxprune.calibrate(coupling, [x])
    plan = fxprune.plan(coupling, Budget(macs=0.7), method=methods.Joint(samples=0), calibration=known)
    found = []
    for sequential in (False, True):
        slim = fxprune.rewrite(coupling, plan)
        compensate(coupling, plan, slim, known, sequential=sequential)
        found.append(slim.state_dict()["words.weight"])
    assert torch.equal(*found)


def test_a_walk_sees_what_runs_and_lets_go_of_what_is_not_needed_any_more() -> None:
    model, batches = Deep().eval(), images(32, 0)
    traced = fxprune.trace(model, batches[0])
    with torch.no_grad():
        walk = Walk(traced.root, traced.graph, [[x] for x in batches])
        names = []
        for n in walk.nodes():
            names += [s.name for s in walk.run(n)[0]]
            assert all(len(env) <= 4 for env in walk.values)
    assert names == [
        "stem.weight", "first.running_mean", "wide.weight", "second.running_mean", "each.weight", "each.bias",
        "grouped.weight", "bare.weight", "twice.weight", "twice.weight", "head.weight",
    ]  # fmt: skip
