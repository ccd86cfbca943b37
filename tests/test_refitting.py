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
from fxprune.pairing import Addition, Place, addition_of, survey
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
    for of in ("weight", "bias"):
        assert torch.equal(in_turn.get_parameter(f"twice.{of}"), at_once.get_parameter(f"twice.{of}"))
    fitted = {f"{layer}.weight" for layer in ("wide", "each", "grouped", "bare", "head")}
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
    with pytest.raises(PlanError, match=r"sequential=True reads batches: pass `calibration="):
        fxprune.compile(setting[0], images(1, 0)[0], BUDGET, method=methods.Joint(sequential=True), progress=False)
    with pytest.raises(PlanError, match="weights are corrected or not"):
        methods.Joint(sequential=True, compensate=False)


def test_compile_refits_several_heads() -> None:
    torch.manual_seed(0)
    model, batches, others = settled(Multitask(12)), images(96, 0, 8), torch.cat(images(256, 5, 8))
    wanted = model(others)
    found = []
    for method in (methods.Joint(), methods.Joint(sequential=True)):
        slim = fxprune.compile(model, batches[0][:1], BUDGET, method=method, calibration=batches, progress=False)
        with torch.no_grad():
            found.append(sum(float((slim(others)[name] - wanted[name]).square().mean()) for name in wanted))
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
        "stem.weight", "first.running_mean", "wide.weight", "second.running_mean", "each.weight",
        "grouped.weight", "bare.weight", "twice.weight", "twice.weight", "head.weight",
    ]  # fmt: skip


class Block(nn.Module):
    """Adds a correction to its input, with a batch norm or dropout in between."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 24)
        self.narrow = nn.Linear(24, 12, bias=not normed)
        self.last = nn.BatchNorm1d(12, eps=1e-12) if normed else nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.narrow(self.wide(x).relu()))


def blocks(*, normed: bool) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    parts = nn.Linear(6, 12), Block(normed=normed), Block(normed=normed), nn.Linear(12, 3)
    model, batches = nn.Sequential(*parts).double(), [torch.randn(64, 6, dtype=torch.float64) for _ in range(8)]
    for batch in batches * 20:
        model(batch)
    for block in parts[1:3]:
        if normed:
            nn.init.uniform_(block.last.weight, 0.5, 2)
            nn.init.normal_(block.last.bias)
    return model.eval(), batches


@pytest.mark.parametrize("normed", [False, True])
def test_what_ends_a_branch_makes_up_for_what_its_shortcut_misses(normed: bool) -> None:
    model, batches = blocks(normed=normed)
    coupling = fxprune.couple(fxprune.trace(model, batches[0]))
    known = fxprune.calibrate(coupling, batches)
    plan = fxprune.plan(coupling, Budget(macs=0.4), method=methods.Joint(), calibration=known)
    slim = fxprune.rewrite(coupling, plan)
    compensate(coupling, plan, slim, known, damping=1e-12, sequential=True)
    kept = plan.cut("0.bias", torch.arange(12))
    assert 2 < len(kept) < 12

    def rows(network: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        x, y = rows_of(network, name, batches)
        return x.flatten(1).detach(), y.flatten(1).detach()

    shortcut, cut = rows(model, "2.wide")[0][:, kept], rows(slim, "2.wide")[0]
    missing = shortcut - cut
    assert missing.std() > 0.05 * shortcut.std()
    last: Any = model.get_submodule("2.last")
    gain = last.weight[kept] / (last.running_var[kept] + last.eps).sqrt() if normed else torch.ones(len(kept))
    wanted = rows(model, "2.narrow")[1][:, kept] + missing / gain
    x, answers = rows(slim, "2.narrow")
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    fit = inputs @ torch.linalg.lstsq(inputs, wanted).solution
    if normed:  # the batch norm takes up constants, and what it returns is spread as in the dense network
        fit = fit + answers.mean(0) - fit.mean(0)
        target = (wanted - last.running_mean[kept]) * gain + last.bias[kept]
        found = slim.get_submodule("2.last")(answers)
        assert torch.allclose(found.mean(0), target.mean(0), atol=1e-4)
        assert torch.allclose(found.var(0), last(rows(model, "2.narrow")[1])[:, kept].var(0), rtol=1e-4)
    assert torch.allclose(answers, fit, atol=1e-6)


class Ways(nn.Module):
    """Layers whose outputs are added to something, and layers whose outputs are not, or not only, or too early."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain, self.dropped, self.early = (nn.Linear(6, 6) for _ in range(4))
        self.late, self.heard, self.bent, self.turned = (nn.Linear(6, 6) for _ in range(4))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.plain(x)
        x = self.drop(self.dropped(x)) + x
        x = self.early(x) + self.late(x)
        heard = self.heard(x)
        x = x + heard * heard.mean()
        x = x + self.bent(x).relu()
        return x + self.turned(x).transpose(0, 1)


def test_what_a_layer_is_added_to_is_found_where_it_is_known_by_then() -> None:
    x = torch.randn(6, 6)
    traced = fxprune.trace(Ways().eval(), x)
    with torch.no_grad():
        seen = survey(traced.root, traced.graph, [x])
    found = {place.name.removesuffix(".weight"): addition_of(n, seen) for n, place in seen.places.items()}
    others = {name: str(addition.other) for name, addition in found.items() if addition is not None}
    assert others == {"plain": "stem", "dropped": "add", "late": "early"}


def test_channels_that_a_batch_norm_all_but_drops_are_not_asked_to_make_up_for_others() -> None:
    scale = torch.tensor([2.0, 1e-9, 0.0, -0.5])
    other: Any = None
    addition = Addition("add", other, Place("mean", None, 0.0, scale))
    owed = addition.owed(torch.ones(3, 2, 5), 1, torch.full((4,), 4.0), torch.tensor([0, 2]))
    assert torch.equal(owed, torch.tensor([1.0, 0.0])[:, None].expand(3, 2, 5))
    owed = addition.owed(torch.ones(3, 3), 1, torch.full((4,), 4.0), torch.tensor([3, 1, 0]))
    assert torch.equal(owed, torch.tensor([-4.0, 0.0, 1.0]).expand(3, 3))
