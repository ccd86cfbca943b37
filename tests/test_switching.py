"""Regions that run without gradients: kept in the graph, and no obstacle to what plans ask for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, methods


class Net(nn.Module):
    """A backbone and a head; the backbone does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.features(x)
        return self.head(h)


class Decorated(Net):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return super().features(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Asked(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            h = self.features(x)
        return self.head(h)


class Inferring(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            h = self.features(x)
        return self.head(h.clone())


class Enabling(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = F.relu(self.a(x))
            with torch.enable_grad():
                h = F.relu(self.b(h))
            h = h + torch.ones_like(h)
        return self.head(h)


class Leaving(Net):
    def forward(self, x: Tensor) -> Any:
        torch.set_grad_enabled(False)
        h = self.features(x)
        torch.set_grad_enabled(True)
        return self.head(h)


class Averaging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.head(h - self.mean)


KINDS = [Net, Decorated, Asked, Inferring, Enabling, Leaving, Averaging]


def trained(model: nn.Module, x: Tensor) -> set[str]:
    """Return the parameters that get a gradient."""
    model.zero_grad()
    model(x).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def compiled(kind: type[Net], **kwargs: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 6)
    return model, fxprune.compile(model, x, Budget(macs=0.5), progress=False, **kwargs), x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_what_trained(kind: type[Net], training: bool) -> None:
    model, slim, x = compiled(kind)
    assert fxprune.report(slim).frontend == "symbolic_trace"
    assert not fxprune.report(slim).notes
    for network in (slim, copy.deepcopy(slim)):
        wanted = trained(model.train(training), x)
        assert trained(network.train(training), x) == wanted
        assert trained(network, x) == wanted  # and a second time


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_is_left_as_it_was(kind: type[Net]) -> None:
    _, slim, x = compiled(kind)
    assert torch.is_grad_enabled()
    if kind is not Leaving:
        with torch.no_grad():
            slim(x)
            assert not torch.is_grad_enabled()
    slim(x)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("wanted", [False, True])
def test_the_mode_is_put_back_where_the_network_raises(wanted: bool) -> None:
    _, slim, x = compiled(Net)
    again = fxprune.compile(slim, x, Budget(macs=0.5), progress=False)
    for network in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim)), again):
        with torch.set_grad_enabled(wanted):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                network(torch.zeros(4, 7))
            assert torch.is_grad_enabled() == wanted


@pytest.mark.parametrize("method", [methods.Joint(), methods.Joint(sequential=True), methods.Taylor()])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Leaving])
def test_what_does_not_train_is_worth_what_it_does(kind: type[Net], method: Any) -> None:
    """The scores of layers that get no gradient are those of a network that trains whole."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(2)]
    tasks = {"task": fxprune.Task(lambda y, b: F.mse_loss(y, b[1]))}
    model = kind().eval()
    coupling = fxprune.couple(fxprune.trace(model, batches[0][0]))
    plan = fxprune.plan(coupling, Budget(macs=0.5), method=method, calibration=batches, tasks=tasks)
    assert all(t.is_leaf for t in [*model.parameters(), *model.buffers()])
    if kind in (Net, Decorated, Asked, Inferring):

        class Whole(Net):
            def forward(self, x: Tensor) -> Any:
                return self.head(self.features(x))

        whole = Whole().eval()
        whole.load_state_dict(model.state_dict())
        other = fxprune.couple(fxprune.trace(whole, batches[0][0]))
        expected = fxprune.plan(other, Budget(macs=0.5), method=method, calibration=batches, tasks=tasks)
        assert {k: v.tolist() for k, v in plan.kept.items()} == {k: v.tolist() for k, v in expected.kept.items()}


@pytest.mark.parametrize("kind", [Net, Enabling])
def test_other_tools_take_it(kind: type[Net]) -> None:
    model, slim, x = compiled(kind)
    wanted = trained(model, x)
    assert wanted == {"head.weight", "head.bias"}
    assert trained(torch.compile(slim, backend="aot_eager"), x) == {f"_orig_mod.{name}" for name in wanted}
    torch.testing.assert_close(torch.export.export(slim, (x,)).module()(x), slim(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(slim))(x), slim(x))
    slim.graph.eliminate_dead_code()
    slim.recompile()
    assert trained(slim, x) == wanted


class Heads(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = F.relu(self.a(x))
        return {"a": self.head(h), "b": self.b(h)}


def test_the_network_of_some_tasks_keeps_the_region() -> None:
    _, slim, x = compiled(Heads)
    part = fxprune.select_tasks(slim, ["b"])
    part(x)["b"].sum().backward()
    assert {name for name, p in part.named_parameters() if p.grad is not None} == {"b.weight", "b.bias"}
    assert torch.is_grad_enabled()


class Branching(Net):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        with torch.no_grad():
            g = self.b(F.relu(h)) + h
        return self.head(g)


def test_a_branch_without_gradients_can_go() -> None:
    model, x = Branching().eval(), torch.randn(4, 6)
    nn.init.normal_(model.b.weight, std=1e-6)
    constraints = fxprune.Constraints(min_width=0)
    slim = fxprune.compile(model, x, Budget(params=0.3), constraints=constraints, progress=False)
    assert trained(slim, x) == trained(model, x)


def test_networks_with_such_regions_merge() -> None:
    x = torch.randn(4, 6)
    models = {name: Net().eval() for name in ("one", "two")}
    merged = fxprune.merge(models, method=methods.Separate(), example_inputs=x)
    assert all(".head." in name for name in trained_of_dict(merged, x))
    assert torch.is_grad_enabled()


def trained_of_dict(model: nn.Module, x: Tensor) -> set[str]:
    sum(t.sum() for t in model(x).values()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [Net, Averaging])
def test_calibration_of_exported_graphs(kind: type[Net]) -> None:
    """There a region is a graph of its own."""
    model, batches = kind().eval(), [torch.randn(4, 6) for _ in range(2)]
    coupling = fxprune.couple(fxprune.exporting.exported(model, (batches[0],), {}))
    calibration = fxprune.calibrate(coupling, batches)
    assert all(float(g.square().sum()) > 0 for m in calibration.moments.values() for g in m.sensitivity.values())


class Cast(Net):
    @torch.autocast("cpu", enabled=False)
    def features(self, x: Tensor) -> Tensor:
        return super().features(x)


def test_autocast_as_a_decorator_is_noted_too() -> None:
    _, slim, _ = compiled(Cast)
    assert any(
        note.startswith("forward sets torch.autocast (test_switching.py:") for note in fxprune.report(slim).notes
    )
