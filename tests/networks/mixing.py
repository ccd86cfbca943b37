"""Op kinds with two dims that can shrink side by side, and gated ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import ALL, MAP, TOKENS, VECTOR, WIDTHS, Args, Op, Picker, Shape, where, widened, width


class TokenLinear(Op, ranks=(TOKENS,), weight=4, shared=True):
    """args: out, style: a linear map over the tokens, so that tokens and channels are prunable."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[0], shapes[0][1]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        tokens = shapes[0][0]
        self.linear = nn.Conv1d(tokens, args[0], 1) if args[1] == 1 else nn.Linear(tokens, args[0], bias=not args[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.args[1] == 2:
            return torch.einsum("bnc,tn->btc", x, self.linear.weight)
        return self.linear(x) if self.args[1] else self.linear(x.transpose(1, 2)).transpose(1, 2)


class Mixer(Op, ranks=(TOKENS,), weight=4, shared=True):
    """args: hidden over tokens, hidden over channels, style: a block of MLP-Mixer, or gMLP's spatial gating."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((6, 8)), pick.choice((8, 12)), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (n, c), (over_tokens, over_channels, gated) = shapes[0], args
        self.norm = nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, over_channels), nn.Linear(over_channels // (1 + gated), c)
        if gated:
            self.gate_norm, self.spatial = nn.LayerNorm(over_channels // 2), nn.Conv1d(n, n, 1)
        else:
            self.tokens1, self.tokens2 = nn.Linear(n, over_tokens), nn.Linear(over_tokens, n)
            self.second_norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        if self.args[2]:
            u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
            return x + self.down(u * self.spatial(self.gate_norm(v)))
        x = x + self.tokens2(F.gelu(self.tokens1(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.second_norm(x))))


class TokensTimesChannels(Op, ranks=(TOKENS,), weight=4):
    """args: tokens, channels, style: both made by linear maps, flattened to one dim, acted on, and split back."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((4, 6)), pick.choice((4, 6, 8)), pick.integer(0, 3), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (args[:2],)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (n, c), (tokens, channels, style, _) = shapes[0], args
        self.over_tokens, self.over_channels = nn.Linear(n, tokens), nn.Linear(c, channels)
        self.act = (nn.Identity(), nn.ReLU(), nn.LayerNorm(tokens * channels), nn.BatchNorm1d(tokens * channels))[style]

    def forward(self, x: Tensor) -> Tensor:
        tokens, channels, _, order = self.args
        y = self.over_tokens(self.over_channels(x).transpose(1, 2))
        if order:
            return self.act(y.flatten(1)).view(-1, channels, tokens).transpose(1, 2)
        return self.act(y.transpose(1, 2).flatten(1)).unflatten(1, (tokens, -1))


class HeadsTimesDims(Op, ranks=(TOKENS, VECTOR), weight=3):
    """args: heads, dim, more heads, more dims, style: a product of two dims, with a linear map over each."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return *(pick.choice((3, 2, 4)) for _ in range(4)), pick.integer(0, 2)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], args[2] * args[3]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        heads, dim, more_heads, more_dims, style = args
        self.first = nn.Linear(shapes[0][-1], heads * dim)
        self.over_heads, self.over_dims = (
            nn.Linear(a, b, bias=style < 2) for a, b in ((heads, more_heads), (dim, more_dims))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)).unflatten(-1, (self.args[0], self.args[1]))
        if self.args[4] == 0:
            return self.over_heads(torch.relu(self.over_dims(y)).mT).flatten(-2)
        if self.args[4] == 1:
            return self.over_dims(torch.relu(self.over_heads(y.transpose(-1, -2)).transpose(-1, -2))).flatten(-2)
        return torch.einsum("...hd,gh,ed->...ge", y, self.over_heads.weight, self.over_dims.weight).flatten(-2)


class GatedMlp(Op, ranks=ALL, weight=3, shared=True):
    """args: middle, style: a gated block: both halves from one map (chunk, glu, slices), or from two."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice((6, 4, 8)), pick.integer(0, 4)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        c, (middle, style) = width(shapes[0]), args
        make = (lambda a, b: nn.Conv2d(a, b, 1)) if len(shapes[0]) == MAP else nn.Linear
        self.up, self.down = make(c, middle if style == 4 else 2 * middle), make(middle, c)
        if style == 4:
            self.gate = make(c, middle)

    def forward(self, x: Tensor) -> Tensor:
        (middle, style), dim = self.args, where(self.shapes[0])
        y = self.up(x)
        if style == 4:
            return x + self.down(F.silu(self.gate(x)) * y)
        if style == 0:
            a, b = y.chunk(2, dim=dim)
            return x + self.down(a * torch.sigmoid(b))
        if style == 1:
            return x + self.down(F.glu(y, dim))
        if style == 2:
            return x + self.down(y.narrow(dim, 0, middle) * F.silu(y.narrow(dim, middle, middle)))
        rows = y.unflatten(dim, (2, middle))
        return x + self.down(rows.select(dim, 0) * torch.tanh(rows.select(dim, 1)))


class Interleaved(Op, ranks=ALL, weight=3):
    """args: style: strided halves of the channels, combined and laid side by side or between one another."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return width(x) % 2 == 0 and width(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return (pick.integer(0, 4),)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        x = shapes[0]
        return (widened(x, width(x) // 2 if args[0] == 0 else width(x) - 1 if args[0] == 4 else width(x)),)

    def forward(self, x: Tensor) -> Tensor:
        dim, style = where(self.shapes[0]), self.args[0]
        at = (slice(None),) * dim
        if style == 4:
            return x[(*at, slice(1, None))] - x[(*at, slice(None, -1))]
        even, odd = x[(*at, slice(None, None, 2))], x[(*at, slice(1, None, 2))]
        if style == 0:
            return torch.maximum(even, odd)
        if style == 1:
            return torch.cat([-odd, even], dim)
        if style == 2:
            return torch.stack([even - odd, odd], dim + 1).flatten(dim, dim + 1)
        first, second = torch.tensor_split(x, 2, dim)
        return torch.cat([second, first], dim=dim)
