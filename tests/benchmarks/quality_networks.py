"""The networks of the quality benchmark, small enough to be trained in about a minute on one core."""

from __future__ import annotations

from torch import Tensor, nn

from fxprune.examples.networks import ConvNormAct, ResidualBlock

CLASSES = 10


class ResNet20(nn.Sequential):
    """ResNet-20 for images (b, channels, 32, 32), which it halves at once: 3 stages of 3 residual blocks."""

    def __init__(self, channels: int = 1) -> None:
        """Build the network; logits are (b, 10)."""
        layers: list[nn.Module] = [ConvNormAct(channels, 16, stride=2)]
        inputs = 16
        for width in (16, 32, 64):
            for _ in range(3):
                layers.append(ResidualBlock(inputs, width, stride=1 if width in (inputs, 16) else 2))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter depthwise with 3x3, project with 1x1; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        """Build the block: (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNormAct(inputs, hidden, kernel=1)
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.filter = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """Add the projection to the input where shapes agree."""
        projected = self.project(self.filter(self.expand(features)))
        return features + projected if self.keeps_shape else projected


class MobileNetV2(nn.Sequential):
    """A small MobileNetV2 for images (b, channels, 32, 32)."""

    BLOCKS = ((16, 1, 1), (24, 4, 2), (24, 4, 1), (40, 4, 2), (40, 4, 1), (40, 4, 1), (64, 4, 1), (64, 4, 1))

    def __init__(self, channels: int = 1) -> None:
        """Build the network; logits are (b, 10)."""
        layers: list[nn.Module] = [ConvNormAct(channels, 16, stride=2)]
        inputs = 16
        for outputs, expansion, stride in self.BLOCKS:
            layers.append(InvertedResidual(inputs, outputs, expansion, stride))
            inputs = outputs
        layers += [ConvNormAct(inputs, 160, kernel=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, CLASSES)]
        super().__init__(*layers)


class VGG(nn.Sequential):
    """Pairs of convolutions and pooling for images (b, channels, 32, 32), then a hidden linear layer, as in VGG."""

    def __init__(self, channels: int = 1) -> None:
        """Build the network; logits are (b, 10)."""
        layers: list[nn.Module] = []
        inputs = channels
        for width in (16, 32, 64):
            layers += [ConvNormAct(inputs, width), ConvNormAct(width, width), nn.MaxPool2d(2)]
            inputs = width
        layers += [nn.Flatten(), nn.Linear(inputs * 16, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
        super().__init__(*layers)


class TwoHeads(nn.Module):
    """A narrow trunk for images (b, 1, 32, 32), and two heads that compete for it."""

    def __init__(self) -> None:
        """Build the trunk and the heads: `digit` logits (b, 10) and `grating` (b, 2)."""
        super().__init__()
        self.trunk = nn.Sequential(
            ConvNormAct(1, 16, stride=2),
            ResidualBlock(16, 16),
            ResidualBlock(16, 32, stride=2),
            ResidualBlock(32, 32),
            ResidualBlock(32, 48, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.digit = nn.Linear(48, CLASSES)
        self.grating = nn.Linear(48, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answer both questions about an image."""
        features = self.trunk(images)
        return {"digit": self.digit(features), "grating": self.grating(features)}
