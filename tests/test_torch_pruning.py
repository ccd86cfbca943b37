"""The same coupled sets as Torch-Pruning, on networks that both can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from small import Chain, Multitask, Residual
from torch import nn
from torch_pruning_sets import Partition, coupling_sets, describe_difference, torch_pruning_sets

import fxprune


class Dense(nn.Module):
    """Concatenation, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(14), nn.Conv2d(14, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.c(torch.relu(self.bn(torch.cat([x, self.b(x)], 1))))


class Separable(nn.Module):
    """Depthwise convolution, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up, self.out = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depth(self.expand(x))
        return self.out(x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))))


class Flattened(nn.Module):
    """A linear layer on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc(torch.flatten(self.conv(x), 1))))


SMALL = [Chain(), Multitask(), Dense(), Separable(), Flattened()]
TORCHVISION = ["resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "squeezenet1_1", "mnasnet0_5"]


def free_sets(model: nn.Module, inputs: Any) -> Partition:
    """Return the coupled sets of the channels that may go; Torch-Pruning's leave out what reaches an output."""
    coupling = fxprune.couple(fxprune.trace(model, inputs))
    sites = [
        Kept(
            s.name,
            s.dim,
            torch.where(
                torch.from_numpy((s.channels >= 0) & coupling.is_frozen[s.channels]), -1, torch.from_numpy(s.channels)
            ).numpy(),
        )
        for s in coupling.sites
    ]
    return coupling_sets(sites, model)


class Kept:
    """A site without its frozen channels."""

    def __init__(self, name: str, dim: int, channels: Any) -> None:
        self.name, self.dim, self.channels = name, dim, channels


@pytest.mark.parametrize("model", SMALL, ids=lambda m: type(m).__name__)
def test_small_networks_couple_as_in_torch_pruning(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = free_sets(model.eval(), x), torch_pruning_sets(model.eval(), x)
    assert len(ours) > 5
    assert ours == theirs, describe_difference(ours, theirs)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_couple_as_in_torch_pruning(name: str) -> None:
    model, x = getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 64, 64)
    ours, theirs = free_sets(model, x), torch_pruning_sets(model, x)
    assert len(ours) > 500
    assert ours == theirs, describe_difference(ours, theirs)


def test_the_comparison_sees_a_difference() -> None:
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = free_sets(Residual().eval(), x), torch_pruning_sets(Chain().eval(), x)
    assert describe_difference(ours, theirs)
    assert ours != theirs
