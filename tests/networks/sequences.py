"""Op kinds with recurrent layers and cells, over tokens or the rows of a map."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, Args, Op, Picker, Shape

HIDDEN = (4, 6, 8)
LONGEST = 16  # tokens of a sequence
LAYERS: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)


def drawn_layer(pick: Picker) -> Args:
    """Draw what `layer_of` takes: kind, hidden, layers, both directions, projected to, bias."""
    kind, hidden = pick.integer(0, 2), pick.choice(HIDDEN)
    projected = pick.choice((0, 0, 3)) if kind == 0 else 0
    return kind, hidden, pick.integer(1, 2), pick.integer(0, 1), projected, int(pick.integer(0, 3) < 3)


def layer_of(inputs: int, args: Args, *, batch_first: bool) -> Any:
    """Make a recurrent layer."""
    kind, hidden, layers, both, projected, bias = args
    more = {"proj_size": projected} if projected else {"nonlinearity": "relu"} if kind == 2 and layers > 1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LAYERS[kind](
            inputs, hidden, layers, bidirectional=bool(both), bias=bool(bias), batch_first=batch_first, **more
        )


def read(args: Args) -> int:
    """The width of what a layer returns, step by step."""
    return (args[4] or args[1]) * (1 + args[3])


class Recurrent(Op, ranks=(TOKENS,), weight=7, shared=True):
    """args: the layer's six, style: batch first, steps first, or added to a projection of what it reads."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] <= LONGEST

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return *drawn_layer(pick), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], shapes[0][1] if args[6] == 2 else read(args)),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.layer = layer_of(shapes[0][1], args[:6], batch_first=args[6] != 1)
        self.proj = nn.Linear(read(args), shapes[0][1]) if args[6] == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.args[6] == 1:
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        y, _ = self.layer(x)
        return x + self.proj(y) if self.args[6] == 2 else y


class RecurrentState(Op, ranks=(TOKENS,), weight=4, head=True):
    """args: the layer's six, style: the last step, the last state of one layer, of all of them, or the cell."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] <= LONGEST

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        args = drawn_layer(pick)
        return *args, pick.integer(0, 4 if args[0] == 0 else 3)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        one = args[4] or args[1]
        return (((read(args), one, one * args[2] * (1 + args[3]), read(args), args[1])[args[6]],),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.layer = layer_of(shapes[0][1], args[:6], batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        kind, _, _, both, _, _, style = self.args
        y, state = self.layer(x)
        if style == 0:
            return y[:, -1]
        hidden, cell = state if kind == 0 else (state, state)
        if style == 2:
            return hidden.transpose(0, 1).flatten(1)
        if style == 3:
            return torch.cat([hidden[-2], hidden[-1]], -1) if both else hidden[-1]
        return cell[0] if style == 4 else hidden[0]


class EncoderDecoder(Op, ranks=(TOKENS,), arity=2, weight=3):
    """args: kind, hidden: the last state over one value is where a layer begins to read another."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] <= LONGEST

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == TOKENS and other[0] <= LONGEST

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(0, 2), pick.choice(HIDDEN)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], args[1]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.encoder, self.decoder = (LAYERS[args[0]](s[1], args[1], batch_first=True) for s in shapes[::-1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(y)
        return self.decoder(x, state)[0]


CELLS: tuple[Any, ...] = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class RecurrentCell(Op, ranks=(TOKENS,), weight=4):
    """args: kind, hidden, steps, style: a cell called in a loop; the last state, or all of them."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(0, 2), pick.choice(HIDDEN), min(pick.integer(1, 3), shapes[0][0]), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[2], args[1]),) if args[3] else ((args[1],),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.cell = CELLS[args[0]](shapes[0][1], args[1])

    def forward(self, x: Tensor) -> Tensor:
        kind, hidden, steps, style = self.args
        state = x.new_zeros(x.shape[0], hidden) if style == 1 and kind else None
        seen: list[Tensor] = []
        for i in range(steps):
            state = self.cell(x[:, i], state)
            seen.append(state[0] if kind == 0 else state)
        return torch.stack(seen, 1) if style else seen[-1]


class RecurrentOnMap(Op, ranks=(MAP,), weight=4):
    """args: the layer's six, style: the columns of a map as a sequence (CRNN), or every row as one of its own."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] * x[1] <= 64

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return *drawn_layer(pick), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((read(args), h, w) if args[6] else (w, read(args)),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        c, h, _ = shapes[0]
        self.layer = layer_of(c if args[6] else c * h, args[:6], batch_first=bool(args[6]))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.args[6]:
            rows = x.permute(0, 2, 3, 1).flatten(0, 1)
            return self.layer(rows)[0].unflatten(0, (b, h)).permute(0, 3, 1, 2)
        return self.layer(x.permute(3, 0, 1, 2).reshape(w, b, c * h))[0].transpose(0, 1)
