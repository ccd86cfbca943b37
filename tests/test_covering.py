"""coupling.coverage(): what can go at all, and what holds the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.inspecting import inspect


class Net(nn.Module):
    """Of three layers the middle one cannot shrink its width: a sort over the channels holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).cumsum(-1))


@pytest.fixture
def coupling() -> fxprune.Coupling:
    return fxprune.couple(fxprune.trace(Net(), torch.randn(3, 4)))


def test_shares_are_counted_by_element(coupling: fxprune.Coupling) -> None:
    coverage = coupling.coverage()
    macs = {"a": 3 * 4 * 8, "b": 3 * 8 * 6, "c": 3 * 6 * 2}
    assert coverage.macs == pytest.approx((macs["a"] + macs["b"]) / sum(macs.values()))  # all of a and b, none of c
    free = 4 * 8 + 8 + 8 * 6
    assert coverage.params == pytest.approx(free / sum(p.numel() for p in Net().parameters()))


def test_what_holds_the_rest_is_named_most_costly_first(coupling: fxprune.Coupling) -> None:
    first, second = coupling.coverage().blocked
    assert (first.node, first.macs, first.params) == ("c", 36, 14)
    assert "'c' is combined with a dim whose size cannot change" in first.reason
    assert "'output' is an output of the network" in first.reason
    assert first.source.startswith("test_covering.py:")
    assert (second.node, second.macs, second.params) == ("b", 0, 6)
    assert "'cumsum' runs along a dim that aten.cumsum cannot shorten" in second.reason


def test_it_prints_and_travels(coupling: fxprune.Coupling) -> None:
    text = str(coupling.coverage())
    assert text.startswith("86.9 % of the macs and ")
    assert "held because" in text
    assert text in str(inspect(coupling))
    slim = fxprune.compile(Net(), torch.randn(3, 4), fxprune.Budget(macs=0.7), progress=False)
    report = fxprune.report(slim)
    assert report.coverage == coupling.coverage()
    assert report.to_dict()["coverage"]["blocked"][0]["node"] == "c"
    assert "86.9 % of the macs" in str(report)


def test_all_can_go_but_what_leaves() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, bias=False))
    coverage = fxprune.couple(fxprune.trace(model, torch.randn(3, 4))).coverage()
    assert (coverage.macs, coverage.params, coverage.blocked) == (1.0, 1.0, ())
    assert str(coverage) == "100 % of the macs and 100 % of the parameters can go."
