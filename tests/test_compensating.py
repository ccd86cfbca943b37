"""Compensated weights are those of an independent least-squares fit to what the dense layer returned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows import rows_of
from small import Squeeze
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget, methods
from fxprune.calibrating import calibrate
from fxprune.compensating import compensate


class Net(nn.Module):
    """A layer with a bias, one that feeds a batch norm, one without either, a grouped one, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.biased = nn.Conv2d(8, 12, 3, padding=1)
        self.normed, self.norm = nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.biased(self.a(x).relu()).relu()
        x = self.norm(self.normed(x)).relu()
        x = self.grouped(F.gelu(self.bare(x)))
        return self.head(F.gelu(x).mean((2, 3)))


def setting() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = Net().double().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    nn.init.normal_(model.norm.running_mean)
    return model, [torch.randn(6, 3, 9, 9, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("layer", ["biased", "normed", "bare", "grouped", "head"])
def test_a_corrected_layer_is_the_least_squares_fit_of_the_dense_one(layer: str) -> None:
    model, batches = setting()
    coupling = fxprune.couple(fxprune.trace(model, batches[0]))
    plan = fxprune.plan(coupling, Budget(macs=0.15), method=methods.Random(seed=3))
    slim = fxprune.rewrite(coupling, plan)
    names = compensate(
        coupling, plan, slim, replace(calibrate(coupling, batches, positions=1000), batches=None), damping=0.0
    )
    assert set(names) == {f"{name}.weight" for name in ("biased", "normed", "bare", "grouped", "head")}
    x, y = rows_of(model, layer, batches)
    y = y.flatten(1)
    found: Any = slim.get_submodule(layer)
    blocks = x.shape[1]
    kept_out = plan.kept.get((f"{layer}.weight", 0), np.arange(y.shape[1])).tolist()
    y = y[:, kept_out].reshape(len(y), blocks, -1)
    weight = found.weight.reshape(blocks, -1, found.weight.shape[1], x.shape[3])
    for block in range(blocks):
        kept = plan.kept[f"{layer}.weight", 1]
        kept = kept[block * len(kept) // blocks] if kept.ndim > 1 else kept
        columns = x[:, block][:, kept.tolist()].flatten(1)
        if layer != "bare":
            columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=x.dtype)], 1)
        wanted = torch.linalg.lstsq(columns, y[:, block]).solution
        mine = weight[block].flatten(1).T
        if layer == "normed":
            mine = torch.cat([mine, (model.norm.running_mean[kept_out] - slim.norm.running_mean)[None]])
        elif layer != "bare":
            mine = torch.cat([mine, found.bias.reshape(blocks, -1)[block : block + 1]])
        assert torch.allclose(columns @ mine, columns @ wanted, atol=1e-8)  # some inputs never fire: any weight will do


def test_compile_compensates_where_the_method_says_so() -> None:
    model, batches = setting()
    with torch.no_grad():
        answers = [model(x) for x in batches]
    errors = []
    for method in (methods.Joint(), methods.Joint(compensate=False)):
        slim = fxprune.compile(model, batches[0], Budget(macs=0.5), method=method, calibration=batches, progress=False)
        assert fxprune.report(slim).verification.passed
        with torch.no_grad():
            errors.append(float(sum((slim(x) - y).square().sum() for x, y in zip(batches, answers, strict=True))))
    assert errors[0] < errors[1] / 2


def test_without_compensation_weights_that_stay_are_bit_identical() -> None:
    model, batches = setting()
    method = methods.Joint(compensate=False)
    slim = fxprune.compile(model, batches[0], Budget(macs=0.5), method=method, calibration=batches, progress=False)
    plan = fxprune.report(slim).plan
    for name, value in slim.state_dict().items():
        assert torch.equal(value, plan.cut(name, model.state_dict()[name]))


@pytest.mark.parametrize("std", [1.0, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("kind", ["joint", "sequential", "hbgs"])
def test_layers_that_read_what_hardly_varies_are_corrected_too(kind: str, std: float) -> None:
    method: Any = methods.HBGS() if kind == "hbgs" else methods.Joint(sequential=kind == "sequential")
    torch.manual_seed(1)
    model, (x, held_out) = Squeeze().eval(), 1 + std * torch.randn(2, 32, 3, 16, 16)
    slim = fxprune.compile(model, x, Budget(macs=0.6), method=method, calibration=[x[:16], x[16:]], progress=False)
    plain = fxprune.rewrite(fxprune.couple(fxprune.trace(model, x)), fxprune.report(slim).plan)
    for values in (x, held_out, 1.1 * held_out):
        with torch.no_grad():
            wanted = model(values)
            error, uncorrected = ((m(values) - wanted).norm() for m in (slim, plain))
        assert error < 0.2 * uncorrected
    for name, weight in slim.named_parameters():
        if weight.ndim > 1:
            assert weight.abs().max() < 4 * model.get_parameter(name).abs().max()


def normed(model: nn.Module, batches: list[Any]) -> Tensor:
    """Return what the batch norm returns on all batches, (channels, values)."""
    kept: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.cat(kept).transpose(0, 1).flatten(1)


def test_statistics_are_estimated_again_so_that_batch_norms_return_what_they_did() -> None:
    model, batches = setting()
    slim = fxprune.compile(
        model, batches[0], Budget(macs=0.5), method=methods.Joint(), calibration=batches, progress=False
    )
    assert not slim.training
    kept = fxprune.report(slim).plan.kept["norm.weight", 0].tolist()
    before, after = normed(model, batches)[kept], normed(slim, batches)
    lives = before.std(1) > 1e-3
    assert lives.any()
    assert torch.allclose(before.mean(1)[lives], after.mean(1)[lives], atol=1e-6)
    assert torch.allclose(before.std(1)[lives], after.std(1)[lives], rtol=1e-3)


class OneBias(nn.Module):
    """Two layers that add the same bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(10, 24), nn.Linear(24, 6), nn.Linear(24, 6)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return torch.cat([self.left(x), self.right(x * x)], 1)


def test_a_bias_of_two_layers_takes_up_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = OneBias().double().eval(), [torch.randn(400, 10).double() for _ in range(2)]
    coupling = fxprune.couple(fxprune.trace(model, batches[0][:1]))
    known = calibrate(coupling, batches)
    known.save(tmp_path / "known.safetensors")
    assert not known.moments["left.weight"].absorbs
    assert not fxprune.Calibration.load(tmp_path / "known.safetensors").moments["right.weight"].absorbs
    plan = fxprune.plan(coupling, Budget(macs=0.6), method=methods.Magnitude())
    slim: Any = fxprune.rewrite(coupling, plan)
    compensate(coupling, plan, slim, known, damping=1e-12)
    assert torch.equal(slim.left.bias, model.left.bias)
    kept = np.array(plan.kept["left.weight", 1])
    features = torch.cat(batches) @ model.first.weight.T + model.first.bias
    for layer, x in (("left", features.relu()), ("right", features.relu().square())):
        wanted = (x @ getattr(model, layer).weight.T).detach()
        fitted = torch.linalg.lstsq(x[:, kept].detach(), wanted).solution
        torch.testing.assert_close(getattr(slim, layer).weight, fitted.T, rtol=1e-4, atol=1e-6)
