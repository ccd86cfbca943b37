"""Small networks that several test files share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune


def settled(model: nn.Module) -> nn.Module:
    """Give every norm statistics and scales of its own, so that no channel is like another; return it in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and (name.endswith("running_var") or t.ndim < 2):
            t.data.copy_(0.5 + torch.rand(t.shape, generator=generator))
    return model.eval()


class Chain(nn.Module):
    """Convolution, norm, convolution, pool, classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """A stem and two residual blocks, one of them grouped."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a2(F.relu(self.a1(x)))
        x = x + self.b2(F.relu(self.b1(x)))
        return self.head(x.mean((2, 3)))


class Squeeze(nn.Module):
    """Convolution and norm, each channel times what a branch tells of the means of all, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.reduce, self.expand = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        gate = self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((y * gate).mean((2, 3)))


@dataclass
class Heads:
    """What `Multitask` returns."""

    labels: Tensor
    depth: Tensor


class Multitask(nn.Module):
    """A shared trunk with three heads; returns a dict."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.seg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1))
        self.depth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.present = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"seg": self.seg(x), "depth": self.depth(x), "present": self.present(x.mean((2, 3)))}


def slim_multitask(x: Tensor) -> fx.GraphModule:
    """Return a multi-task network of 60 % of the macs."""
    return fxprune.compile(settled(Multitask(8)), x, fxprune.Budget(macs=0.6), progress=False)


def macs_by_torch(module: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-accumulates that torch counts; the inputs may be written to."""
    with FlopCounterMode(display=False) as counter:
        module(*(x.clone() for x in inputs))
    return counter.get_total_flops() // 2
