"""Op kinds that only move values: slices, splits, indices, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.ops import ALL, MAP, TOKENS, Args, Op, Picker, Shape, divisors, where, widened, width


class Chunk(Op, ranks=ALL, weight=3):
    """args: parts: equal chunks of the channels, all of them values."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(width(x), (2, 3)))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.choice(divisors(width(shapes[0]), (2, 3))),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], width(shapes[0]) // args[0]),) * args[0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(x, self.args[0], dim=where(self.shapes[0]))


class Split(Op, ranks=ALL, weight=3):
    """args: first size, style: two parts of any sizes."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return width(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(2, width(shapes[0]) - 2), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        x = shapes[0]
        return widened(x, args[0]), widened(x, width(x) - args[0])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        shape, (first, style) = self.shapes[0], self.args
        dim, rest = where(shape), width(shape) - first
        if style == 0:
            return torch.split(x, [first, rest], dim)
        if style == 1:
            return x.narrow(dim, 0, first), x.narrow(dim, first, rest)
        a, b = x.split((first, rest), dim=dim)
        return a, b


class Slice(Op, ranks=ALL, weight=3):
    """args: start, stop, step of the channels."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return width(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        n = width(shapes[0])
        start = pick.integer(0, n // 2)
        return start, pick.integer(start + 2, n), pick.integer(1, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], len(range(*args))),)

    def forward(self, x: Tensor) -> Tensor:
        shape, (start, stop, step) = self.shapes[0], self.args
        end = None if stop == width(shape) else stop
        if len(shape) == TOKENS:
            return x[..., start:end:step]
        return x[:, start:end] if step == 1 else x[:, start:end:step]


class Select(Op, ranks=ALL, weight=3):
    """args: style, channel numbers: a constant index, which may repeat channels."""

    places: Tensor

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        n = width(shapes[0])
        count = pick.integer(2, min(n, 12)) if n > 2 else n
        return (pick.integer(0, 2), *(pick.integer(0, n - 1) for _ in range(count)))

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], len(args) - 1),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.index = list(args[1:])
        self.register_buffer("places", torch.tensor(self.index) if args[0] else None)

    def forward(self, x: Tensor) -> Tensor:
        dim = where(self.shapes[0])
        if self.args[0] == 1:
            return torch.index_select(x, dim, self.places)
        index = self.places if self.args[0] else self.index
        return x[:, index] if dim == 1 else x[:, :, index]


class Flip(Op, ranks=ALL, weight=2):
    """args: dim."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(1, len(shapes[0])),)

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(self.args[0])


class Roll(Op, ranks=ALL, weight=2):
    """args: shift, dim."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 3), pick.integer(1, len(shapes[0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, self.args[0], self.args[1])


class Glu(Op, ranks=ALL, weight=2):
    """args: style."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return width(x) % 2 == 0 and width(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], width(shapes[0]) // 2),)

    def forward(self, x: Tensor) -> Tensor:
        dim = where(self.shapes[0])
        if self.args[0] == 0:
            return F.glu(x, dim=dim) * 1.5
        a, b = x.chunk(2, dim)
        return a * F.gelu(b)


class Pad(Op, ranks=ALL, weight=2):
    """args: before, after: zeros around the channels."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(0, 3), pick.integer(1, 4)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], width(shapes[0]) + sum(args)),)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, *self.args) if len(self.shapes[0]) == MAP else self.args)


class PadSpace(Op, weight=2):
    """args: mode: zeros or reflections around a map, and a slice back to its size, one off."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return min(x[1:]) > 1

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="reflect" if self.args[0] else "constant")[:, :, 2:, :-2]


class ConstantConcat(Op, ranks=ALL, weight=2):
    """args: count, style: channels of zeros or ones are concatenated."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 3), pick.integer(0, 3)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], width(shapes[0]) + args[0]),)

    def forward(self, x: Tensor) -> Tensor:
        count, style = self.args
        size = widened(self.shapes[0], count)
        if style & 1:
            constant = x.new_ones((x.shape[0], *size))
        else:
            constant = torch.zeros((x.shape[0], *size), dtype=x.dtype, device=x.device)
        return torch.cat([constant, x] if style & 2 else [x, constant], where(self.shapes[0]))
