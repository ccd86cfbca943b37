"""Op kinds that attend over tokens, written by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import TOKENS, WIDTHS, Args, Op, Picker, Shape
from networks.scores import CORES, CUTS, MERGES, Twist, attended, drawn_twist, heads_of, merged, packed

DIMS = (4, 2, 3, 6)


class PackedAttention(Op, ranks=(TOKENS,), weight=10, shared=True):
    """args: out, heads, dim, cut, twist, core, merge, bias: one projection for queries, keys and values."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        dim = pick.choice(DIMS)
        styles = pick.integer(0, CUTS - 1), drawn_twist(pick, dim, True), pick.integer(0, CORES - 1)
        return pick.choice(WIDTHS), pick.integer(1, 4), dim, *styles, pick.integer(0, MERGES - 1), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        out, heads, dim, _, twist, _, _, bias = args
        self.qkv = nn.Linear(shapes[0][1], 3 * heads * dim, bias=bool(bias))
        self.twist = Twist(twist, heads, dim, shapes[0][0])
        self.proj = nn.Linear(heads * dim, out)

    def forward(self, x: Tensor) -> Tensor:
        _, heads, dim, cut, _, core, merge, _ = self.args
        q, k, v = packed(self.qkv(x), heads, cut)
        return self.proj(merged(attended(q, k, v, self.twist, core, dim), merge))


class AttentionBlock(PackedAttention, ranks=(TOKENS,), weight=4):
    """args as of the packed one, out ignored: a pre-norm transformer block with layer scales and an MLP of width 12."""

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (shapes[0],)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        channels = shapes[0][1]
        super().__init__(shapes, (channels, *args[1:]))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.scale, self.second_scale = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.mlp = nn.Sequential(nn.Linear(channels, 12), nn.GELU(), nn.Linear(12, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * super().forward(self.norm1(x))
        return x + self.second_scale * self.mlp(self.norm2(x))


class CrossAttention(Op, ranks=(TOKENS,), arity=2, weight=8):
    """args: heads, qk dim, v dim, twist, core, cut, merge, project: over another value."""

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        return len(other) == TOKENS

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        dim, same = pick.choice(DIMS), shapes[0][0] == shapes[1][0]
        styles = drawn_twist(pick, dim, same), pick.integer(0, CORES - 1), pick.integer(0, 3)
        return pick.integer(1, 4), dim, pick.choice(DIMS), *styles, pick.integer(0, MERGES - 1), pick.integer(0, 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], shapes[0][1] if args[7] else args[0] * args[2]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (tokens, queries), (_, keys) = shapes
        heads, dim, wide, twist, *_ = args
        self.q, self.k = nn.Linear(queries, heads * dim), nn.Linear(keys, heads * dim)
        self.v = nn.Linear(keys, heads * wide)
        self.twist = Twist(twist, heads, dim, tokens)
        self.proj = nn.Linear(heads * wide, queries) if args[7] else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        heads, dim, _, _, core, cut, merge, project = self.args
        q, k, v = (heads_of(t, heads, cut) for t in (self.q(x), self.k(y), self.v(y)))
        out = self.proj(merged(attended(q, k, v, self.twist, core, dim), merge))
        return x + out if project else out


class GroupedQueryAttention(Op, ranks=(TOKENS,), weight=6, shared=True):
    """args: out, kv heads (1: multi-query), queries per kv head, dim, style, twist, core."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        dim = pick.choice((4, 2, 6))
        style = pick.integer(0, 5)
        styles = style, pick.choice((0, 1, 2, 4, 5, 8) if style != 4 else (0,)), pick.integer(0, CORES - 1)
        return pick.choice(WIDTHS), pick.integer(1, 3), pick.integer(2, 3), dim, *styles

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((shapes[0][0], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (tokens, channels), (out, few, each, dim, _, twist, _) = shapes[0], args
        self.q, self.kv = nn.Linear(channels, few * each * dim), nn.Linear(channels, 2 * few * dim)
        self.twist, self.proj = Twist(twist, few * each, dim, tokens), nn.Linear(few * each * dim, out)

    def spread(self, x: Tensor) -> Tensor:
        """Give every query head its key or value head: (b, few, n, dim) -> (b, few * each, n, dim)."""
        _, few, each, dim, style, *_ = self.args
        if style == 0:
            return x.repeat_interleave(each, dim=1)
        if style == 1:
            b, _, n, _ = x.shape
            return x[:, :, None].expand(b, few, each, n, dim).reshape(b, few * each, n, dim)
        if style == 2:
            return x.unsqueeze(2).expand(-1, -1, each, -1, -1).flatten(1, 2)
        return x.repeat(1, each, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, few, each, dim, style, _, core = self.args
        q = heads_of(self.q(x), few * each, style % 3)
        k, v = (heads_of(t, few, 2) for t in self.kv(x).chunk(2, dim=-1))
        if style < 4:
            y = attended(q, self.spread(k), self.spread(v), self.twist, core, dim)
        elif style == 4:  # the heads of a group as further tokens, or broadcast
            scores = q.unflatten(1, (few, each)) @ k.unsqueeze(2).transpose(-2, -1)
            y = ((scores * dim**-0.5).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)
        else:
            q, k = self.twist(q, k)
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(merged(y, style % 3))


class ChannelAttention(Op, ranks=(TOKENS,), weight=5, shared=True):
    """args: heads, dim, style: attention between channels (XCiT), or without a softmax over tokens (linear)."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.integer(1, 3), pick.choice(DIMS), pick.integer(0, 3), pick.integer(0, CUTS - 1)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        width = args[0] * args[1]
        self.qkv, self.proj = nn.Linear(shapes[0][1], 3 * width), nn.Linear(width, shapes[0][1])
        self.scale = nn.Parameter(torch.empty(args[0], 1, 1))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.args[2] == 0:
            q, k = F.normalize(q.transpose(-2, -1), dim=-1), F.normalize(k.transpose(-2, -1), dim=-1)
            weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
            return (weights @ v.transpose(-2, -1)).transpose(-2, -1)
        if self.args[2] == 1:
            q, k = F.elu(q) + 1.1, F.elu(k) + 1.1
            total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2)).unsqueeze(-1)
            return torch.einsum("bhnd,bhde->bhne", q, k.mT @ v) / total * self.scale
        if self.args[2] == 2:
            return (q.softmax(dim=-1) * self.scale) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)
        return torch.relu(q) @ (torch.relu(k).transpose(-2, -1) @ v) / k.shape[2] * self.scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = packed(self.qkv(x), self.args[0], self.args[3])
        return x + self.proj(self.attended(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
