"""While a network is traced, only its own modules are watched."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune

X = torch.randn(2, 3, 8, 8)


class Watcher(nn.Module):
    """Notes what its modules and torch.nn.Module are while forward runs."""

    seen: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(8, 1, 1))
        self.unregistered = [nn.Conv2d(3, 8, 3), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        Watcher.seen = [type(self.conv), nn.Module.__call__, nn.Module.__getattr__]
        return self.unregistered[1](self.conv(x)) * self.scale.sigmoid()


def test_classes_are_as_before_and_torch_is_not_touched() -> None:
    before = nn.Module.__call__, nn.Module.__getattr__
    model = Watcher().eval()
    traced = fxprune.trace(model, X)
    assert traced.frontend == "symbolic_trace"
    assert Watcher.seen[0] is not nn.Conv2d
    assert (Watcher.seen[1], Watcher.seen[2]) == before == (nn.Module.__call__, nn.Module.__getattr__)
    assert {type(m) for m in traced.root.modules()} == {Watcher, nn.Conv2d} == {type(m) for m in model.modules()}
    assert torch.equal(traced.module(X), model(X))


class Raises(Watcher):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("no")


def test_classes_are_as_before_when_forward_raises() -> None:
    model, before = Raises(), nn.Module.__call__
    with pytest.raises(fxprune.TraceError, match="ValueError: no"):
        fxprune.trace(model, X)
    assert type(model.conv) is nn.Conv2d
    assert nn.Module.__call__ is before


class Registered(nn.Module):
    """Of a class that notes who derives from it."""

    kinds: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Registered.kinds.append(cls.__name__)


class Block(Registered):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Meta(type):
    pass


class WithMeta(Block, metaclass=Meta):
    pass


class Called(nn.Conv2d):
    """Is called in a way of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x + 1)


class CallsItsOwnWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Called(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("kind", [Block, WithMeta, CallsItsOwnWay])
def test_classes_with_ways_of_their_own_are_not_derived_from(kind: type[nn.Module]) -> None:
    model = kind().eval()
    known = list(Registered.kinds)
    traced = fxprune.trace(model, X)
    assert traced.frontend == "symbolic_trace"
    assert torch.equal(traced.module(X), model(X))
    assert Registered.kinds == known
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"]
