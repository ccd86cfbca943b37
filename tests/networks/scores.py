"""How the attention of random networks is written: heads cut out, twisted, multiplied and laid together again."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.ops import Picker

CUTS, TWISTS, CORES, MERGES = 8, 9, 6, 4
Heads = tuple[Tensor, Tensor, Tensor]


def heads_of(x: Tensor, heads: int, style: int) -> Tensor:
    """Cut tokens (b, n, heads * dim) into heads (b, heads, n, dim), written in one of four ways."""
    if style == 0:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)
    b, n, c = x.shape
    if style == 1:
        return x.view(b, n, heads, c // heads).permute(0, 2, 1, 3)
    if style == 2:
        return x.reshape(b, n, heads, -1).transpose(1, 2)
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def packed(qkv: Tensor, heads: int, style: int) -> Heads:
    """Cut (b, n, 3 * heads * dim) into queries, keys and values (b, heads, n, dim), in one of `CUTS` ways."""
    b, n, c = qkv.shape
    if style == 0:
        q, k, v = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    elif style == 1:
        q, k, v = (heads_of(t, heads, 1) for t in qkv.chunk(3, dim=-1))
    elif style == 2:
        qkv = qkv.reshape(b, n, 3, heads, c // (3 * heads)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
    elif style == 3:
        q, k, v = (heads_of(t, heads, 0) for t in qkv.split(c // 3, dim=2))
    elif style == 4:
        width = c // 3
        parts = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
        q, k, v = (heads_of(t, heads, 2) for t in parts)
    elif style == 5:  # each head with its queries, keys and values side by side, as in GPT-NeoX
        q, k, v = qkv.view(b, n, heads, -1).transpose(1, 2).chunk(3, dim=-1)
    elif style == 6:
        rows = qkv.unflatten(-1, (heads, 3, -1))
        q, k, v = (rows[:, :, :, i].transpose(1, 2) for i in range(3))
    else:
        q, k, v = torch.unbind(qkv.reshape(b, n, 3, heads, -1).transpose(1, 3), dim=2)
    return q, k, v


def merged(y: Tensor, style: int) -> Tensor:
    """Lay heads (b, heads, n, dim) side by side, in one of `MERGES` ways."""
    if style == 0:
        return y.transpose(1, 2).flatten(2)
    b, heads, n, dim = y.shape
    if style == 1:
        return y.transpose(1, 2).reshape(b, n, heads * dim)
    if style == 2:
        return y.permute(0, 2, 1, 3).contiguous().view(b, n, -1)
    return torch.cat(y.unbind(1), dim=-1)


class Twist(nn.Module):
    """What stands between the projections and the product of queries and keys, or is added to their scores.

    Args:
        style: none, layer norm, RMS norm, cosine with a temperature, rotary halves from buffers, rotary neighbours
            from arange, a bias table, a slope per head, or a causal mask.
        heads: number of heads.
        dim: of a head, which the rotary ones need to be even.
        tokens: of queries and of keys; the last three need as many of both.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor
    slopes: Tensor

    def __init__(self, style: int, heads: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.style, self.dim, self.tokens = style, dim, tokens
        if style == 1:
            self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        elif style == 2:
            self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        elif style == 3:
            self.scale = nn.Parameter(torch.empty(heads, 1, 1))
        elif style == 4:
            self.register_buffer("cos", torch.empty(tokens, dim))
            self.register_buffer("sin", torch.empty(tokens, dim))
        elif style == 6:
            self.table = nn.Parameter(torch.empty(2 * tokens - 1, heads))
            self.register_buffer("places", torch.arange(tokens)[:, None] - torch.arange(tokens) + tokens - 1)
        elif style == 7:
            self.register_buffer("slopes", torch.empty(heads, 1, 1))

    def rotated(self, x: Tensor) -> Tensor:
        if self.style == 4:
            a, b = x.chunk(2, -1)
            return x * self.cos + torch.cat([-b, a], -1) * self.sin
        angles = torch.arange(x.shape[2])[:, None] * (10.0 ** -(torch.arange(0, self.dim, 2) / self.dim))
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.style in (1, 2):
            return self.q_norm(q), self.k_norm(k)
        if self.style == 3:
            return F.normalize(q, dim=-1, eps=0.1) * self.scale, F.normalize(k, dim=-1, eps=0.1)
        return (self.rotated(q), self.rotated(k)) if self.style in (4, 5) else (q, k)

    def bias(self, q: Tensor) -> Tensor | None:
        """What is added to the scores (b, heads, n, n) of queries (b, heads, n, dim)."""
        if self.style == 6:
            return self.table[self.places.view(-1)].view(self.tokens, self.tokens, -1).permute(2, 0, 1)
        if self.style == 7:
            place = torch.arange(q.shape[2], device=q.device)
            return -(place[:, None] - place).abs() * self.slopes
        if self.style == 8:
            n = q.shape[2]
            return torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        return None


def drawn_twist(pick: Picker, dim: int, same: bool) -> int:
    """Draw a style of `Twist` that a head dim allows, and where queries and keys are as many tokens."""
    styles = [0, 1, 2, 3, *((5,) if dim % 2 == 0 else ()), *((6, 7, 8) if same else ())]
    return pick.choice([*styles, 4] if dim % 2 == 0 and same else styles)


def attended(q: Tensor, k: Tensor, v: Tensor, twist: Twist, core: int, dim: int) -> Tensor:
    """Attend, in one of `CORES` ways; `dim` is the head dim as a literal, which some of them use."""
    q, k = twist(q, k)
    bias = twist.bias(q)
    if core == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if core == 1:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    elif core == 2:
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(k.size(-1))
    elif core == 3:
        scores = (q * dim**-0.5) @ k.mT
    elif core == 4:
        scores = torch.matmul(q, k.transpose(2, 3)) / dim**0.5
    else:
        scores = (q * float(q.size(3)) ** -0.25) @ (k * float(k.size(3)) ** -0.25).transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    weights = F.softmax(scores, dim=-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v) if core == 2 else weights @ v
