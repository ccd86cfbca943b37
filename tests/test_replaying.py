"""A network that is run from the first changed node on returns what a whole run with the changed weights does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fxprune
from fxprune.exporting import exported
from fxprune.replaying import Replay, Replayer


class InPlace(nn.Module):
    """Functions that write to what they are given, also through views; tied weights; a weight that forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.last = nn.Conv2d(4, 4, 1), nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.last.weight
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        a, b = x[:, :4], x[:, 4:]
        b += self.side(a)
        a.mul_(2)
        x = (x * self.scale).mean((2, 3))
        return {"low": self.last(x), "high": self.again(x)}


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return InPlace().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)


def changed(module: nn.Module, *names: str) -> dict[str, Tensor]:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensors[name].detach() * 1.5 + 0.1 for name in names}


CHANGES = [
    ("first.weight",),
    ("norm.running_mean", "side.bias"),
    ("side.weight", "last.weight"),
    ("scale",),
    ("last.weight",),
    ("last.bias",),
]


@pytest.mark.parametrize("front", [fxprune.trace, lambda model, x: exported(model, (x,), {})])
@pytest.mark.parametrize("order", [1, -1])
def test_runs_are_those_of_the_whole_network(front: Any, order: int) -> None:
    model, x = build()
    module = front(model, x).module
    before, given = {k: v.clone() for k, v in module.state_dict().items()}, x.clone()
    replay = Replay(Replayer(module), x)
    for names in [*CHANGES[::order], (), *CHANGES[::-order]]:
        values = changed(module, *names)
        wanted = functional_call(module, values, (x.clone(),), tie_weights=True)
        found = replay.outputs(values)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_what_no_change_reaches_runs_once() -> None:
    model, x = build()
    module = fxprune.trace(model, x).module
    calls: list[str] = []
    for name in ("first", "side", "last"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    replay = Replay(Replayer(module), x)
    for _ in range(3):
        replay.outputs(changed(module, "side.weight"))
    for _ in range(2):
        replay.outputs(changed(module, "last.bias"))
    assert [calls.count(name) for name in ("first", "side", "last")] == [1, 4, 5]


def test_only_what_later_nodes_read_is_kept() -> None:
    model, x = build()
    module = fxprune.trace(model, x).module
    replay = Replay(Replayer(module), x)
    replay.outputs(changed(module, "last.bias"))
    assert [tuple(value.shape) for value in replay._known.values()] == [(2, 8)]
