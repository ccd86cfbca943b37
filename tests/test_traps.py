"""The list of traps: each is exact at about half its multiply-accumulates, or held with a reason; never wrong."""

from __future__ import annotations

import operator
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from plans import cut
from small import settled
from torch import Tensor, nn
from traps import TRAPS, Trap
from traps.attention import Separate

import fxprune
from fxprune.values import tensors_in


def made(trap: Trap) -> nn.Module:
    """Build the network of a trap, with scales and statistics of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hooks of torch.nn.utils are old, and widely used
        return settled(trap.make())


def size(model: nn.Module, site: str) -> int:
    """Return the size of a parameter along a dim."""
    name, dim = site.split()
    return operator.attrgetter(name)(model).shape[int(dim)]


def train_one_step(slim: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Take a step of gradient descent; what trains gets finite gradients, what is frozen none."""
    slim.train()
    trained = [p for p in slim.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    sum(y.abs().mean() for y in tensors_in(slim(*inputs))).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(p.grad is None for p in slim.parameters() if not p.requires_grad)
    assert sum(p.grad is not None for p in trained) > 0.6 * len(trained)
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    assert all(y.isfinite().all() for y in tensors_in(slim(*inputs)))


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    trap = TRAPS[name]
    model = made(trap)
    slim = fxprune.compile(model, trap.inputs, fxprune.Budget(macs=trap.macs), progress=False)
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.worst < 1e-9
    assert 0.7 * trap.macs < report.costs.share("macs") <= trap.macs
    assert report.frontend == "symbolic_trace"
    assert not [note for note in report.notes if "was frozen" in note]

    stays = {site for site in trap.shrinks if size(slim, site) == size(model, site)}
    for seed in range(12):  # random plans reach corners, and groups, that magnitudes do not
        coupling, plan, other = cut(model, trap.inputs, seed)
        assert fxprune.verify(coupling, plan, other).worst < 1e-9
        assert all(size(other, site) == size(model, site) for site in trap.held)
        stays = {site for site in stays if size(other, site) == size(model, site)}
        if seed and not stays:
            break
    assert not stays, f"{sorted(stays)} did not shrink"
    for site, words in trap.held.items():
        assert size(slim, site) == size(model, site)
        name, dim = site.split()
        assert words in (reason := coupling.why_frozen((name, int(dim))))
        assert "because node '" in reason
    if not any("has no rule" in words for words in trap.held.values()):
        assert not coupling.record.unknown

    ours, theirs = slim.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(t.requires_grad == theirs[name].requires_grad for name, t in ours.items())
    with torch.no_grad():
        dense, found = tensors_in(model(*trap.inputs)), tensors_in(slim(*trap.inputs))
    assert [y.shape for y in found] == [y.shape for y in dense]
    longer = [torch.cat([x, x[:1]]) for x in trap.inputs]
    with torch.no_grad(), suppress(RuntimeError):  # some write the batch size into forward
        dense = tensors_in(model(*longer))
        found = tensors_in(slim(*longer))
        assert [y.shape for y in found] == [y.shape for y in dense]
    train_one_step(slim, trap.inputs)


def test_heads_are_balanced_not_aligned_and_go_as_a_whole() -> None:
    model, x = settled(Separate()), torch.randn(2, 6, 16)
    differ, heads = False, set()
    for seed in range(12):
        _, plan, slim = cut(model, (x,), seed)
        kept = {name: plan.kept.get((f"{name}.weight", 0), np.arange(24)) for name in "qkv"}
        per_head = {name: np.bincount(k // 6, minlength=4) for name, k in kept.items()}
        alive = per_head["q"] > 0
        for count in per_head.values():
            assert (count[alive] == count[alive][0]).all()
            assert not count[~alive].any()
        heads.add(int(alive.sum()))
        positions = {tuple((kept["v"] % 6)[kept["v"] // 6 == h]) for h in np.flatnonzero(alive)}
        differ = differ or len(positions) > 1
        np.testing.assert_array_equal(kept["q"], kept["k"])
        assert slim(x).shape == (2, 6, 5)
    assert len(heads) > 1
    assert differ


def test_a_complex_weight_scores_like_its_real_and_imaginary_parts() -> None:
    trap = TRAPS["a complex parameter"]
    model = made(trap)
    coupling = fxprune.couple(fxprune.trace(model, trap.inputs))
    site = next(s for s in coupling.sites if s.name == "filter" and s.dim == 0)
    rest = [p for name, p in model.named_parameters() if name in ("first.weight", "last.weight")]
    squares = rest[0].square().sum((1, 2, 3)) + rest[1].square().sum((0, 2, 3))
    expected = squares + torch.view_as_real(model.filter).square().sum((1, 2, 3))  # type: ignore[arg-type]
    found = fxprune.methods.Magnitude().scores(coupling)[site.channels.ravel()]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
    tasks = {"sum": fxprune.Task(lambda outputs, batch: outputs.square().mean())}
    taylor = fxprune.methods.Taylor().scores(coupling, [(trap.inputs[0], None)], tasks)
    assert np.isfinite(taylor).all()
    assert len(np.unique(taylor[site.channels.ravel()])) == 16


@pytest.mark.parametrize("name", ["spectral_norm", "spectral_norm by a hook", "weight_norm", "weight_norm by a hook"])
def test_a_reparametrised_network_in_train_mode_is_not_touched(name: str) -> None:
    trap = TRAPS[name]
    model = made(trap).train()
    model(*trap.inputs).sum().backward()  # the hooks now hold weights with a history
    before = {key: t.clone() for key, t in model.state_dict().items()}
    slim = fxprune.compile(model, trap.inputs, fxprune.Budget(macs=0.5), progress=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert type(slim.a) is type(model.a)
    assert slim.a.weight.shape == (slim.a.out_channels, 3, 3, 3)
    train_one_step(slim, trap.inputs)


class Branching(nn.Module):
    """Asks values which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.mean() > 0:
            y = y * 2
        return self.b(y)


def test_a_branch_on_values_is_refused_by_both_front_ends() -> None:
    with pytest.raises(fxprune.TraceError, match=r"symbolic_trace: (?s:.)*torch\.export: .*data-dependent"):
        fxprune.compile(Branching(), torch.randn(2, 6, 16), fxprune.Budget(macs=0.5), progress=False)


class Patches(nn.Module):
    """Iterates over as many parts as the input is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(part) * (i + 1) for i, part in enumerate(self.a(x).split(4, 3))]
        return self.b(torch.cat(parts, 3))


def test_iterating_over_another_number_of_parts_is_refused() -> None:
    slim = fxprune.compile(settled(Patches()), torch.randn(2, 3, 8, 8), fxprune.Budget(macs=0.5), progress=False)
    assert fxprune.report(slim).frontend == "symbolic_trace"
    assert slim(torch.randn(3, 3, 6, 8)).shape == (3, 5, 6, 8)
    with pytest.raises(ValueError, match=r"test_traps.py:\d+, and followed 2 when the network was traced; it is now 3"):
        slim(torch.randn(2, 3, 8, 12))
