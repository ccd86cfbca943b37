"""Runs of what depends on a change give what the whole network gives, in-place ops and all, for less work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import Chain, Multitask, Residual, settled
from test_hbgs import Branches
from test_running import Tagged
from torch import Tensor, nn
from torch.func import functional_call

import fxprune
from fxprune import rerunning
from fxprune.building import build
from fxprune.errors import RewriteError
from fxprune.judging import LayerJudge, ends_of
from fxprune.rerunning import OUTPUT, Rerun
from fxprune.shrinking import Shrinker, Shrunk


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
            "tied": (Tied, (4, 6)), "recurrent": (Tagged, (4, 5, 6))}  # fmt: skip


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
        assert all(rerun._known) == any(rerun._known) == (max_bytes > 0 and rerun.sharing)
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


def shrinking(coupling: fxprune.Coupling, shares: tuple[float, ...]) -> list[Shrunk]:
    """Return networks of which less and less is left."""
    shrinker, found = Shrinker(coupling, {}, 1e-4), list[Shrunk]()
    scores = np.random.default_rng(0).random(coupling.num_channels)
    for share in shares:
        keep = np.ones(coupling.num_channels, dtype=bool)
        for group in coupling.groups():
            path = group.path(np.where(coupling.is_frozen, np.inf, scores))
            keep[path[: int(len(path) * (1 - share))].ravel()] = False
        found.append(shrinker.without(found[-1] if found else shrinker.dense(), coupling.settle(keep)))
    return found


@pytest.mark.parametrize("kind", [Chain, Residual, Branches, Multitask])
def test_what_has_gone_is_not_run(kind: type[nn.Module]) -> None:
    model, data = settled(kind()), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    coupling = fxprune.couple(fxprune.trace(model, data[0]))
    shrinker = Shrinker(coupling, {}, 1e-4)
    members = [coupling.settle(np.isin(np.arange(coupling.num_channels), g.cells[0])) for g in coupling.groups()]
    rerun, still = (Rerun(coupling, data, [shrinker.touched(m) for m in members]) for _ in range(2))
    judge, other = LayerJudge(coupling, rerun), LayerJudge(coupling, still, max_bytes=0)
    before = data[0].clone()
    *networks, last = shrinking(coupling, (0.9, 0.7, 0.5, 0.3))
    for now, after in zip(networks, [*networks[1:], last], strict=True):
        rerun.commit(now.values, now.keep)
        still.commit(now.values)
        rerun.work = still.work = 0.0
        for x, found in zip(data, rerun.run(after.values), strict=True):
            with torch.no_grad():
                wanted = functional_call(model, dict(after.values), (x,))
            for a, b in zip(_leaves(found[OUTPUT]), _leaves(wanted), strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for group in range(len(members)):
            found = judge.error(group, after.keep, after.values)
            assert found == pytest.approx(other.error(group, after.keep, after.values), rel=1e-4)
    assert rerun.kept is not None
    assert not (networks[-1].keep & ~rerun.keep).any()
    assert rerun.work < 0.6 * still.work
    rerun.commit({}, np.ones(coupling.num_channels, dtype=bool))
    assert rerun.kept is None
    with torch.no_grad():
        (wanted, *_), found = _leaves(model(data[0])), next(iter(rerun.run({})))
    assert torch.equal(_leaves(found[OUTPUT])[0], wanted)
    assert torch.equal(before, data[0])


class Normed(nn.Module):
    """Norms channels, and takes a softmax over others: what has gone counts as long as it is only zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.weigh = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.weigh(self.norm(self.first(x)).relu()).softmax(-1))


def test_where_zeros_count_candidates_are_slim_networks() -> None:
    model, data = settled(Normed()), [torch.randn(4, 6) for _ in range(2)]
    coupling = fxprune.couple(fxprune.trace(model, data[0]))
    rerun = Rerun(coupling, data, [{"first.weight"}, {"weigh.weight"}])
    judge = LayerJudge(coupling, rerun)
    before = list(rerun.run({}))
    assert not rerun.zeros_do
    for now in shrinking(coupling, (0.7, 0.4)):
        rerun.commit(now.values, now.keep)
        rerun.work = 0.0
        slim = build(coupling, now.keep)
        for x, found in zip(data, rerun.run(now.values, keep=now.keep), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found[OUTPUT], slim(x))
        assert rerun.work == pytest.approx(coupling.costs(now.keep).macs / coupling.costs(np.ones_like(now.keep)).macs)
        group = next(g for g in coupling.groups() if g.name == "first.weight")
        assert ends_of(coupling, group) == ("weigh",)
        with torch.no_grad():
            wanted, found = (torch.cat([m.weigh(m.norm(m.first(x)).relu()) for x in data]) for m in (model, slim))
        ids = coupling.tensors["weigh.weight"][1][0]
        wanted = wanted[:, torch.from_numpy(now.keep[ids.ravel()])]
        error = judge.error(group.index, now.keep, now.values)
        assert error == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)
    rerun.commit({})
    assert torch.equal(next(iter(rerun.run({}, keep=now.keep | True)))[OUTPUT], before[0][OUTPUT])


def test_what_cannot_be_rewritten_runs_as_wide_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RewriteError("sizes in the graph cannot be rewritten", nodes={})

    monkeypatch.setattr(rerunning, "build", refuse)
    model, data = settled(Chain()), [torch.randn(4, 3, 8, 8)]
    coupling = fxprune.couple(fxprune.trace(model, data[0]))
    (now,) = shrinking(coupling, (0.3,))
    rerun = Rerun(coupling, data, [set(now.values)])
    rerun.commit(now.values, now.keep)
    with torch.no_grad():
        wanted = functional_call(model, dict(now.values), (data[0],))
    assert rerun.kept is None
    assert torch.allclose(next(iter(rerun.run(now.values)))[OUTPUT], wanted, atol=1e-6)


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
