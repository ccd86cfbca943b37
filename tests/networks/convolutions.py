"""Op kinds that convolve, as modules and with functional weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, WIDTHS, Args, Op, Picker, Shape, divisors, shaped


class Conv2d(Op, weight=6, head=True, shared=True):
    """args: out, kernel, stride, bias."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.choice((1, 3)), 1 + (pick.integer(0, 3) == 3), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], *args[:3])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, kernel, stride, bias = args
        self.conv = nn.Conv2d(shapes[0][0], out, kernel, stride, kernel // 2, bias=bool(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GroupedConv(Op, weight=6, shared=True):
    """args: out, kernel, stride, groups, bias; more than one channel per group on both sides."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        groups = pick.choice(divisors(shapes[0][0]))
        return groups * pick.choice((2, 3, 4, 6)), pick.choice((1, 3)), 1, groups, pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], *args[:3])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, kernel, stride, groups, bias = args
        self.conv = nn.Conv2d(shapes[0][0], out, kernel, stride, kernel // 2, groups=groups, bias=bool(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DepthwiseConv(Op, weight=3, shared=True):
    """args: multiplier, kernel, stride, bias."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 2), pick.choice((1, 3)), 1 + (pick.integer(0, 3) == 3), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], shapes[0][0] * args[0], *args[1:3])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        multiplier, kernel, stride, bias = args
        c = shapes[0][0]
        self.conv = nn.Conv2d(c, c * multiplier, kernel, stride, kernel // 2, groups=c, bias=bool(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class RegroupedConvs(Op, weight=3):
    """args: middle, out, first groups, second groups: two grouped convolutions in a row."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        first = pick.choice(divisors(shapes[0][0]))
        middle = pick.choice((12, 24))
        second = pick.choice(divisors(middle))
        return middle, second * pick.choice((2, 3, 4)), first, second

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], args[1])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        middle, out, first, second = args
        self.first = nn.Conv2d(shapes[0][0], middle, 1, groups=first)
        self.second = nn.Conv2d(middle, out, 3, padding=1, groups=second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class TransposedConv(Op, weight=3, shared=True):
    """args: out, stride, groups, bias."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        groups = pick.choice([1, *divisors(shapes[0][0])])
        return groups * pick.choice((2, 4, 6)), pick.integer(1, 2), groups, pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[0], shapes[0][1] * args[1], shapes[0][2] * args[1]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, stride, groups, bias = args
        kernel, padding = ((3, 1), (2, 0))[stride - 1]
        self.conv = nn.ConvTranspose2d(shapes[0][0], out, kernel, stride, padding, groups=groups, bias=bool(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Conv1d(Op, ranks=(MAP, TOKENS), weight=2):
    """args: out, style: over the flattened space of a map, or along tokens."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        x = shapes[0]
        return ((args[0], *x[1:]) if len(x) == MAP else (x[0], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        channels = shapes[0][0] if len(shapes[0]) == MAP else shapes[0][1]
        self.conv = nn.Conv1d(channels, args[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.shapes[0]) == TOKENS:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        y = self.conv(x.flatten(2))
        return y.unflatten(2, self.shapes[0][1:]) if self.args[1] else y.reshape(y.shape[0], -1, x.shape[2], x.size(3))


class Conv3d(Op, weight=2):
    """args: out, depth: 1 adds a depth of one, 2 makes it out of the channels."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] % 2 == 0

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((4, 6, 8)), pick.integer(1, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], args[0] * args[1])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, depth = args
        self.conv = nn.Conv3d(shapes[0][0] // depth, out, (2 * depth - 1, 3, 3), padding=(depth - 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.args[1] == 1:
            return self.conv(x.unsqueeze(2)).squeeze(2)
        return self.conv(x.unflatten(1, (-1, 2))).flatten(1, 2)


class FunctionalConv(Op, weight=2):
    """args: out, kernel, groups."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        groups = pick.choice([1, *divisors(shapes[0][0])])
        return groups * pick.choice((2, 4, 6)), pick.choice((1, 3)), groups

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], args[0])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, kernel, groups = args
        self.weight_ = nn.Parameter(torch.empty(out, shapes[0][0] // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight_, self.bias, padding=self.args[1] // 2, groups=self.args[2])
