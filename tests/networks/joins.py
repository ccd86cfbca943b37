"""Op kinds that join values: sums, gates, concatenations, products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import ALL, MAP, TOKENS, VECTOR, Args, Op, Picker, Shape, area


class Add(Op, ranks=ALL, arity=2, weight=6):
    """args: style."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (lambda: x + y, lambda: torch.add(x, y, alpha=0.5), lambda: x.add(y).mul(0.7))[self.args[0]]()


class Combine(Op, ranks=ALL, arity=2, weight=3):
    """args: style: pointwise joins other than a sum."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 5),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        style = self.args[0]
        if style < 2:
            return x * torch.sigmoid(y) if style else 1.25 * x - y
        if style < 4:
            return x * y if style == 2 else torch.maximum(x, y)
        return torch.lerp(x, y, 0.25) if style == 4 else x / (1 + y.abs())


class GateByVector(Op, arity=2, weight=5):
    """args: style: a vector, projected if it is of another width, gates the channels of a map or is added to them."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == VECTOR

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (channels, *_), (size,) = shapes
        self.project = nn.Identity() if size == channels else nn.Linear(size, channels)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        gate = self.project(vector)
        if self.args[0]:
            return x + gate.unsqueeze(-1).unsqueeze(-1).expand_as(x)
        return x * gate.sigmoid()[:, :, None, None]


class Concat(Op, ranks=ALL, arity=2, weight=5):
    """args: dim."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(x) == len(other) and (x[1:] == other[1:] or x[:-1] == other[:-1])

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        x = shapes[0]
        dims = [d for d in range(len(x)) if all(x[:d] == y[:d] and x[d + 1 :] == y[d + 1 :] for y in shapes)]
        return (pick.choice(dims) if pick.integer(0, 2) == 2 else dims[0],)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        d = args[0]
        return ((*shapes[0][:d], sum(x[d] for x in shapes), *shapes[0][d + 1 :]),)

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.args[0] + 1)


class ConcatThree(Concat, ranks=ALL, arity=3, weight=2):
    """Three values on the channel dim."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(x) == len(other) and x[1:] == other[1:]

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (0,)


class StackReduce(Op, ranks=ALL, arity=2, weight=2):
    """args: style: values stacked on a new dim, which is then reduced."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.args[0] == 0:
            return torch.stack([x, y], 1).sum(1)
        return torch.stack((x, y), -1).amax(-1) if self.args[0] == 1 else torch.stack([x, y]).mean(0)


class Matmul(Op, ranks=(TOKENS,), arity=2, weight=10):
    """args: style: (N, C) x (M, C) -> (N, M), or over the tokens (N, C) x (N, D) -> (C, D)."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == TOKENS and (x[1] == other[1] or x[0] == other[0])

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        x, y = shapes
        over_tokens = x[0] == y[0] and (x[1] != y[1] or pick.boolean())
        return int(over_tokens), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        x, y = shapes
        return ((x[1], y[1]) if args[0] else (x[0], y[0]),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        over_tokens, style = self.args
        scale = self.shapes[0][0 if over_tokens else 1] ** -0.5
        if style == 2:
            return torch.einsum("bnc,bnd->bcd" if over_tokens else "bnc,bmc->bnm", x, y) * scale
        x, y = (x.transpose(1, 2), y) if over_tokens else (x, y.transpose(-2, -1))
        return (torch.bmm(x, y) if style else x @ y) * scale


class Gram(Op, weight=3):
    """args: style: products between the channels of a map, or between its positions."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        n = area(shapes[0]) if args[0] == 2 else shapes[0][0]
        return ((n, n),)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        if self.args[0] == 1:
            return torch.einsum("bchw,bdhw->bcd", x, x) / area(self.shapes[0])
        if self.args[0] == 2:
            return flat.transpose(1, 2) @ flat / self.shapes[0][0]
        return flat.bmm(flat.transpose(1, 2)) / area(self.shapes[0])


class PadAdd(Op, arity=2, weight=4):
    """The wider of two maps plus the narrower one, padded by zero channels: ResNet's parameter-free shortcut."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == MAP and x[1:] == other[1:] and x[0] > other[0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.pad(y, (0, 0, 0, 0, 0, self.shapes[0][0] - self.shapes[1][0]))
