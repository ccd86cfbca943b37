"""Graphs run node by node: on data as the network does, whatever stands in for its layers on tensors without data."""

from __future__ import annotations

import pytest
import torch
from networks import recurrent
from torch import Tensor, nn

import fxprune
from fxprune.running import Runner, ValuesRunner
from fxprune.values import bind

SEED = torch.Generator().manual_seed(0)
STEPS = torch.randn(7, 4, 6, generator=SEED)
RECURRENT: dict[type[nn.Module], Tensor] = {
    recurrent.LastStates: STEPS,
    recurrent.Residual: STEPS,
    recurrent.Captions: torch.randn(2, 3, 8, 10, generator=SEED),
    recurrent.Cells: STEPS,
}


class Tagged(nn.Module):
    """Tags every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.steps = nn.Linear(6, 24), nn.LSTM(24, 24, batch_first=True)
        self.out, self.tags = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tags(self.out(self.steps(self.into(x).relu())[0]).relu())


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_run_as_they_are(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), RECURRENT[kind]
    traced = fxprune.trace(model, x)
    with torch.no_grad():
        wanted = model(x)
        found = Runner(traced.root, traced.graph).run(*bind(traced.graph, (x,), {}), enable_io_processing=False)
    torch.testing.assert_close(found, wanted)


def test_sequential_correction_reads_what_recurrent_layers_return() -> None:
    torch.manual_seed(0)
    model = Tagged().eval()
    *batches, new = torch.randn(256, 9, 6).split(64)
    errors = []
    for method in (fxprune.methods.Joint(), fxprune.methods.Joint(sequential=True)):
        slim = fxprune.compile(
            model, new[:1], fxprune.Budget(macs=0.5), method=method, calibration=batches, verify=False, progress=False
        )
        with torch.no_grad():
            errors.append(float((slim(new) - model(new)).norm()))
    assert errors[1] < errors[0]


def test_other_values_run_on_copies_that_are_made_once() -> None:
    torch.manual_seed(0)
    model, x = Tagged().eval(), torch.randn(2, 9, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced = fxprune.trace(model, x)
    runner = ValuesRunner(traced.root, traced.graph)
    weights = dict(model.named_parameters())
    values = {name: weights[name].detach() + 0.1 for name in ("steps.weight_hh_l0", "out.bias")}
    with torch.no_grad():
        runner.start(values)
        found = runner.run(x, enable_io_processing=False)
        copies = runner.fetch_attr("steps"), runner.fetch_attr("out"), runner.fetch_attr("tags")
        runner.start(values | {"out.bias": weights["out.bias"].detach() - 0.1})
        assert runner.fetch_attr("steps") is copies[0]
        assert runner.fetch_attr("out") is not copies[1]
        assert copies[2] is traced.root.get_submodule("tags")
        torch.testing.assert_close(found, torch.func.functional_call(model, values, (x,)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
