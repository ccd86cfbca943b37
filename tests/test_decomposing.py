"""Pairs of convolutions: counted against the original, kept where they pay, exact where they do not, saved and read."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import settled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxprune
from fxprune import ArtifactError, Budget, PlanError
from fxprune.decomposing import candidates, decompose
from fxprune.methods import HBGS, HBGTS


class Net(nn.Module):
    """A stem, a residual block, biases and batch norms; three convolutions with a kernel follow the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.Conv2d(32, 32, 3, padding=1)
        self.c, self.last = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.one, self.head = nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.norm(self.stem(x)).relu()).relu()
        x = x + self.last(self.c(self.b(x).relu()))
        return self.head(self.one(x).relu().mean((2, 3)))


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return settled(Net()), [torch.randn(16, 3, 16, 16) for _ in range(3)]


def macs_of(module: nn.Module, x: Tensor) -> int:
    coupling = fxprune.couple(fxprune.trace(module, x))
    return coupling.costs(np.ones(coupling.num_channels, dtype=bool)).macs


def test_pairs_compute_what_the_network_computes() -> None:
    model, data = network()
    traced = fxprune.trace(model, data[0])
    assert candidates(traced) == ("a", "b", "c")
    drawn = torch.get_rng_state()
    paired = decompose(traced, candidates(traced)).module
    assert torch.equal(torch.get_rng_state(), drawn)
    with torch.no_grad():
        assert torch.allclose(paired.eval()(data[0]), model(data[0]), rtol=1e-5, atol=1e-6)
    assert [n for n, _ in model.named_modules() if "decomposed" in n] == []


@pytest.mark.parametrize("method", [HBGS(decompose=True, backward=True), HBGTS(decompose=True)], ids=repr)
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_the_budget_is_of_the_original_and_what_is_added_counts(share: float, method: Any, tmp_path: Path) -> None:
    model, data = network()
    slim = fxprune.compile(model, data[0], Budget(macs=share), method=method, calibration=data, progress=False)
    report = fxprune.report(slim)
    assert report.verification is not None
    assert report.verification.passed
    assert report.costs.before.macs == macs_of(model, data[0])
    assert report.costs.after.macs == macs_of(slim, data[0])
    assert report.costs.after.params == sum(p.numel() for p in slim.parameters())
    assert 0.95 * share < report.costs.share("macs") <= share
    pairs = {name.split(".")[1] for name, _ in slim.named_parameters() if name.startswith("decomposed.")}
    assert pairs
    for name in ("a", "b", "c"):  # a pair pays, and a convolution that is none has all its filters
        weight, dense = slim.get_submodule(name).weight, model.get_submodule(name).weight
        width, filters = len(dense), dense[0].numel()
        assert (name in pairs) == (len(weight) * (filters + width) < filters * width)
        assert name in pairs or torch.equal(weight, dense)
    fxprune.save(slim, tmp_path)
    with torch.no_grad():
        assert torch.equal(fxprune.load(tmp_path, Net().eval())(data[0]), slim(data[0]))
    with pytest.raises(ArtifactError, match="decomposes convolutions that Sequential does not have"):
        fxprune.load(tmp_path, nn.Sequential(nn.Conv2d(3, 8, 3)).eval())


def test_the_second_of_a_pair_holds_the_coefficients_of_least_squares() -> None:
    model, data = network()
    method = HBGS(decompose=True, backward=True, damping=1e-9)
    slim = fxprune.compile(model, data[0], Budget(macs=0.7), method=method, calibration=data, progress=False)
    name = next(n.split(".")[1] for n, _ in slim.named_parameters() if n.startswith("decomposed."))
    kept = fxprune.report(slim).plan.kept[f"{name}.weight", 0]
    assert len(kept) < 32
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out - bias(m)))
    with torch.no_grad():
        for x in data:
            model(x)
    rows = torch.cat(seen).detach().double().movedim(1, -1).flatten(0, -2)
    rows = (rows - rows.mean(0)).numpy()
    wanted = np.linalg.lstsq(rows[:, kept], rows, rcond=None)[0].T
    found = slim.get_submodule(f"decomposed.{name}.after").weight.detach()[:, :, 0, 0].double().numpy()
    errors = [np.linalg.norm(rows - rows[:, kept] @ lam.T) for lam in (found, wanted)]
    assert errors[0] <= 1.1 * errors[1]  # a calibration reads some of the positions
    assert errors[0] <= 0.8 * np.linalg.norm(np.delete(rows, kept, axis=1))


@pytest.mark.parametrize("method", [HBGS(decompose=True, backward=True), HBGTS(decompose=True)], ids=repr)
def test_pairs_keep_within_tolerances(method: Any) -> None:
    model, data = network()
    with torch.no_grad():
        batches = [(x, model(x)) for x in data]

    def asked(tolerance: float, on_conflict: str = "error") -> tuple[float, float]:
        task = fxprune.Task(lambda out, batch: 1 + (out - batch[1]).square().mean(), tolerance=tolerance)
        slim = fxprune.compile(
            model, data[0], Budget(macs=0.5), method=method, calibration=batches, tasks={"numbers": task},
            on_conflict=on_conflict, progress=False,
        )  # fmt: skip
        error = max((slim(x) - y).square().mean().item() for x, y in batches)
        return fxprune.report(slim).costs.share("macs"), error

    share, error = asked(1e-3)
    assert share <= 0.5
    with pytest.raises(PlanError, match="'numbers'"):
        asked(error / 3)
    share, less = asked(error / 3, "closest")
    assert 0.5 < share < 1.0
    assert less < error / 2  # of the batches, one was held out to check it on


def test_a_module_that_is_called_decomposed_stays() -> None:
    data = network()[1]
    model = nn.Sequential(OrderedDict(net=network()[0], decomposed=nn.Linear(5, 5))).eval()
    slim = fxprune.compile(
        model, data[0], Budget(macs=0.7), method=HBGS(decompose=True), calibration=data, progress=False
    )
    assert torch.equal(slim.decomposed.weight, model.decomposed.weight)
    assert any(name.startswith("decomposed_.") for name, _ in slim.named_parameters())


def bias(module: nn.Module) -> Any:
    return 0 if module.bias is None else module.bias[:, None, None]


def test_what_cannot_be_is_refused() -> None:
    model, data = network()
    with pytest.raises(PlanError, match=r"adds layers.*Pass it to `fxprune\.compile`"):
        fxprune.plan(
            fxprune.couple(fxprune.trace(model, data[0])), Budget(macs=0.5), method=HBGS(decompose=True),
            calibration=data,
        )  # fmt: skip
    with pytest.raises(PlanError, match="no convolution of this network can be two"):
        fxprune.compile(
            nn.Linear(3, 4), data[0][0, 0, :, :3], Budget(macs=0.5), method=HBGS(decompose=True), progress=False,
            calibration=[torch.randn(8, 3)],
        )  # fmt: skip
    labels = [(x, torch.zeros(len(x), dtype=torch.long)) for x in data]
    tasks = {"digit": fxprune.Task(lambda out, batch: cross_entropy(out, batch[1]), classes=[0, 1], slice_outputs=True)}
    with pytest.raises(PlanError, match="task 'digit' cuts outputs down to its classes"):
        fxprune.compile(
            model, data[0], Budget(macs=0.5), method=HBGS(decompose=True), calibration=labels, tasks=tasks,
            progress=False,
        )  # fmt: skip
    with pytest.raises(PlanError, match="on_conflict='soft' is neither"):
        fxprune.compile(
            model, data[0], Budget(macs=0.5), method=HBGS(decompose=True), calibration=data, on_conflict="soft",
            progress=False,
        )  # fmt: skip
    with pytest.raises(PlanError, match="needs `compensate=True`"):
        HBGS(decompose=True, compensate=False)
