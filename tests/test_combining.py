"""What combinations of tasks cost: what the selected networks do, by the counters of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small import Multitask, macs_by_torch, settled, slim_multitask
from strategies import Network, build, example_inputs, networks
from torch import Tensor, nn

import fxprune
from fxprune import PlanError, TraceError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Many(nn.Module):
    """A head per task, all on one layer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleDict({f"t{i}": nn.Linear(8, i + 1) for i in range(count)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x).relu()
        return {name: head(x) for name, head in self.heads.items()}


def test_costs_are_those_of_the_selected_networks_by_other_counters() -> None:
    slim = slim_multitask(X)
    found = fxprune.combination_costs(slim)
    assert len(found) == 7
    assert found.complete
    for entry in found:
        some = fxprune.select_tasks(slim, entry.tasks)
        assert entry.costs.macs == macs_by_torch(some, X)
        assert entry.costs.params == sum(p.numel() for p in some.parameters())
    assert found.whole.costs == fxprune.report(slim).costs.after
    assert found.whole.tasks == ("seg", "depth", "present")
    assert found[("depth", "seg")] is found[("seg", "depth")]
    assert found.share(["seg"], "macs") == found["seg"].costs.macs / found.whole.costs.macs


@given(network=networks().filter(lambda network: len(network.outputs) > 1))
@settings(max_examples=10)
def test_costs_of_random_networks_are_those_of_their_selections_coupled_anew(network: Network) -> None:
    model, inputs = build(network), example_inputs(network)
    counted = macs_by_torch(model, *inputs)  # hooks now have made their weights, in the network's dtype
    traced = fxprune.trace(model, inputs)
    found = fxprune.combination_costs(traced)
    same_counts = found.whole.costs.macs == counted  # torch counts some ops otherwise
    for entry in found:
        some = fxprune.select_tasks(traced, entry.tasks)
        assert not same_counts or entry.costs.macs == macs_by_torch(some, *inputs)
        assert entry.costs.params == sum(p.numel() for p in some.parameters())
        coupling = fxprune.couple(fxprune.trace(some, inputs))
        assert entry.costs == coupling.costs(np.ones(coupling.num_channels, dtype=bool))


def test_tables_name_every_combination() -> None:
    found = fxprune.combination_costs(fxprune.trace(Many(2), torch.randn(3, 4)))
    assert str(found) == (
        "tasks      macs    of all    params    of all    memory    of all\n"
        "-------  ------  --------  --------  --------  --------  --------\n"
        "t0          120     71.4%        49     73.1%       436     85.8%\n"
        "t1          144     85.7%        58     86.6%       472     92.9%\n"
        "t0 + t1     168    100.0%        67    100.0%       508    100.0%"
    )


def test_of_many_tasks_single_ones_all_and_those_given_are_looked_at() -> None:
    traced = fxprune.trace(Many(8), torch.randn(3, 4))
    tasks = tuple(f"t{i}" for i in range(8))
    found = fxprune.combination_costs(traced)
    assert [entry.tasks for entry in found] == [*((task,) for task in tasks), tasks]
    assert not found.complete
    assert "other combinations were not looked at: pass `combinations=`" in str(found)
    given = fxprune.combination_costs(traced, combinations=[("t5", "t2"), ("t3",), tasks])
    assert [entry.tasks for entry in given] == [*((task,) for task in tasks), ("t2", "t5"), tasks]


def test_latency_is_measured_in_turn() -> None:
    slim = slim_multitask(X).train()
    before = {name: t.clone() for name, t in slim.state_dict().items()}
    found = fxprune.combination_costs(slim, latency=True)
    assert all(entry.latency is not None and entry.latency > 0 for entry in found)
    assert found.whole.relative == 1.0
    assert found["present"].relative is not None
    assert found["present"].relative < 1
    assert "ms" in str(found)
    assert slim.training
    assert all(torch.equal(before[name], t) for name, t in slim.state_dict().items())


def test_networks_that_do_not_know_their_inputs_are_given_some() -> None:
    model = settled(Multitask(8))
    graph = torch.fx.symbolic_trace(model)
    expected = fxprune.combination_costs(fxprune.trace(model, X))
    assert fxprune.combination_costs(graph, X) == fxprune.combination_costs(model, X) == expected
    with pytest.raises(TraceError, match="does not know its example inputs"):
        fxprune.combination_costs(graph)
    with pytest.raises(TraceError, match="this Multitask is no graph"):
        fxprune.combination_costs(model)
    with pytest.raises(TraceError, match="node 'trunk_0' raised"):
        fxprune.combination_costs(graph, torch.randn(2, 5, 8, 8))
    with pytest.raises(PlanError, match="one output only"):
        fxprune.combination_costs(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(PlanError, match="no task 'ghost'"):
        fxprune.combination_costs(graph, X, combinations=[("ghost",)])
