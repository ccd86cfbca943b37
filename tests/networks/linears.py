"""Op kinds with linear layers, learned or constant tensors, and tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, VECTOR, WIDTHS, Args, Op, Picker, Shape, area, divisors, rows, shaped


class Linear(Op, ranks=(VECTOR, TOKENS), weight=6, head=True, shared=True):
    """args: out, bias."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.linear = nn.Linear(shapes[0][-1], args[0], bias=bool(args[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LinearOnMap(Op, weight=2, shared=True):
    """args: out: channels last, a linear layer, channels first again."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.choice(WIDTHS),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return shaped(shapes[0], args[0])

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.linear = nn.Linear(shapes[0][0], args[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FlattenLinear(Op, weight=4, head=True):
    """args: out, style: five ways to flatten a map, two of them channels last."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 4)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[0],),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(shapes[0][0] * area(shapes[0]), args[0])

    def forward(self, x: Tensor) -> Tensor:
        style = self.args[1]
        if style == 1:
            return self.linear(x.permute(0, 2, 3, 1).flatten(1))
        if style == 2:
            return self.linear(x.permute(0, 2, 3, 1).reshape(x.size(0), -1))
        if style == 3:
            return self.linear(x.contiguous().view(-1, self.linear.in_features))
        return self.linear(x.flatten(2).flatten(1) if style == 4 else self.flatten(x))


class TiedLinear(Op, ranks=(VECTOR, TOKENS), arity=2, weight=3):
    """args: out, style: two linear layers with one weight, added, or an autoencoder with W and its transpose."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], shapes[0][-1] if args[1] else args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.first = nn.Linear(shapes[0][-1], args[0])
        if not args[1]:
            self.second = nn.Linear(shapes[0][-1], args[0])
            self.second.weight = self.first.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.args[1]:
            return F.linear(torch.tanh(self.first(x)), self.first.weight.t()) + y
        return torch.tanh(self.first(x)) + self.second(y)


class FunctionalLinear(Op, ranks=(VECTOR, TOKENS), weight=3, shared=True):
    """args: out, style."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        size = (shapes[0][-1], args[0]) if args[1] == 1 else (args[0], shapes[0][-1])
        self.matrix = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(args[0])) if args[1] < 2 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.args[1] == 0:
            return F.linear(x, self.matrix, self.bias)
        return torch.einsum("...c,oc->...o", x, self.matrix) if self.bias is None else x @ self.matrix + self.bias


class Scale(Op, ranks=(MAP, VECTOR, TOKENS), weight=2):
    """args: style: a learned scale, a scale and an offset, or one number, on the channels."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 2),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        x = shapes[0]
        size = () if args[0] == 2 else (x[0], 1, 1) if len(x) == MAP else (x[-1],)
        self.scale = nn.Parameter(torch.empty(size))
        if args[0] == 1:
            self.offset_bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset_bias if self.args[0] == 1 else self.scale * x


class BufferMix(Op, ranks=(MAP, VECTOR, TOKENS), weight=2):
    """args: style: a constant buffer added or multiplied, as one number per channel or of the whole shape."""

    scale: Tensor

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 3),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        x = shapes[0]
        size = x if args[0] & 1 else (1, x[0], 1, 1) if len(x) == MAP else (x[-1],)
        self.register_buffer("scale", torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.args[0] & 2 else x + self.scale


class Embedding(Op, ranks=(TOKENS, VECTOR, MAP), weight=2):
    """args: style: a table looked up at constant positions (arange, or an integer buffer) and added."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 1),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        x = shapes[0]
        self.count, channels = (area(x), x[0]) if len(x) == MAP else (x[0] if len(x) == TOKENS else 1, x[-1])
        self.table = nn.Embedding(self.count + 1, channels)
        if args[0]:
            self.register_buffer("positions", torch.arange(self.count).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        rows_ = self.table(self.positions if self.args[0] else torch.arange(self.count, device=x.device))
        if len(self.shapes[0]) == MAP:
            return x + rows_.t().reshape(1, -1, *self.shapes[0][1:])
        return x + rows_


class ClassToken(Op, ranks=(TOKENS,), weight=4):
    """A learned token before the others."""

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0] + 1, shapes[0][1]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.token = nn.Parameter(torch.empty(1, 1, shapes[0][1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)


class RowScale(Op, weight=2):
    """args: groups, style: rows of channels, each scaled by a learned number of its own or by one per place."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[0]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][0])), pick.integer(0, 3), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        groups = args[0]
        self.scale = nn.Parameter(torch.empty((1, shapes[0][0] // groups, 1, 1) if args[2] else (groups, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return (rows(x, self.shapes[0], *self.args[:2]) * self.scale).flatten(1, 2)
