"""Op kinds that attend: the modules of torch, windows and maps, class tokens and latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import MAP, TOKENS, Args, Op, Picker, Shape, area, divisors
from networks.scores import CORES, Twist, attended, heads_of, merged, packed


class Multihead(Op, ranks=(TOKENS,), weight=5, shared=True):
    """args: heads, bias, style: `nn.MultiheadAttention` of a value with itself, added to it."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[1]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][1])), pick.integer(0, 1), pick.integer(0, 4)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        heads, bias, style = args
        self.attention = nn.MultiheadAttention(
            shapes[0][1],
            heads,
            bias=bool(bias),
            add_bias_kv=style == 3 and bool(bias),
            add_zero_attn=style == 3,
            batch_first=style != 1,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.args[2] == 1:
            y = x.transpose(0, 1)
            return x + self.attention(y, y, y)[0].transpose(0, 1)
        if self.args[2] == 2:
            y, weights = self.attention(x, x, x, average_attn_weights=False)
            return y + weights.mean((1, 3)).unsqueeze(-1)
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1) if self.args[2] == 4 else None
        return x + self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]


class MultiheadCross(Op, ranks=(TOKENS,), arity=2, weight=4):
    """args: heads, style: `nn.MultiheadAttention` over another value, of any width or of the same."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[1]))

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == TOKENS

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][1])), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (_, queries), (_, keys) = shapes
        self.attention = nn.MultiheadAttention(queries, args[0], kdim=keys, vdim=keys, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out, weights = self.attention(x, y, y, need_weights=bool(self.args[1]))
        return out if weights is None else out + weights.amax(-1, keepdim=True)


class EncoderLayer(Op, ranks=(TOKENS,), weight=3, shared=True):
    """args: heads, middle, norm first, activation: `nn.TransformerEncoderLayer`."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[1]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(divisors(shapes[0][1])), pick.choice((8, 12)), pick.integer(0, 1), pick.integer(0, 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        act = ("relu", "gelu")[args[3]]
        self.layer = nn.TransformerEncoderLayer(
            shapes[0][1], args[0], args[1], activation=act, norm_first=bool(args[2]), batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DecoderLayer(Op, ranks=(TOKENS,), arity=2, weight=2):
    """args: as of the encoder layer: `nn.TransformerDecoderLayer` over a memory."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return bool(divisors(x[1]))

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return EncoderLayer.draw(pick, *shapes)

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == TOKENS and x[1] == other[1]

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        act = ("relu", "gelu")[args[3]]
        self.layer = nn.TransformerDecoderLayer(
            shapes[0][1], args[0], args[1], activation=act, norm_first=bool(args[2]), batch_first=True
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layer(x, memory)


def windows(x: Tensor, size: int) -> Tensor:
    """Cut a map (b, h, w, c) into windows (b * windows, size * size, c)."""
    b, h, w, c = x.shape
    return x.view(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def unwindowed(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """Lay windows out as a map again."""
    y = x.view(-1, h // size, w // size, size, size, x.shape[-1])
    return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class WindowAttention(Op, weight=5, shared=True):
    """args: window, shift, heads, dim, masked, cut, core: Swin's windows, rolled, with a table of biases."""

    places: Tensor
    mask: Tensor

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[1] % 2 == 0 and x[2] % 2 == 0

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        _, h, w = shapes[0]
        size = pick.choice([s for s in (2, 4) if h % s == 0 and w % s == 0])
        styles = pick.integer(0, 1), pick.integer(0, 7), pick.integer(0, CORES - 1)
        return size, pick.integer(0, size // 2), pick.integer(1, 3), pick.choice((4, 2, 3)), *styles

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (c, h, w), (size, shift, heads, dim, masked, *_) = shapes[0], args
        self.norm, self.qkv, self.proj = nn.LayerNorm(c), nn.Linear(c, 3 * heads * dim), nn.Linear(heads * dim, c)
        self.twist = Twist(6, heads, dim, size * size)
        if shift and masked:
            region = torch.zeros(1, h, w, 1)
            region[:, -shift:] += 1
            region[:, :, -shift:] += 2
            flat = windows(region, size).squeeze(-1)
            self.register_buffer("mask", (flat[:, None] != flat[:, :, None]) * 1, persistent=False)

    def attention(self, x: Tensor) -> Tensor:
        _, shift, heads, dim, masked, cut, core = self.args
        q, k, v = packed(self.qkv(x), heads, cut)
        if not (shift and masked):
            return self.proj(merged(attended(q, k, v, self.twist, core, dim), 1))
        n = x.shape[1]
        scores = (q * dim**-0.5) @ k.transpose(-2, -1) + self.twist.bias(q)
        scores = scores.view(-1, self.mask.shape[0], heads, n, n) - 50.0 * self.mask[:, None]
        return self.proj(merged(scores.view(-1, heads, n, n).softmax(-1) @ v, 1))

    def forward(self, x: Tensor) -> Tensor:
        size, shift, *_ = self.args
        y = x.permute(0, 2, 3, 1)
        h, w = y.shape[1], y.shape[2]
        z = self.norm(y)
        z = torch.roll(z, (-shift, -shift), (1, 2)) if shift else z
        z = unwindowed(self.attention(windows(z, size)), size, h, w)
        z = torch.roll(z, (shift, shift), (1, 2)) if shift else z
        return (y + z).permute(0, 3, 1, 2)


class MapAttention(Op, weight=5, shared=True):
    """args: heads, dim, style: attention over the positions of a map, projected by convolutions."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return area(x) >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 3), pick.choice((4, 2, 3)), pick.integer(0, 4)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        width = args[0] * args[1]
        self.qkv, self.proj = nn.Conv2d(shapes[0][0], 3 * width, 1), nn.Conv2d(width, shapes[0][0], 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.scale = nn.Parameter(torch.empty(1))

    def attended(self, qkv: Tensor) -> Tensor:
        b, c, h, w = qkv.shape
        heads, dim, style = self.args
        if style == 0:
            q, k, v = qkv.reshape(b, 3, heads, -1, h * w).unbind(1)
        elif style == 1:
            q, k, v = qkv.view(b, heads, c // heads, h * w).chunk(3, dim=2)
        elif style == 2:
            q, k, v = (t.flatten(2).unflatten(1, (heads, dim)) for t in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.flatten(2).view(b, heads, -1, h * w).split([dim, dim, dim], dim=2)
        weights = (q.transpose(-2, -1) @ k * dim**-0.5).softmax(-1)
        return (v @ weights.transpose(-2, -1)).reshape(b, -1, h, w)

    def axial(self, qkv: Tensor) -> Tensor:
        """Attend along the rows of a map."""
        q, k, v = (t.unflatten(1, (self.args[0], -1)).permute(0, 3, 1, 4, 2) for t in qkv.chunk(3, dim=1))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 4, 1, 3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.axial(self.qkv(x)) if self.args[2] == 4 else self.attended(self.qkv(x))
        return x + self.scale * self.proj(y + self.depthwise(y))


class PooledAttention(Op, ranks=(TOKENS, MAP), weight=3, head=True):
    """args: heads, dim, style: a class token attends to all, or latents that are parameters do."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 3), pick.choice((4, 2, 3)), pick.integer(0, 2), pick.integer(0, CORES - 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((args[0] * args[1],),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        c, width = shapes[0][0] if len(shapes[0]) == MAP else shapes[0][1], args[0] * args[1]
        self.q, self.kv, self.twist = nn.Linear(c, width), nn.Linear(c, 2 * width), Twist(0, args[0], args[1], 1)
        if args[2]:
            self.latents = nn.Parameter(torch.empty(3, c))

    def forward(self, x: Tensor) -> Tensor:
        heads, dim, style, core = self.args
        x = x.flatten(2).transpose(1, 2) if len(self.shapes[0]) == MAP else x
        first = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1) if style else x[:, :1]
        k, v = self.kv(x).unflatten(-1, (2, -1)).unbind(2)
        q, k, v = (heads_of(t, heads, style) for t in (self.q(first), k, v))
        y = merged(attended(q, k, v, self.twist, core, dim), style)
        return y.squeeze(1) if style == 0 else y[:, 0] if style == 1 else y.mean(dim=1)
