"""Predicted peak memory is what torch's allocator hands out, and budgets on it are met and used."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory import allocated
from plans import all_kept
from small import Multitask, Residual, settled
from torch import Tensor, nn
from zoo import NETWORKS

import fxprune
from fxprune import Budget, PlanError, methods
from fxprune.examples.networks import SceneNet
from fxprune.workspaces import Sizes, Workspaces, convolving, this_machine

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other kernels convolve elsewhere"
)


class UNet(nn.Module):
    """Two levels with skips, transposed convolutions and ReLUs in place."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
            )

        self.down1, self.down2 = block(3, 16), block(16, 32)
        self.up, self.merge = nn.ConvTranspose2d(32, 16, 2, 2), block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        return self.head(self.merge(torch.cat([self.up(coarse), fine], dim=1)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scene": (SceneNet, (1, 64, 64)),
    "unet": (UNet, (3, 64, 64)),
    "multitask": (Multitask, (3, 32, 32)),
}
ZOO = [
    f"torchvision-{name}"
    for name in ("resnet", "resnext", "densenet", "mobilenet_v3_small", "convnext", "vit", "swin", "shufflenet_v2_x0_5")
]


def build(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    if name in CASES:
        make, shape = CASES[name]
        return settled(make()), torch.randn(batch, *shape)
    model, x = NETWORKS[name].build()
    return model, torch.randn(batch, *x.shape[1:])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", [*CASES, *ZOO])
def test_predicted_memory_is_what_the_allocator_hands_out(name: str, batch: int) -> None:
    model, x = build(name, batch)
    coupling = fxprune.couple(fxprune.trace(model, x))
    for share in (1.0, 0.5):
        plan = fxprune.plan(coupling, Budget(macs=share), method=methods.Magnitude())
        measured = allocated(fxprune.rewrite(coupling, plan), x)
        assert plan.costs.after.memory == pytest.approx(measured, rel=0.1), share


class Locals(nn.Module):
    """Calls a layer that is kept whole: it holds what its locals name until it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]


def uncut(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return the predicted and the measured peak of the emitted network that keeps everything."""
    coupling = fxprune.couple(fxprune.trace(model, x))
    plan = all_kept(coupling)
    return plan.costs.after.memory, allocated(fxprune.rewrite(coupling, plan), x)


@pytest.mark.parametrize(
    "make",
    [
        Locals,
        lambda: nn.Sequential(nn.Conv2d(16, 8, 1), nn.Identity(), nn.ReLU(True), nn.Dropout(), nn.Flatten()),
        lambda: nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU()).to(memory_format=torch.channels_last),
    ],
    ids=["locals", "aliases", "channels_last"],
)
def test_what_is_held_counts_once(make: Callable[[], nn.Module]) -> None:
    predicted, measured = uncut(make().eval(), torch.randn(2, 16, 16, 16))
    assert predicted == pytest.approx(measured, rel=0.02)


class Attention(nn.Module):
    """Attention whose queries may be narrower than its values: torch has one kernel for equal widths only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qk, self.v, self.head = nn.Linear(8, 2 * 2 * width), nn.Linear(8, 2 * 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("width", [4, 8])
def test_attention_takes_its_matrix_only_where_widths_differ(width: int) -> None:
    model, x = Attention(width).eval(), torch.randn(8, 64, 8)
    predicted, measured = uncut(model, x)
    assert predicted == pytest.approx(measured, rel=0.1)
    assert (measured > 2 * 4 * 8 * 2 * 64**2) == (width != 8)  # two matrices: scores, and their softmax


CONVOLUTIONS = [
    (nn.Conv2d(3, 16, 3, padding=1), 4), (nn.Conv2d(32, 20, 3, padding=1), 4), (nn.Conv2d(17, 40, 3), 1),
    (nn.Conv2d(32, 32, 1), 4), (nn.Conv2d(30, 50, 1), 16), (nn.Conv2d(32, 64, 1, stride=2), 4),
    (nn.Conv2d(64, 64, 3, groups=8, padding=1), 4), (nn.Conv2d(60, 60, 3, groups=4, padding=1), 4),
    (nn.Conv2d(20, 20, 5, groups=20, padding=2), 4), (nn.Conv2d(32, 32, 3, dilation=2), 4), (nn.Conv2d(32, 32, 3), 1),
    (nn.Conv2d(12, 8, 3).double(), 4), (nn.Conv1d(24, 24, 5), 8), (nn.ConvTranspose2d(32, 12, 2, 2), 4),
    (nn.ConvTranspose2d(16, 16, 4, 2, groups=16, bias=False), 4), (nn.Conv2d(8, 8, 3, padding=40, dilation=40), 4),
    (nn.Conv2d(24, 16, 1, groups=2), 4),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "batch"), CONVOLUTIONS, ids=lambda case: str(case))
def test_workspaces_of_convolutions(layer: nn.Module, batch: int) -> None:
    conv: nn.Conv2d = layer  # pyright: ignore[reportAssignmentType]
    space = (256,) if conv.weight.ndim == 3 else (24, 24)
    x = torch.randn(batch, conv.in_channels, *space, dtype=conv.weight.dtype)
    machine = this_machine()
    with torch.no_grad():
        out = conv(x)
    fixed = convolving(
        x, conv.weight, conv.bias, out, conv.stride, conv.padding, conv.dilation, conv.transposed, machine
    )
    numbers = (x.numel(), conv.weight.numel(), out.numel(), x.shape[1], out.shape[1], conv.weight.shape[1])
    extra = Workspaces([fixed], machine)(Sizes(*(np.array([n]) for n in numbers)))[0]
    bias = 0 if conv.bias is None else conv.bias.nbytes
    total = x.nbytes + conv.weight.nbytes + bias + out.nbytes + extra
    assert total == pytest.approx(allocated(conv, x), rel=0.05)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_memory_budgets_are_met_and_used(scope: str, share: float) -> None:
    model, x = build("torchvision-resnext", 4)
    plan = fxprune.plan(
        fxprune.couple(fxprune.trace(model, x)), Budget(memory=share), method=methods.Magnitude(scope=scope)
    )
    assert 0.98 * share < plan.costs.share("memory") <= share


def test_layers_outside_of_the_peak_shrink_less() -> None:
    model = settled(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)
    ))  # fmt: skip
    coupling = fxprune.couple(fxprune.trace(model, torch.randn(4, 3, 64, 64)))
    plan = fxprune.plan(coupling, Budget(memory=0.5), method=methods.Magnitude())
    slim = fxprune.rewrite(coupling, plan)
    assert slim.get_submodule("0").weight.shape[0] <= 16
    assert slim.get_submodule("3").weight.shape[0] >= 31


def test_an_unreachable_memory_budget_says_what_is_possible() -> None:
    with pytest.raises(PlanError, match=r"memory: at most .* asked .*is the least possible"):
        fxprune.plan(
            fxprune.couple(fxprune.trace(settled(Residual()), torch.randn(1, 3, 16, 16))),
            Budget(memory=0.01),
            method=methods.Magnitude(),
        )
