"""Attention written by hand, in every layout that is about."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traps.spec import TOKENS, trap

C, H, D = 16, 4, 6
HD = H * D


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: (b, h, n, d). The scale must stay that of the dense head size."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


class Packed(nn.Module):
    """One projection for q, k and v, taken apart by `take`."""

    def __init__(self, take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj, self.out = (
            nn.Linear(C, C),
            nn.Linear(C, 3 * HD),
            nn.Linear(HD, C),
            nn.Linear(C, 5),
        )
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.take(self.qkv(x))
        return self.out(x + self.proj(merged(attend(q, k, v))))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


PACKED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "reshape (3, H, D), permute, unbind": lambda y: (
        y.reshape(y.shape[0], y.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    ),
    "reshape (3, H, D), indexed": lambda y: (lambda z: (z[0], z[1], z[2]))(
        y.reshape(y.shape[0], -1, 3, H, y.shape[-1] // (3 * H)).permute(2, 0, 3, 1, 4)
    ),
    "reshape (H, 3, D)": lambda y: y.reshape(y.shape[0], y.shape[1], H, 3, D).permute(3, 0, 2, 1, 4).unbind(0),
    "reshape (H, 3 D), chunk": lambda y: y.reshape(y.shape[0], y.shape[1], H, 3 * D).transpose(1, 2).chunk(3, -1),
    "reshape (H, D, 3)": lambda y: y.reshape(y.shape[0], y.shape[1], H, D, 3).permute(4, 0, 2, 1, 3).unbind(0),
    "chunk, view": lambda y: tuple(heads(z) for z in y.chunk(3, -1)),  # type: ignore[return-value]
    "split, unflatten": lambda y: tuple(z.unflatten(-1, (H, D)).transpose(1, 2) for z in y.split(HD, -1)),  # type: ignore[return-value]
    "slices": lambda y: (heads(y[..., :HD]), heads(y[..., HD : 2 * HD]), heads(y[..., 2 * HD :])),
    "view, tensor_split": lambda y: tuple(heads(z) for z in y.tensor_split(3, -1)),  # type: ignore[return-value]
}  # fmt: skip
for _name, _take in PACKED.items():
    trap(f"packed qkv: {_name}", TOKENS, "stem.weight 0, qkv.weight 0, qkv.bias 0, qkv.weight 1, proj.weight 1")(
        lambda take=_take: Packed(take)
    )


class MergedByDim(Packed):
    """Heads are merged as (D, H): values keep the same dims in every head, queries and keys need not (timm's nest)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = attend(*self.take(self.qkv(x)))
        return self.out(x + self.proj(y.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[1], -1)))


trap("packed qkv, merged by head dim", TOKENS, "stem.weight 0, qkv.weight 0, qkv.weight 1, proj.weight 1")(
    lambda: MergedByDim(PACKED["reshape (3, H, D), permute, unbind"])
)


class PackedNorm(Packed):
    """A norm over the head dim of queries and keys: these keep the same dims in every head, values need not."""

    def __init__(self) -> None:
        super().__init__(PACKED["reshape (3, H, D), permute, unbind"])
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.take(self.qkv(x))
        return self.out(x + self.proj(merged(attend(self.norm(q), self.norm(k), v))))


trap("packed qkv, normed queries and keys", TOKENS, "stem.weight 0, qkv.weight 0, norm.weight 0, proj.weight 1")(
    PackedNorm
)


class Separate(nn.Module):
    """Three projections; `kv` heads for keys and values, `tweak` sees q and k."""

    def __init__(self, kv: int = H, tweak: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.q, self.k = nn.Linear(C, C), nn.Linear(C, HD), nn.Linear(C, kv * D)
        self.v, self.proj, self.out = nn.Linear(C, kv * D), nn.Linear(HD, C), nn.Linear(C, 5)
        self.kv, self.tweak = kv, tweak

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, H, D).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv, D).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv, D).transpose(1, 2)
        if self.tweak is not None:
            q, k = self.tweak(q), self.tweak(k)
        return q, k, v

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + self.proj(merged(self.attention(*self.split(x)))))


QKV = "stem.weight 0, q.weight 0, k.weight 0, v.weight 0, proj.weight 1"
trap("separate q, k, v", TOKENS, QKV)(Separate)


@trap("scaled_dot_product_attention", TOKENS, QKV)
class Fused(Separate):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@trap("causal attention", TOKENS, QKV)
class Causal(Separate):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.triu(torch.full((q.shape[2], q.shape[2]), float("-inf")), 1)
        return ((q / D**0.5) @ k.transpose(-2, -1) + mask).softmax(-1) @ v


@trap("einsum attention", TOKENS, QKV)
class Einsum(Separate):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.size(-1) ** 0.5
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@trap("linear attention", TOKENS, QKV)
class LinearAttention(Separate):
    """A kernel instead of the softmax: keys and values are contracted first."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2, keepdim=True).transpose(-2, -1))


@trap("heads in the batch", TOKENS, QKV)
class HeadsInBatch(Separate):
    """As fairseq and nn.functional write it: heads and samples in one dim, `bmm`."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n = q.shape[:3]
        q, k, v = (t.reshape(b * h, n, -1) for t in (q, k, v))
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * D**-0.5, -1)
        return torch.bmm(weights, v).view(b, h, n, -1)


@trap("grouped queries, repeat_interleave", TOKENS, QKV)
class Grouped(Separate):
    def __init__(self) -> None:
        super().__init__(kv=2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(H // self.kv, 1))


@trap("grouped queries, expand", TOKENS, QKV)
class GroupedExpand(Grouped):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n = k.shape[:3]
        k, v = (t[:, :, None].expand(b, h, 2, n, D).reshape(b, h * 2, n, D) for t in (k, v))
        return attend(q, k, v)


@trap("grouped queries, queries in groups", TOKENS, QKV)
class GroupedViews(Grouped):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, n, d = q.shape
        q = q.view(b, self.kv, H // self.kv, n, d)
        return attend(q, k[:, :, None], v[:, :, None]).reshape(b, H, n, d)


@trap("grouped queries, enable_gqa", TOKENS, QKV)
class GroupedFused(Grouped):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@trap("multi-query", TOKENS, QKV)
class MultiQuery(Separate):
    def __init__(self) -> None:
        super().__init__(kv=1)


trap("qk-norm by LayerNorm", TOKENS, QKV + ", tweak.weight 0")(lambda: Separate(tweak=nn.LayerNorm(D)))
trap("qk-norm by RMSNorm", TOKENS, QKV + ", tweak.weight 0")(lambda: Separate(tweak=nn.RMSNorm(D)))


@trap("qk-norm by F.normalize and a learned scale", TOKENS, QKV)
class Cosine(Separate):
    """Swin v2: the cosine of the angle, times a scale per head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(H, 1, 1) + 1.0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.scale.clamp(max=4.6).exp()).softmax(-1) @ v


class Rotary(nn.Module):
    """Rotates pairs of dims by angles that are a buffer; halves, as Llama has them."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6.0), 10.0 ** -torch.arange(0, D, 2).div(D))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


class RotaryOfArange(nn.Module):
    """The same, computed in forward, in pairs of neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * (10.0 ** -(torch.arange(0, D, 2) / D))
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


class RotaryComplex(nn.Module):
    """The same by complex numbers, as the first Llama has it."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6.0), 10.0 ** -torch.arange(0, D, 2).div(D))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(y * self.turn).flatten(3)


trap("rotary embedding from buffers", TOKENS, QKV + ", tweak.cos 1, tweak.sin 1")(lambda: Separate(tweak=Rotary()))
trap("rotary embedding from arange", TOKENS, QKV)(lambda: Separate(tweak=RotaryOfArange()))
trap("rotary embedding by complex numbers", TOKENS, QKV + ", tweak.turn 1")(lambda: Separate(tweak=RotaryComplex()))


@trap("relative position bias by a table", TOKENS, QKV + ", table 1")
class Biased(Separate):
    """A table indexed by a buffer, a column per head: heads go, and take their column along."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, H))
        n = torch.arange(6)
        self.register_buffer("index", n[:, None] - n[None] + 5)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(6, 6, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias.unsqueeze(0)
        return scores.softmax(-1) @ v


@trap("deformable attention", TOKENS, "stem.weight 0, value.weight 0, places.weight 0, weight.weight 0, proj.weight 0")
class Deformable(nn.Module):
    """Every head reads the values at a few places of its own, heads being side by side in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value, self.places = nn.Linear(C, C), nn.Linear(C, HD), nn.Linear(C, H * 5 * 2)
        self.weight, self.proj, self.out = nn.Linear(C, H * 5), nn.Linear(HD, C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        values = self.value(x).view(b, 2, 3, H, D).permute(0, 3, 4, 1, 2).flatten(0, 1)
        places = self.places(x).tanh().view(b, n, H, 5, 2).transpose(1, 2).flatten(0, 1)
        weights = self.weight(x).view(b, n, H, 5).softmax(-1).transpose(1, 2).reshape(b * H, 1, n, 5)
        y = (F.grid_sample(values, places, align_corners=False) * weights).sum(-1)
        return self.out(x + self.proj(y.view(b, H * D, n).transpose(1, 2)))


@trap("talking heads", TOKENS, QKV + ", mix.weight 0")
class Talking(Separate):
    """A linear map over the heads before the softmax and after."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.remix = nn.Conv2d(H, 8, 1), nn.Conv2d(8, H, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.mix(q @ k.transpose(-2, -1) * D**-0.5).softmax(-1)
        return self.remix(scores) @ v
