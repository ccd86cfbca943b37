"""Op kinds without parameters that compute: activations, pooling, reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import ALL, MAP, TOKENS, VECTOR, Args, Op, Picker, Shape, divisors, rows

MODULES: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.ELU, nn.ReLU6)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.gelu,
    F.hardswish,
    F.softplus,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: x.relu(),
    lambda x: x.tanh(),
    lambda x: x * torch.sigmoid(x),
    lambda x: x.clamp(-2.0, 2.0),
    lambda x: torch.exp(-x.abs()) + 0.5,
    lambda x: (x * x + 1).sqrt(),
    lambda x: 1.5 - 0.5 * x,
    lambda x: -x / 2 + 0.25,
    lambda x: torch.where(x > 0, x, 0.1 * x),
)


class Activation(Op, ranks=ALL, weight=4):
    """args: a place in the table above, the modules first."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, len(MODULES) + len(FUNCTIONS) - 1),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        if args[0] < len(MODULES):
            self.act = MODULES[args[0]]()

    def forward(self, x: Tensor) -> Tensor:
        i = self.args[0]
        return self.act(x) if i < len(MODULES) else FUNCTIONS[i - len(MODULES)](x)


class Softmax(Op, ranks=ALL, weight=2):
    """args: style, scaled so that values keep their size: over the channels, or over the positions."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] > 1 and (len(x) == VECTOR or x[-1] > 1)

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.shapes[0]) == VECTOR:
            return torch.softmax(x, -1) * 4.0
        if len(self.shapes[0]) == TOKENS:
            return F.softmax(x, dim=2 if self.args[0] else 1) * 4.0
        if self.args[0]:
            return F.softmax(x, dim=1) * 4.0
        return x.flatten(2).softmax(-1).reshape(x.shape) * 4.0


class Pool(Op, weight=3):
    """args: style: six ways to pool space."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[1] % 2 == 0 and x[2] % 2 == 0

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 5),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        c, h, w = shapes[0]
        return ((c, h, w) if args[0] in (2, 3) else (c, h // 2, w // 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        size = (shapes[0][1] // 2, shapes[0][2] // 2)
        makers = (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1))
        self.pool = makers[args[0]] if args[0] < 4 else None if args[0] == 5 else nn.AdaptiveAvgPool2d(size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, self.size) if self.pool is None else self.pool(x)


class GlobalPool(Op, ranks=(MAP, TOKENS), weight=8, head=True):
    """args: style: a vector per map, from its positions; per token sequence, from its tokens."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 4),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0] if len(shapes[0]) == MAP else shapes[0][1],),)

    def forward(self, x: Tensor) -> Tensor:
        style = self.args[0]
        if len(self.shapes[0]) == TOKENS:
            return (x.mean(1), x[:, 0], x.amax(1), torch.sum(x, dim=1) / 4, x.select(1, -1))[style]
        if style < 2:
            return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1) if style else x.mean((2, 3))
        return (x.amax(dim=(2, 3)), x.flatten(2).mean(-1), x.mean(3).mean(2) * 2)[style - 2]


class ChannelStatistic(Op, ranks=ALL, weight=2):
    """args: style: values combined with a statistic over the channels."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return (x[0] if len(x) == MAP else x[-1]) > 2

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 4),)

    def forward(self, x: Tensor) -> Tensor:
        dim, style = 1 if len(self.shapes[0]) == MAP else -1, self.args[0]
        if style == 0:
            return F.relu(x - x.mean(dim, keepdim=True))
        if style == 1:
            return x * torch.sigmoid(x.mean(dim, keepdim=True))
        if style == 2:
            return x + x.amax(dim=dim, keepdim=True)
        if style == 3:
            return F.normalize(x, dim=dim, eps=0.1) * 3
        return x / (x.abs().sum(dim, keepdim=True) + 0.5) * 4


class Upsample(Op, weight=3):
    """args: style."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return max(x[1:]) <= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 3),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], shapes[0][1] * 2, shapes[0][2] * 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear" if args[0] == 1 else "nearest")

    def forward(self, x: Tensor) -> Tensor:
        if self.args[0] < 2:
            return self.up(x)
        if self.args[0] == 2:
            return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2))


class Dropout(Op, ranks=ALL):
    """args: style: plain, or whole channels."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.drop = nn.Dropout2d(0.3) if args[0] == 1 and len(shapes[0]) == MAP else nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, self.training) if self.args[0] == 2 else self.drop(x)


class RowStatistic(Op, ranks=(MAP, VECTOR), weight=2):
    """args: groups, reshape style, style: rows of channels, and a statistic inside or between them."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][0])), pick.integer(0, 3), pick.integer(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        groups, reshape, style = self.args
        y = rows(x, self.shapes[0], groups, reshape)
        if style == 0:
            y = F.elu(y - y.mean(2, keepdim=True))
        elif style == 1:
            y = y.softmax(2) * 3
        elif style == 2:
            y = y * torch.sigmoid(y.mean(1, keepdim=True))
        else:
            y = y.softmax(dim=1) * 2
        return y.flatten(1, 2)
