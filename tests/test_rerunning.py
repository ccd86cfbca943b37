"""Runs of what depends on a change give what the whole network gives, in-place ops and all, for less work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import Chain, settled
from test_hbgs import Branches
from torch import Tensor, nn
from torch.func import functional_call

import fxprune
from fxprune.judging import ends_of
from fxprune.rerunning import OUTPUT, Rerun


class Writes(nn.Module):
    """Writes to a view of what is read later: that cannot be run in part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, 1:3] += 1
        return self.b(x) + x.mean()


class Tied(nn.Module):
    """Uses one weight twice, and writes in place to what it adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        y = nn.functional.relu(x, inplace=True)
        z = self.second(y)
        z += x
        return {"sum": self.third(z), "first": x.mean(1)}


NETWORKS = {"chain": (Chain, (4, 3, 8, 8)), "branches": (Branches, (4, 3, 8, 8)), "writes": (Writes, (4, 3, 8, 8)),
            "tied": (Tied, (4, 6))}  # fmt: skip


@pytest.mark.parametrize("max_bytes", [1 << 30, 20_000, 0])
@pytest.mark.parametrize("name", NETWORKS)
def test_partial_runs_give_what_the_whole_network_gives(name: str, max_bytes: int) -> None:
    kind, shape = NETWORKS[name]
    model = settled(kind())
    data = [torch.randn(shape) for _ in range(3)]
    before = [x.clone() for x in data]
    coupling = fxprune.couple(fxprune.trace(model, data[0]))
    state = {key: t.detach() for key, t, _ in coupling.traced.state if t.is_floating_point()}
    changes = [{key} for key in state]
    rerun = Rerun(coupling, data, changes, max_bytes=max_bytes)
    assert rerun.sharing == (name != "writes")
    if max_bytes != 20_000:
        assert rerun.remembered == (max_bytes > 0 and rerun.sharing)
    values: dict[str, Tensor] = {}
    generator = np.random.default_rng(0)
    for step in range(12):
        (key,) = changes[generator.integers(len(changes))]
        trial = values | {key: state[key] + 0.1 * torch.rand(state[key].shape)}
        for x, found in zip(data, rerun.run(trial), strict=True):
            with torch.no_grad():
                wanted = functional_call(model, trial, (x.clone(),), tie_weights=True)
            for a, b in zip(_leaves(found[OUTPUT]), _leaves(wanted), strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        if step % 3 == 0:
            values = trial
            rerun.commit(values)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))


def _leaves(value: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


def test_only_what_depends_on_the_change_is_run() -> None:
    model, data = settled(Chain()), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    coupling = fxprune.couple(fxprune.trace(model, data[0]))
    rerun = Rerun(coupling, data, [{"conv2.weight"}, {"head.weight"}])
    macs = coupling.costs(np.ones(coupling.num_channels, dtype=bool)).macs
    for name, parts in (("head.weight", [model.head]), ("conv2.weight", [model.conv2, model.head])):
        rerun.work = 0.0
        list(rerun.run({name: dict(model.named_parameters())[name].detach() + 1}))
        positions = {model.head: 4, model.conv2: 4 * 64}
        wanted = sum(part.weight.numel() * positions[part] for part in parts)
        assert rerun.work == pytest.approx(wanted / macs)
    full = Rerun(coupling, data, [{"conv2.weight"}], max_bytes=0)
    list(full.run({"head.weight": model.head.weight.detach() + 1}))
    assert full.work == pytest.approx(1)


def test_channels_end_where_they_are_read_last() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Chain()), torch.randn(1, 3, 8, 8)))
    names = {g.name: ends_of(coupling, g) for g in coupling.groups()}
    assert names == {"conv1.weight": ("conv2",), "conv2.weight": ("head",)}
