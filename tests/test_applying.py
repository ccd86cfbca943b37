"""Autograd functions of one's own: forward and backward are those of the dense network, and channels pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import fxprune
from fxprune import Budget


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class ReverseItself(Reverse):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Round(Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return (x * scale).round() / scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1), None


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return g @ weight * 0.5 + 2 * h, g.T @ x * 0.5, g.sum(0)


class Sized(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1, 4, 8).flip(1).flatten(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.view(-1, 4, 8).flip(1).flatten(1)


reverse = Reverse.apply  # as is usual


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def between(self, x: Tensor) -> Any:
        return reverse(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(F.relu(self.a(x))))


class Itself(Net):
    def between(self, x: Tensor) -> Any:
        return ReverseItself.apply(x)


class Rounding(Net):
    def between(self, x: Tensor) -> Any:
        return Round.apply(x, 8.0)


class OfWeights(Net):
    def between(self, x: Tensor) -> Any:
        y, z = Linear.apply(x, self.b.weight, self.b.bias)
        return F.relu(y) + z


class Sizes(Net):
    def between(self, x: Tensor) -> Any:
        return Sized.apply(x)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [Net, Itself, Rounding, OfWeights, Sizes])
def test_gradients_are_those_of_the_dense_network(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 6)
    whole = fxprune.compile(model, x, Budget(macs=1.0), progress=False)
    assert fxprune.report(whole).frontend == "symbolic_trace"
    wanted = gradients(model, x)
    for network in (whole, copy.deepcopy(whole)):
        found = gradients(network, x)
        assert found.keys() == wanted.keys()
        for name, g in wanted.items():
            torch.testing.assert_close(found[name], g)


@pytest.mark.parametrize("kind", [Net, Itself, Rounding, OfWeights])
def test_channels_pass(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 6)
    batches = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(2)]
    tasks = {"task": fxprune.Task(lambda y, b: F.mse_loss(y, b[1]))}
    slim = fxprune.compile(model, x, Budget(macs=0.5), calibration=batches, tasks=tasks, progress=False)
    assert slim.get_parameter("a.weight").shape[0] < 32
    assert gradients(slim, x).keys() == gradients(model, x).keys()


def test_sizes_inside_are_frozen_with_a_reason() -> None:
    slim = fxprune.compile(Sizes().eval(), torch.randn(4, 6), Budget(params=1.0), progress=False)
    assert slim.get_parameter("a.weight").shape[0] == 32
    with pytest.raises(fxprune.PlanError, match="node 'sized'"):
        fxprune.compile(Sizes().eval(), torch.randn(4, 6), Budget(params=0.5), progress=False)


class Through(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class GivenModule(Net):
    def between(self, x: Tensor) -> Any:
        return Through.apply(x, self.b)


def test_a_function_of_modules_is_walked_through_and_noted() -> None:
    slim = fxprune.compile(GivenModule().eval(), torch.randn(4, 6), Budget(macs=0.5), progress=False)
    assert slim.get_parameter("b.weight").shape[0] < 32
    (note,) = fxprune.report(slim).notes
    assert note.startswith("forward applies an autograd function to modules (test_applying.py:")
