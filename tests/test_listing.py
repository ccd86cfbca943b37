"""Parameters and buffers that forward lists: in the graph as what they are, not as what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def more(self, x: Tensor) -> Any:
        return x.new_zeros(())

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.norm(self.a(x)))), self.more(x)


class Penalty(Net):
    def more(self, x: Tensor) -> Any:
        return sum(p.pow(2).sum() for p in self.parameters())


class OfWeights(Net):
    def more(self, x: Tensor) -> Any:
        found = [p for name, p in self.a.named_parameters() if name.endswith("weight") and p.requires_grad]
        return torch.stack([p.abs().sum() for p in found]).sum()


class OfBuffers(Net):
    def more(self, x: Tensor) -> Any:
        return sum((b.float().sum() for b in self.buffers()), next(self.parameters()).sum())


class Passed(Net):
    def more(self, x: Tensor) -> Any:
        mean = dict(self.named_buffers())["norm.running_mean"]
        return F.linear(x, self.a.weight, mean).sum()


class Counted(Net):
    def more(self, x: Tensor) -> Any:
        return x.sum() / sum(p.numel() for p in self.head.parameters() if p.dim() == 1)


class Typed(Net):
    def more(self, x: Tensor) -> Any:
        p = next(self.parameters())
        low = torch.finfo(p.dtype).min if p.is_floating_point() else 0
        return x.to(p.device, p.dtype).sum().clamp(min=low)


KINDS = [Penalty, OfWeights, OfBuffers, Passed, Counted, Typed]


def settled(kind: type[Net]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = kind().double()
    nn.init.uniform_(model.norm.running_mean)
    return model.eval(), torch.randn(4, 6).double()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_pruned_as_they_are(kind: type[Net]) -> None:
    model, x = settled(kind)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert report.costs.after.macs <= report.costs.before.macs / 2


@pytest.mark.parametrize("kind", KINDS)
def test_they_follow_what_the_parameters_are(kind: type[Net]) -> None:
    model, x = settled(kind)
    slim = fxprune.compile(model, x, Budget(macs=1.0), progress=False)
    for network in (model, slim):
        with torch.no_grad():
            for t in [*network.parameters(), *network.buffers()]:
                t.mul_(2)
    found, wanted = slim(x)[1], model(x)[1]
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad == wanted.requires_grad
    assert not any("constant" in n.name for n in slim.graph.nodes)


class Called(Net):
    def more(self, x: Tensor) -> Any:
        doubled = {name: p * 2 for name, p in self.a.named_parameters()}
        return torch.func.functional_call(self.a, doubled, (x,)).sum()


def test_a_functional_call_follows_them_too() -> None:
    model, x = settled(Called)
    slim = fxprune.compile(model, x, Budget(macs=1.0), progress=False)
    for network in (model, slim):
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(2)
    torch.testing.assert_close(slim(x)[1], model(x)[1])
