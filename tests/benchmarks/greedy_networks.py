"""The deeper and wider networks of the benchmark of greedy pruning, as narrow as training on one core asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from quality_networks import CLASSES
from quality_problems import Problem, problems
from torch import Tensor, nn

from fxprune.examples.networks import ConvNormAct, ResidualBlock


class ResNet56(nn.Sequential):
    """ResNet-56 for images (b, 1, 32, 32), which it halves at once: 3 stages of 9 residual blocks."""

    def __init__(self) -> None:
        """Build the network; logits are (b, 10)."""
        layers: list[nn.Module] = [ConvNormAct(1, 16, stride=2)]
        inputs = 16
        for width in (16, 32, 64):
            for _ in range(9):
                layers.append(ResidualBlock(inputs, width, stride=1 if width in (inputs, 16) else 2))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class VGG16(nn.Sequential):
    """The 13 convolutions of VGG-16 with batch norms, and two linear layers, a quarter as wide: images (b, 1, 32, 32).

    As usual for images so small, the two wide linear layers are one narrow one.
    """

    STAGES = ((16, 2), (32, 2), (64, 3), (128, 3), (128, 3))

    def __init__(self) -> None:
        """Build the network; logits are (b, 10)."""
        layers: list[nn.Module] = []
        inputs = 1
        for width, count in self.STAGES:
            for _ in range(count):
                layers.append(ConvNormAct(inputs, width))
                inputs = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, CLASSES))


class GroupedBottleneck(nn.Module):
    """A 1x1, a grouped 3x3 and a 1x1 convolution around a shortcut: the block of ResNeXt."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int = 1) -> None:
        """Build the block: (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        super().__init__()
        self.reduce = ConvNormAct(inputs, outputs, kernel=1)
        grouped = nn.Conv2d(outputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
        self.filter = nn.Sequential(grouped, nn.BatchNorm2d(outputs), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Add the block's correction to its input."""
        return (self.shortcut(features) + self.expand(self.filter(self.reduce(features)))).relu()


class ResNeXt20(nn.Sequential):
    """ResNeXt-20 for images (b, 1, 32, 32), which it halves at once: 3 stages of 2 blocks, of 8 groups each.

    It is wide for what it is to learn, as the ResNeXt of the paper is for CIFAR-10: of that, most can go.
    """

    WIDTHS = (128, 256, 512)
    GROUPS = 8

    def __init__(self) -> None:
        """Build the network; logits are (b, 10)."""
        inputs = self.WIDTHS[0]
        layers: list[nn.Module] = [ConvNormAct(1, inputs, stride=2)]
        for width in self.WIDTHS:
            for _ in range(2):
                stride = 1 if width in (inputs, self.WIDTHS[0]) else 2
                layers.append(GroupedBottleneck(inputs, width, self.GROUPS, stride))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


OTHERS: dict[str, Callable[[], nn.Module]] = {"resnet56": ResNet56, "vgg16": VGG16, "resnext20": ResNeXt20}
NETWORKS = ("resnet20", "mobilenetv2", "vgg", "scenes", "two-heads", *OTHERS)


def greedy_problems(*, quick: bool) -> dict[str, Problem]:
    """Return the problems of all networks: those of the quality benchmark as they are, the others on its digits."""
    known = problems(quick=quick)
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # kept weights are those of this file
    others = {name: replace(known["resnet20"], name=f"{name}_{digest}", build=build) for name, build in OTHERS.items()}
    return {name: others.get(name) or known[name] for name in NETWORKS}
