"""A residual network with one trunk and three heads, for `fxprune.examples.scenes`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fxprune.examples.scenes import NUM_CLASSES, NUM_DIGITS


class ConvNormAct(nn.Sequential):
    """A square convolution, batch norm, ReLU: (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        """Build the three layers; the convolution has no bias because the norm has one."""
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut: (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Build the block; the shortcut is a projection where the shape changes."""
        super().__init__()
        self.expand = ConvNormAct(inputs, outputs, stride=stride)
        self.reduce = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Add the block's correction to its input."""
        return torch.relu(self.shortcut(features) + self.reduce(self.expand(features)))


class Merge(nn.Module):
    """Upsample coarse features twofold, concatenate the skipped finer ones, convolve."""

    def __init__(self, coarse: int, fine: int, outputs: int) -> None:
        """Build the convolution: (b, coarse, h, w) and (b, fine, 2h, 2w) -> (b, outputs, 2h, 2w)."""
        super().__init__()
        self.blend = ConvNormAct(coarse + fine, outputs)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Bring both to the finer resolution and blend them."""
        upsampled = interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.blend(torch.cat([upsampled, fine], dim=1))


class SceneNet(nn.Module):
    """A residual encoder and a U-shaped decoder, shared by segmentation, depth and presence."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128), decoder: Sequence[int] = (64, 32, 16)) -> None:
        """Build the network.

        Args:
            widths: channels at full, 1/2, 1/4 and 1/8 of the resolution.
            decoder: channels on the way back, at 1/4, 1/2 and full resolution.
        """
        super().__init__()
        full, half, quarter, eighth = widths
        self.stem = ConvNormAct(1, full)
        self.stage1 = nn.Sequential(ConvNormAct(full, half, stride=2), ResidualBlock(half, half))
        self.stage2 = nn.Sequential(ResidualBlock(half, quarter, stride=2), ResidualBlock(quarter, quarter))
        self.stage3 = nn.Sequential(ResidualBlock(quarter, eighth, stride=2), ResidualBlock(eighth, eighth))
        self.merge2 = Merge(eighth, quarter, decoder[0])
        self.merge1 = Merge(decoder[0], half, decoder[1])
        self.merge0 = Merge(decoder[1], full, decoder[2])
        self.segmentation = nn.Conv2d(decoder[2], NUM_CLASSES, 1)
        self.depth = nn.Conv2d(decoder[2], 1, 1)
        self.presence = nn.Sequential(
            ConvNormAct(eighth, eighth, kernel=1),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(eighth, NUM_DIGITS),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predict all tasks from images (b, 1, h, w), where h and w are multiples of 8.

        Returns:
            `segmentation` logits (b, 11, h, w), `depth` (b, h, w) and `presence` logits (b, 10).
        """
        full = self.stem(images)
        half = self.stage1(full)
        quarter = self.stage2(half)
        eighth = self.stage3(quarter)
        features = self.merge0(self.merge1(self.merge2(eighth, quarter), half), full)
        return {
            "segmentation": self.segmentation(features),
            "depth": self.depth(features).squeeze(1),
            "presence": self.presence(eighth),
        }
