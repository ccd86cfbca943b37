"""Op kinds that lay values out anew: shuffles, flattens, rows, tokens and maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, VECTOR, Args, Op, Picker, Shape, area, divisors, rows, widened, width


class Shuffle(Op, ranks=(MAP, VECTOR), weight=3):
    """args: groups, reshape style: the channel shuffle of ShuffleNet."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][0])), pick.integer(0, 3), pick.integer(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = rows(x, self.shapes[0], *self.args[:2]).transpose(1, 2)
        return y.flatten(1, 2) if self.args[2] else y.reshape(x.shape[0], -1, *self.shapes[0][1:])


class PixelShuffle(Op, weight=2):
    """args: inverse: channels to space, or space to channels."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] % 4 == 0 or (x[1] % 2 == 0 and x[2] % 2 == 0)

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        c, h, w = shapes[0]
        choices = [0] * (c % 4 == 0 and c >= 8) + [1] * (h % 2 == 0 and w % 2 == 0 and c <= 8)
        return (pick.choice(choices or [int(c % 4 != 0)]),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        c, h, w = shapes[0]
        return ((4 * c, h // 2, w // 2) if args[0] else (c // 4, h * 2, w * 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.shuffle = nn.PixelUnshuffle(2) if args[0] else nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(x)


class ToTokens(Op, weight=12):
    """args: style: positions of a map as tokens."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((area(shapes[0]), shapes[0][0]),)

    def forward(self, x: Tensor) -> Tensor:
        if self.args[0] == 0:
            return x.flatten(2).transpose(1, 2)
        y = x.permute(0, 2, 3, 1)
        return y.flatten(1, 2) if self.args[0] == 1 else y.reshape(x.shape[0], -1, x.shape[1])


class ToMap(Op, ranks=(TOKENS,), weight=8):
    """args: height, style: tokens laid out in space."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] >= 4 and x[0] % 2 == 0

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice([h for h in (2, 4, 8) if shapes[0][0] % h == 0]), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        n, c = shapes[0]
        return ((c, args[0], n // args[0]),)

    def forward(self, x: Tensor) -> Tensor:
        (n, c), (h, style) = self.shapes[0], self.args
        if style:
            return x.reshape(-1, h, n // h, c).permute(0, 3, 1, 2)
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], h, n // h)


class Flatten(Op, ranks=(MAP, TOKENS), weight=5):
    """args: style: all of a small value as one vector."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0] * shapes[0][1] * (shapes[0][2] if len(shapes[0]) == MAP else 1),),)

    def forward(self, x: Tensor) -> Tensor:
        if self.args[0] == 0:
            return torch.flatten(x, 1)
        return x.reshape(x.size(0), -1) if self.args[0] == 1 else x.transpose(1, -1).flatten(1)


class VectorToTokens(Op, ranks=(VECTOR,), weight=7):
    """args: rows, reshape style."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][0])), pick.integer(0, 3)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[0], shapes[0][0] // args[0]),)

    def forward(self, x: Tensor) -> Tensor:
        return rows(x, self.shapes[0], *self.args)


class VectorToMap(Op, ranks=(VECTOR,), weight=5):
    """args: style: a vector spread unevenly over space, or its parts laid out in space."""

    ramp: Tensor

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, int(shapes[0][0] % 4 == 0 and shapes[0][0] > 4)),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        c = shapes[0][0]
        return ((c // 4, 2, 2) if args[0] else (c, 4, 4),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        if not args[0]:
            self.register_buffer("ramp", torch.empty(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.args[0]:
            return x.reshape(x.shape[0], -1, 2, 2)
        return x[:, :, None, None] * self.ramp


class Transpose(Op, ranks=(MAP, TOKENS), weight=2):
    """Height and width, or tokens and channels, change places."""

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        x = shapes[0]
        return ((*x[:-2], x[-1], x[-2]),)

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


class Repeat(Op, ranks=(MAP, VECTOR), weight=2):
    """args: style: every channel twice, one after the other or all again."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], width(shapes[0]) * 2),)

    def forward(self, x: Tensor) -> Tensor:
        ones = (1,) * (len(self.shapes[0]) - 1)
        if self.args[0] == 0:
            return x.repeat(1, 2, *ones)
        if self.args[0] == 1:
            return x.repeat_interleave(2, dim=1)
        return x.unsqueeze(2).expand(-1, -1, 2, *self.shapes[0][1:]).flatten(1, 2)
