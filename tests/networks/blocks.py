"""Op kinds that normalise, and small blocks as real networks have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, VECTOR, WIDTHS, Args, Op, Picker, Shape, area, divisors, shaped


class BatchNorm(Op, ranks=(MAP, VECTOR), weight=4, shared=True):
    """args: plain (no affine part)."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (int(pick.integer(0, 3) == 3),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        make = nn.BatchNorm2d if len(shapes[0]) == MAP else nn.BatchNorm1d
        self.norm = make(shapes[0][0], affine=not args[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class GroupNorm(Op, weight=3, shared=True):
    """args: groups, from one to a group per channel."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return area(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.choice([1, *divisors(shapes[0][0]), shapes[0][0]]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.norm = nn.GroupNorm(args[0], shapes[0][0])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InstanceNorm(Op, weight=2):
    """args: affine, running statistics; with the activation that usually follows, so that its mean says something."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return area(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(0, 1), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.norm = nn.InstanceNorm2d(shapes[0][0], affine=bool(args[0]), track_running_stats=bool(args[1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(x), 0.2)


class LayerNorm(Op, ranks=(TOKENS, VECTOR, MAP), weight=3, shared=True):
    """args: style: module, function, or plain with an activation; on the channels, channels last for maps."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return (x[0] if len(x) == MAP else x[-1]) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        channels = shapes[0][0] if len(shapes[0]) == MAP else shapes[0][-1]
        if args[0] == 1:
            self.scale, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        else:
            self.norm = nn.LayerNorm(channels, elementwise_affine=args[0] == 0)

    def normalise(self, x: Tensor) -> Tensor:
        if self.args[0] == 1:
            return F.layer_norm(x, (x.shape[-1],), self.scale, self.bias)
        return F.gelu(self.norm(x)) if self.args[0] == 2 else self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.shapes[0]) == MAP:
            return self.normalise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.normalise(x)


class RmsNorm(Op, ranks=(TOKENS, VECTOR), weight=3):
    """args: style: module, or written out."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        if args[0]:
            self.scale = nn.Parameter(torch.empty(shapes[0][-1]))
        else:
            self.norm = nn.RMSNorm(shapes[0][-1], eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if self.args[0]:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
        return self.norm(x)


class Prelu(Op, ranks=(MAP, VECTOR), weight=2, shared=True):
    """args: shared (one slope for all channels)."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (int(pick.integer(0, 3) == 3),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.prelu = nn.PReLU(1 if args[0] else shapes[0][0])

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x)


class ConvBlock(Op, weight=4, shared=True):
    """args: out, kernel: convolution, batch norm, in-place relu in one `Sequential`."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.choice((1, 3))

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], args[0])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        conv = nn.Conv2d(shapes[0][0], args[0], args[1], padding=args[1] // 2, bias=False)
        self.block = nn.Sequential(conv, nn.BatchNorm2d(args[0]), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualBlock(Op, weight=3, shared=True):
    """args: middle, groups: a residual block with an in-place add; `groups` 0 means depthwise."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        middle = pick.choice((4, 8, 12, 24))
        return middle, pick.choice((1, 0, 2, 4) if middle > 4 else (1, 0, 2))

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        middle, groups = args
        self.conv1 = nn.Conv2d(shapes[0][0], middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, groups=groups or middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, shapes[0][0], 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True))
        y += x
        return self.relu(y)


class ShortcutAdd(Op, arity=2, weight=4):
    """args: kernel: the second map is projected onto the channels of the first and added."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return x[1:] == other[1:] and len(other) == MAP

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.choice((1, 3)),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.project = nn.Conv2d(shapes[1][0], shapes[0][0], args[0], padding=args[0] // 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.project(y)


class SqueezeExcite(Op, weight=3, shared=True):
    """args: middle, style: convolutions or linear layers, sigmoid or hardsigmoid."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((4, 6)), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        c, (middle, style) = shapes[0][0], args
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Linear(c, middle) if style else nn.Conv2d(c, middle, 1)
        self.widen = nn.Linear(middle, c) if style else nn.Conv2d(middle, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.args[1]:
            return x * torch.sigmoid(self.widen(F.silu(self.reduce(self.pool(x)))))
        gate = F.hardsigmoid(self.widen(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class SpatialGate(Op, weight=2):
    """A gate per position, from the mean and the maximum over the channels."""

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * self.conv(pooled).sigmoid()


class SplitBlock(Op, weight=2):
    """args: middle: half of the channels is processed, and all parts are concatenated, as in YOLO's C2f."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] % 2 == 0

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.choice((4, 6)),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], shapes[0][0] + args[0])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.conv = nn.Conv2d(shapes[0][0] // 2, args[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([first, second, F.silu(self.conv(second))], 1)
