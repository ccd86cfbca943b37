"""Sequential compensation on networks that are put together in unusual ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, Constraints, PlanError, methods
from fxprune.accumulating import Gram, Spread
from fxprune.compensating import compensate
from fxprune.fitting import Answers, best_fit
from fxprune.norms import Norm
from fxprune.pairing import survey


def rows(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).split(32))


def errors(model: nn.Module, batches: list[Tensor], example: Tensor, budget: float = 0.5, **limits: Any) -> list[float]:
    """Return the squared errors on other data, relative to their spread: corrected at once, and in turn."""
    model = model.eval()
    coupling = fxprune.couple(fxprune.trace(model, example))
    known = fxprune.calibrate(coupling, batches)
    plan = fxprune.plan(coupling, Budget(macs=budget), constraints=Constraints(**limits), calibration=known)
    others, found = torch.cat(rows(512, *batches[0].shape[1:], seed=1)), []
    with torch.no_grad():
        wanted = model(others)
    for sequential in (False, True):
        slim = fxprune.rewrite(coupling, plan)
        compensate(coupling, plan, slim, known, sequential=sequential)
        with torch.no_grad():
            found.append(float((slim(others) - wanted).square().mean() / wanted.var(0).mean()))
    return found


class Odd(nn.Module):
    """A network of some rows, whose forward is given."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 4)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.extra = nn.Parameter(torch.randn(24))
        self.query = nn.Parameter(torch.randn(1, 6, 24))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._forward(self, self.stem(x)))


def computed_bias(net: Any, x: Tensor) -> Tensor:
    return F.linear(x.relu(), net.a.weight, 3 * net.extra).relu()


def unbatched(net: Any, x: Tensor) -> Tensor:
    return x + net.a(net.query) + net.b(x.relu()).relu()


def norm_of_tokens(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.a(x.relu())).relu()


def tied_bias(net: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x.relu(), net.a.weight, net.extra).relu(), net.b.weight, net.extra).relu()


def read_in_a_list(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.a(x.relu()).relu(), torch.stack([net.a.weight, net.b.weight]).sum(0))


LAYERS = {"a": 24, "b": 24}


@pytest.mark.parametrize(
    ("forward", "shape"),
    [(computed_bias, (8,)), (unbatched, (6, 8)), (norm_of_tokens, (24, 8)), (tied_bias, (8,)), (read_in_a_list, (8,))],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_no_network_is_worse_for_it(forward: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: nn.Linear(width, width) for name, width in LAYERS.items()}
    model, batches = Odd(forward, norm=nn.BatchNorm1d(24), **layers), rows(512, *shape)
    for batch in batches:
        model(batch)
    at_once, in_turn = errors(model, batches, batches[0][:1])
    assert in_turn < 1.1 * at_once
    assert in_turn < 0.5


def test_a_branch_that_has_gone_leaves_no_addition_to_make_up_for() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
            self.up, self.wide = nn.Linear(16, 16, bias=False), nn.Linear(16, 32, bias=False)
            self.down, self.narrow = nn.Linear(16, 16, bias=False), nn.Linear(32, 16, bias=False)
            nn.init.normal_(self.down.weight, std=1e-4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head((self.down(self.up(x).relu()) + self.narrow(self.wide(x).relu())) + x)

    torch.manual_seed(0)
    model, batches = Parallel(), rows(512, 8)
    at_once, in_turn = errors(model, batches, batches[0][:1], 0.71, min_width=0, keep_outputs=["stem", "wide"])
    assert in_turn < 1.1 * at_once
    coupling = fxprune.couple(fxprune.trace(model.eval(), batches[0][:1]))
    plan = fxprune.plan(
        coupling, Budget(macs=0.71), constraints=Constraints(min_width=0, keep_outputs=["stem", "wide"]),
        calibration=fxprune.calibrate(coupling, batches),
    )  # fmt: skip
    assert "down" not in dict(fxprune.rewrite(coupling, plan).named_modules())


def test_too_few_samples_are_told() -> None:
    model, (batch,) = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), rows(3, 8)
    with pytest.raises(PlanError, match=r"sequential=True has 3 sample\(s\) to read: fits are checked on every 4th"):
        fxprune.compile(model, batch, Budget(macs=0.5), method=methods.Joint(sequential=True), calibration=[batch])
    fxprune.compile(
        model, batch, Budget(macs=0.5), method=methods.Joint(sequential=True), calibration=rows(4, 8), progress=False
    )


@pytest.mark.parametrize("value", [1.7, 0.0])
def test_a_constant_tells_nothing(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grams = (Gram(), Gram())
    for gram in grams:
        x = value * (1 + 1e-7 * torch.randn(2, 64, 1, generator=generator).double())  # as rounding leaves it
        gram.add(torch.cat([x, torch.randn(2, 64, 1, generator=generator).double()], 2))
    most, others, every = (Answers.of(some, 1, centred=True) for some in (grams[:1], grams[1:], grams))
    weight = torch.full((2, 1, 1), 0.1, dtype=torch.float64)
    assert (best_fit(weight, most, others, every, 0.01) - weight).abs().max() < 0.1


@pytest.mark.parametrize("var", [1.0, 1e-3, 1e-7])
def test_statistics_written_for_the_same_data_do_the_same(var: float) -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(5, eps=1e-3).eval(), 0.3 + var**0.5 * torch.randn(500, 5)
    norm.running_mean.copy_(torch.full((5,), 0.3 + 0.5 * var**0.5))  # pyright: ignore[reportOptionalMemberAccess]
    norm.running_var.fill_(2 * var)  # pyright: ignore[reportOptionalMemberAccess]
    wanted, seen = norm(x).detach(), Spread()
    seen.add(x)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    Norm.of(seen.mean, seen.var, mean, variance, norm.eps).write(mean, variance, seen, norm.eps)
    assert torch.allclose(norm(x), wanted, atol=1e-3 * float(wanted.std()))


class Untraceable(nn.Module):
    """Convolutions, a batch norm and linear layers, behind what only torch.export can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding="same", bias=False), nn.BatchNorm2d(16, eps=1e-3)
        self.second, self.third = nn.Conv2d(16, 16, 3, groups=2), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            raise TypeError("not by symbols")
        x = self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3))
        return self.head(self.third(x).relu())


class Traceable(Untraceable):
    """The same, and anything can trace it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3))
        return self.head(self.third(x).relu())


def moments(model: nn.Module, batches: Iterable[Tensor]) -> tuple[fxprune.Coupling, fxprune.Calibration]:
    coupling = fxprune.couple(fxprune.trace(model, next(iter(batches))[:2]))
    task = {"sum": fxprune.Task(lambda outputs, batch: outputs.square().mean())}
    return coupling, fxprune.calibrate(coupling, batches, task)


def test_an_exported_graph_is_calibrated_as_one_that_was_traced_by_symbols() -> None:
    torch.manual_seed(0)
    model, other, batches = Untraceable(), Traceable(), rows(128, 3, 8, 8)
    for batch in batches:
        model(batch)
    other.load_state_dict(model.state_dict())
    found, wanted = moments(model.eval(), batches), moments(other.eval(), batches)
    assert [coupling.traced.frontend for coupling, _ in (found, wanted)] == ["export", "symbolic_trace"]
    assert found[1].moments.keys() == wanted[1].moments.keys()
    assert len(found[1].moments) == 4
    for name, m in found[1].moments.items():
        assert torch.allclose(m.second, wanted[1].moments[name].second, rtol=1e-4, atol=1e-6)
        assert torch.allclose(m.sensitivity["sum"], wanted[1].moments[name].sensitivity["sum"], rtol=1e-3, atol=1e-8)
        assert m.norm == wanted[1].moments[name].norm
    assert found[1].norms.keys() == wanted[1].norms.keys() == {"norm.running_mean"}
    slims = []
    for coupling, known in (found, wanted):
        plan = fxprune.plan(coupling, Budget(macs=0.4), calibration=known)
        slims.append(fxprune.rewrite(coupling, plan))
        compensate(coupling, plan, slims[-1], known, sequential=True)
    with torch.no_grad():
        assert torch.allclose(*(slim(batches[0]) for slim in slims), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_batch_norm_behind_an_activation_takes_up_no_constants(inplace: bool) -> None:
    parts = nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(inplace), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False)
    model = nn.Sequential(*parts, nn.BatchNorm2d(8), nn.ReLU(inplace), nn.Flatten(), nn.Linear(128, 2)).eval()
    batches = rows(64, 3, 8, 8)
    coupling = fxprune.couple(fxprune.trace(model, batches[0][:1]))
    known = fxprune.calibrate(coupling, batches)
    assert {name: m.norm for name, m in known.moments.items()} == {
        "0.weight": None, "3.weight": "4.running_mean", "7.weight": None,
    }  # fmt: skip
    with torch.no_grad():
        seen = survey(coupling.traced.root, coupling.traced.graph, [batches[0][:2]])
    behind = {place.name: seen.norm_behind(n) for n, place in seen.places.items()}
    assert {name: n.name for name, n in behind.items() if n is not None} == {"3.weight": "_4"}


def test_where_dims_are_one_no_more_rows_are_read_and_samples_stay_samples() -> None:
    from fxprune.gathering import some_places
    from fxprune.refitting import _samples, _some

    out = torch.zeros(8 * 50, 3)
    places = _some(some_places(out, 4, "", is_conv=False), 32, 0)
    assert len(places[0]) == 32
    samples = _samples(places, out, 8, is_conv=False)
    assert torch.equal(samples, places[0] // 50)
    first = torch.zeros(50, 8, 3)  # positions, samples, channels
    places = _some(some_places(first, 4, "", is_conv=False), 32, 0)
    assert torch.equal(_samples(places, first, 8, is_conv=False), places[1])
    plain = torch.zeros(8, 3, 5, 5)
    places = some_places(plain, 4, "", is_conv=True)
    assert _some(places, 32, 0) is places
    assert torch.equal(_samples(places, plain, 8, is_conv=True), places[0])
