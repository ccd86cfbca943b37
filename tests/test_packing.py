"""Slim networks are pickled as graphs: whatever their code does, they come back as they were."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from test_applying import Net as Reversing
from test_switching import Net as Switching
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def between(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(self.a(x)))


class Writing(Net):
    def between(self, x: Tensor) -> Any:
        x[:, :, 0] = 0
        return F.max_pool2d(x[..., 1:], 2)


class Sized(Net):
    def between(self, x: Tensor) -> Any:
        ones = torch.ones(x.shape[0], 1, 1, 1, dtype=torch.float64)
        return (x + torch.zeros(x.shape[0], 1, x.shape[2], 1)).to(ones.dtype).float() + round(x.shape[3] / 3)


def slimmed(model: nn.Module, x: Tensor) -> Any:
    return fxprune.compile(model.eval(), x, Budget(macs=0.5), progress=False)


def through_torch(slim: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASES: list[tuple[type[nn.Module], Tensor]] = [
    (Net, torch.randn(2, 3, 8, 8)),
    (Writing, torch.randn(2, 3, 8, 8)),
    (Sized, torch.randn(2, 3, 8, 8)),
    (Switching, torch.randn(4, 6)),
    (Reversing, torch.randn(4, 6)),
]


@pytest.mark.parametrize("again", [lambda slim: pickle.loads(pickle.dumps(slim)), through_torch])
@pytest.mark.parametrize(("kind", "x"), CASES)
def test_slim_networks_come_back(kind: type[nn.Module], x: Tensor, again: Any) -> None:
    slim = slimmed(kind(), x)
    twin = again(again(slim))
    assert torch.equal(twin(x), slim(x))
    assert twin.code == slim.code
    assert str(fxprune.report(twin)) == str(fxprune.report(slim))
    assert [n.name for n in twin.graph.nodes] == [n.name for n in slim.graph.nodes]
    assert twin.state_dict().keys() == slim.state_dict().keys()
    for network in (slim, twin):
        network(x).sum().backward()
    for p, q in zip(slim.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad))


def test_exported_graphs_come_back() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    coupling = fxprune.couple(fxprune.exporting.exported(model, (x,), {}))
    slim = fxprune.rewrite(coupling, fxprune.plan(coupling, Budget(macs=0.5)))
    assert torch.equal(pickle.loads(pickle.dumps(slim))(x), slim(x))
