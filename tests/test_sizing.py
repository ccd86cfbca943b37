"""Python that branches and loops on sizes: traced for the example inputs, checked when it runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Budget


class Net(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def between(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(F.relu(self.a(x))))


class Padded(Net):
    def between(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 4 != 0:
            x = F.pad(x, (0, 4 - x.shape[-1] % 4))
        return x


class Asserting(Net):
    def between(self, x: Tensor) -> Tensor:
        _, c, *space = x.shape
        assert c == 16, "sixteen channels"
        if len(space) != 2 or c % 16:
            raise ValueError
        return x


class Numbers(Net):
    def between(self, x: Tensor) -> Tensor:
        h = math.ceil(x.shape[2] / 3)
        pieces = list(x.chunk(2, dim=1))
        pieces = [p * float(x.shape[3]) for p in pieces]
        for i in range(x.shape[2] // 4):
            x = torch.cat(pieces, dim=1) + i + int(x.shape[3])
        return x[:, :, : h * 2]


class Masked(Net):
    def between(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[2], x.shape[3])
        mask[: x.shape[2] // 2] = 1
        mask[:, 0] = self.scale[0]
        return x * mask


@torch.fx.wrap
def halves(x: Tensor, groups: int) -> Tensor:
    """Hold a size that a pruned network does not have."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Wrapped(Net):
    def between(self, x: Tensor) -> Tensor:
        return halves(x, 2)


@torch.fx.wrap
def doubled_if_positive(x: Tensor) -> Tensor:
    return 2 * x if float(x.sum()) > 0 else x


class AsksForValues(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(doubled_if_positive(x))))


NETS = [Padded, Asserting, Numbers, Masked, Wrapped]


def settled(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("kind", NETS)
def test_sizes_that_python_asks_for(kind: type[nn.Module]) -> None:
    model, x = settled(kind), torch.randn(2, 3, 8, 8)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert report.verification is not None
    assert report.verification.worst < 1e-12
    assert dict(slim.named_parameters())["a.weight"].shape[0] < 16
    assert slim(x).shape == model(x).shape
    assert slim(torch.randn(5, 3, 8, 8)).shape[0] == 5


@pytest.mark.parametrize("kind", NETS)
def test_a_trace_computes_what_the_model_does(kind: type[nn.Module]) -> None:
    model, x = settled(kind), torch.randn(2, 3, 8, 8)
    assert torch.equal(fxprune.trace(model, x).module(x), model(x))


def test_another_decision_is_refused_with_the_line() -> None:
    model, x = settled(Padded), torch.randn(1, 3, 8, 8)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    assert slim(torch.randn(1, 3, 12, 12)).shape == (1, 4, 12, 12)
    with pytest.raises(ValueError, match=r"test_sizing\.py:\d+, and followed False .* now True"):
        slim(torch.randn(1, 3, 9, 9))


def test_decisions_about_channels_go_with_the_channels() -> None:
    model, x = settled(Asserting), torch.randn(1, 3, 8, 8)
    count = sum("expected" in n.name for n in fxprune.trace(model, x).graph.nodes)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    assert count
    assert not any("expected" in n.name for n in slim.graph.nodes)


def test_buffers_are_read_when_the_slim_network_runs() -> None:
    model, x = settled(Masked), torch.randn(1, 3, 8, 8)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    before = slim(x)
    slim.get_buffer("scale").fill_(7.0)
    assert not torch.allclose(slim(x), before)


class Counting(Net):
    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_a_buffer_that_forward_counts_with() -> None:
    model, x = settled(Counting), torch.randn(1, 3, 8, 8)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    slim(x), slim(x)
    assert int(slim.get_buffer("calls")) == 2
    assert int(model.get_buffer("calls")) == 0


class DependsOnData(Net):
    def between(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_depends_on_data_is_refused() -> None:
    with pytest.raises(fxprune.errors.TraceError, match="depends on the data"):
        fxprune.trace(settled(DependsOnData), torch.randn(1, 3, 8, 8))


class NormAndAct(nn.BatchNorm2d):
    """A batch norm with a forward of its own, as in timm."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return F.relu(out)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormAndAct(16)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_batch_norm_with_its_own_forward_keeps_both_modes() -> None:
    model, x = settled(Normed), torch.randn(4, 3, 8, 8)
    slim = fxprune.compile(model, x, Budget(macs=0.5), progress=False)
    assert not fxprune.report(slim).notes
    before = slim.get_buffer("norm.running_mean").clone()
    slim.train()(x)
    assert not torch.equal(slim.get_buffer("norm.running_mean"), before)


class Casting(Net):
    def between(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            raise RuntimeError("nobody computes on the meta device")
        with torch.autocast(x.device.type, enabled=False):
            return x * 2


def test_devices_are_real_and_autocast_is_said_to_be_left_out() -> None:
    slim = fxprune.compile(settled(Casting), torch.randn(1, 3, 8, 8), Budget(macs=0.5), progress=False)
    report = fxprune.report(slim)
    assert report.frontend == "symbolic_trace"
    assert any(note.startswith("forward sets torch.autocast (test_sizing.py:") for note in report.notes)


class Reshaping(Net):
    def between(self, x: Tensor) -> Tensor:
        x = torch.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))
        return torch.reshape(x, (x.shape[0], 16, 8, 8))


def test_functions_that_look_at_numbers_fix_none() -> None:
    model = settled(Reshaping)
    traced = fxprune.trace(model, torch.randn(2, 3, 8, 8))
    assert not any("expected" in n.name for n in traced.graph.nodes)
    slim = fxprune.compile(model, torch.randn(2, 3, 8, 8), Budget(macs=0.5), progress=False)
    assert slim(torch.randn(5, 3, 8, 8)).shape == (5, 4, 8, 8)


def test_a_function_that_asks_for_values_is_kept_whole() -> None:
    model, x = settled(AsksForValues), torch.randn(2, 3, 8, 8)
    coupling = fxprune.couple(fxprune.trace(model, x))
    assert "doubled_if_positive, a function that is kept whole" in coupling.why_frozen(("a.weight", 0))
    with pytest.raises(fxprune.CouplingError, match="doubled_if_positive"):
        fxprune.couple(fxprune.trace(model, x), unknown="error")
    slim = fxprune.compile(model, x, Budget(params=0.9), progress=False)
    assert fxprune.report(slim).verification.passed
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
