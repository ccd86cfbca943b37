"""Values that are there whatever goes: constants, copies and comparisons, where a sum or a statistic takes them in.

The dense network has them at every position, so either their channels stay or the slim network is still exact.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plans import cut
from torch import Tensor, nn

import fxprune

CASES: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "ones joined, multiplied with themselves": (12, lambda y: ((z := torch.cat([y, y.new_ones(3, 4)], 1)), z @ z.t())),
    "ones in rows": (16, lambda y: ((z := torch.cat([y, y.new_ones(3, 8)], 1)), z.reshape(-1, 4, 4).mean(1).sum(1))),
    "copies one by one": (16, lambda y: ((z := y.repeat_interleave(2, dim=1)), z @ z.t())),
    "copies in a mean": (16, lambda y: ((z := y.repeat_interleave(2, dim=1)), z.mean(1))),
    "copies side by side": (16, lambda y: ((z := y.unsqueeze(1).expand(-1, 2, -1)).reshape(-1, 16), z.sum(1))),
    "a comparison": (8, lambda y: (y, (y > 0).double().mean(1))),
    "ones like": (8, lambda y: (y, torch.ones_like(y).sum(1))),
    "chosen": (8, lambda y: (y, torch.where(y > 0, y, torch.zeros_like(y)).mean(1))),
    "masked": (8, lambda y: (y, y.masked_fill(y < 0, 0.0).mean(1))),
    "never NaN": (8, lambda y: (y, (y * 0).nan_to_num().add(1.0).sum(1))),
    "joined along another dim": (
        8,
        lambda y: (y, torch.cat([y.unsqueeze(1), y.new_ones(3, 3, 8)], 1).sum((1, 2))),
    ),
}


class Net(nn.Module):
    def __init__(self, width: int, use: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.first, self.last, self.use = nn.Linear(6, 8), nn.Linear(width, 5), use

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, statistic = self.use(self.first(x))
        return self.last(features), statistic


@pytest.mark.parametrize("case", CASES)
def test_constants_go_only_where_nothing_counts_them(case: str) -> None:
    torch.manual_seed(0)
    model, inputs = Net(*CASES[case]).double().eval(), (torch.randn(3, 6).double(),)
    for seed in range(6):
        coupling, plan, slim = cut(model, inputs, seed)
        assert fxprune.verify(coupling, plan, slim).passed
        reported = {c for f in coupling.frozen for c in f.channels.tolist()}
        decided = {c for g in coupling.groups() for cell in g.cells for c in cell.tolist()}
        assert reported | decided


def test_two_widths_of_one_module_are_refused_not_wrong() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(6, 8), nn.Linear(6, 8)
            self.last, self.other = nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.last(self.norm(self.a(x))), self.other(self.norm(self.b(x)))

    inputs = (torch.randn(3, 6).double(),)
    for seed in range(6):
        coupling, plan, slim = cut(Twice().double().eval(), inputs, seed)
        assert fxprune.verify(coupling, plan, slim).passed


def test_what_is_filled_may_be_filled_with_an_entry_of_a_tensor() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.strides = nn.Linear(6, 8), nn.Linear(8, 3), torch.tensor([8.0, 16.0])
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y + torch.full_like(y, fill_value=self.scale)
            return self.last(y) * torch.full((x.shape[0], 1), self.strides[0]) + x.new_full((3,), self.strides[1])

    model, inputs = Filled().double().eval(), torch.randn(3, 6).double()
    slim = fxprune.compile(model, inputs, fxprune.Budget(macs=0.5), progress=False)
    assert slim.get_parameter("first.weight").shape[0] == 4
    assert slim(inputs[:1]).shape == (1, 3)
