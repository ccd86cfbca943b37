"""Op kinds whose Python asks for sizes: branches, loops, and sizes that become values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import ALL, MAP, TOKENS, VECTOR, Args, Op, Picker, Shape, area, where, width


class SizeBranch(Op, ranks=ALL, weight=4):
    """args: style: what is done depends on a size, of space or of the channels."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 4),)

    def forward(self, x: Tensor) -> Tensor:
        style, dim = self.args[0], where(self.shapes[0])
        if style == 0:
            if x.shape[-1] % 2:
                return torch.relu(x)
            return x + 0.5
        if style == 1:
            return x * 0.5 if x.size(dim) > 6 else x.sigmoid()
        if style == 2:
            b, *rest = x.shape
            return x.reshape(b, *rest) if len(rest) == 1 else x.flatten(1).reshape(b, *rest)
        if style == 3:
            extra = -x.shape[-1] % 4
            return F.pad(x, (0, extra))[..., : x.shape[-1]] if extra > 0 else x.flip(-1)
        assert x.dim() == len(self.shapes[0]) + 1
        assert x.shape[dim] == width(self.shapes[0])
        return x.clamp(min=-1.0)


class SizeLoop(Op, ranks=ALL, weight=3):
    """args: style: a loop over as many parts as the channels have."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return width(x) % 4 == 0 and width(x) <= 24

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 3),)

    def forward(self, x: Tensor) -> Tensor:
        style, dim = self.args[0], where(self.shapes[0])
        if style == 0:
            parts = [x.narrow(dim, 4 * i, 4) * (1 + i) for i in range(x.shape[dim] // 4)]
            return torch.cat(parts, dim=dim)
        if style == 1:
            for i in range(x.shape[dim] // 4):
                x = x + 0.1 * i
            return x
        if style == 2:
            parts = list(x.split(4, dim))
            for i in range(1, len(parts)):
                parts[i] = parts[i] + parts[i - 1]
            return torch.cat(parts, dim)
        rows = [t.tanh() for t in x.unbind(1)]
        return torch.stack(rows[::-1], dim=1)


class SizeValue(Op, ranks=ALL, weight=4):
    """args: style: a size of the channels or of space is a factor, a divisor or an exponent."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 5),)

    def forward(self, x: Tensor) -> Tensor:
        style, dim = self.args[0], where(self.shapes[0])
        if style == 0:
            return x * x.shape[dim] ** -0.5
        if style == 1:
            return x - x.sum(dim, keepdim=True) / x.shape[dim]
        if style == 2:
            return x + torch.log(torch.tensor(float(width(self.shapes[0])))) / math.sqrt(x.size(dim))
        if style == 3:
            centred = x - x.sum(dim, keepdim=True) / x.size(dim)
            return centred / ((centred**2).sum(dim, keepdim=True) / (x.size(dim) - 1) + 0.1).sqrt()
        if style == 4:
            return x / (1 + x.flatten(1).pow(2).sum(1) / x[0].numel()).sqrt().view(-1, *[1] * len(self.shapes[0]))
        total = math.prod(x.shape[1:])
        return x * (1 + 1 / total) + x.shape[dim] / 10


class HandwrittenPool(Op, ranks=(MAP, TOKENS), weight=3):
    """args: style: a mean over space or tokens with its divisor written out."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((width(shapes[0]),),)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.shapes[0]) == TOKENS:
            return x.sum(1) / x.shape[1] if self.args[0] else x.sum(dim=1).div(len(x[0]))
        b, c, h, w = x.shape
        if self.args[0] == 0:
            return x.sum((2, 3)) / (h * w)
        if self.args[0] == 1:
            return x.contiguous().view(b, c, h * w).sum(2) / x[0, 0].numel()
        return x.reshape(b, -1).reshape(b, c, -1).sum(-1) * (1.0 / area(self.shapes[0]))


class DividingLinear(Op, ranks=(VECTOR, TOKENS), weight=2):
    """args: style: a layer of one's own that divides by the width of what it reads, as muP does."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((6, 8)), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.matrix = nn.Parameter(torch.empty(args[0], shapes[0][-1]))

    def forward(self, x: Tensor) -> Tensor:
        if self.args[1] == 0:
            return F.linear(x, self.matrix / self.matrix.shape[1] ** 0.5) * 2
        if self.args[1] == 1:
            return F.linear(x, self.matrix) * (3 / self.matrix.size(1))
        return x @ self.matrix.t() * (x.shape[-1] / self.matrix.shape[0])
