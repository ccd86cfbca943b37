"""Whole blocks around attention, and two prunable dims at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traps.attention import HD, C, D, H, attend
from traps.spec import TOKENS, trap


@trap("attention without heads", TOKENS, "stem.weight 0, q.weight 0, k.weight 0, v.weight 0, proj.weight 1")
class NoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k = nn.Linear(C, C), nn.Linear(C, HD), nn.Linear(C, HD)
        self.v, self.proj, self.out = nn.Linear(C, HD), nn.Linear(HD, C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, -1)
        return self.out(x + self.proj(scores @ v))


@trap(
    "class token, positions, layer scale",
    TOKENS,
    "stem.weight 0, token 2, position 2, gamma 0, up.weight 0, out.weight 1, qkv.weight 0",
)
class Vision(nn.Module):
    """A block of a vision transformer with all that belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Linear(C, 24), nn.Parameter(torch.randn(1, 1, 24))
        self.position, self.gamma = nn.Parameter(torch.randn(1, 7, 24)), nn.Parameter(torch.rand(24))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(24), nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 3 * HD), nn.Linear(HD, 24)
        self.up, self.down, self.out = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, H, c // H).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.gamma * self.attention(self.norm1(x))
        x = x + self.gamma * self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(self.norm(x)[:, 0])


@trap("windows with a cyclic roll", (2, 8, 8, C), "stem.weight 0, qkv.weight 0, proj.weight 1, table 1, out.weight 1")
class Windows(nn.Module):
    """Swin: windows of four by four, rolled, with a table of biases."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Linear(C, 24), nn.Linear(24, 3 * HD), nn.Linear(HD, 24)
        self.norm, self.out, self.table = nn.LayerNorm(24), nn.Linear(24, 5), nn.Parameter(torch.randn(49, H))
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = grid[:, :, None] - grid[:, None] + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])

    def attention(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.flatten()].reshape(n, n, H).permute(2, 0, 1)
        y = (scores + bias[None]).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, H * D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.attention(y).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.out(x + torch.roll(y, (2, 2), (1, 2)))


@trap("XCA: attention over channels", TOKENS, "stem.weight 0, qkv.weight 0, qkv.weight 1, proj.weight 1, temperature 0")
class CrossCovariance(nn.Module):
    """XCiT: the product of queries and keys has two prunable dims at once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj, self.out = (
            nn.Linear(C, C),
            nn.Linear(C, 3 * HD),
            nn.Linear(HD, C),
            nn.Linear(C, 5),
        )
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.out(x + self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, HD)))


@trap(
    "MLP-Mixer", TOKENS, "stem.weight 0, tokens1.weight 0, tokens2.weight 1, up.weight 0, down.weight 1, out.weight 1"
)
class Mixer(nn.Module):
    """The hidden dim over tokens and the channels are prunable side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens1, self.tokens2 = nn.Linear(C, 24), nn.Linear(6, 16), nn.Linear(16, 6)
        self.up, self.down, self.out = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.tokens2(F.gelu(self.tokens1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


@trap(
    "heads and dims, each with a map of its own",
    TOKENS,
    "a.weight 0, over_heads.weight 0, over_heads.weight 1, over_dims.weight 0, over_dims.weight 1, out.weight 1",
)
class TwoDims(nn.Module):
    """A product of heads and dims, mixed along one and the other: both are prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.over_dims, self.over_heads = nn.Linear(C, HD), nn.Linear(D, 8), nn.Linear(H, 6)
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)).unflatten(-1, (H, D))
        y = torch.relu(self.over_dims(y))
        y = torch.relu(self.over_heads(y.transpose(-1, -2)))
        return self.out(y.flatten(-2))


@trap("tokens that are parameters", TOKENS, "stem.weight 0, latents 0, latents 1, k.weight 0, v.weight 0, out.weight 1")
class Perceiver(nn.Module):
    """Learned queries: both dims of one parameter may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.k, self.v = nn.Linear(C, 24), nn.Linear(24, 12), nn.Linear(24, 16)
        self.latents, self.mix, self.out = nn.Parameter(torch.randn(8, 12)), nn.Linear(8, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = (self.latents @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.out(self.mix(y.transpose(1, 2)).transpose(1, 2))


@trap("external attention", TOKENS, "stem.weight 0, q.weight 0, mk.weight 0, mk.weight 1, mv.weight 1, out.weight 1")
class External(nn.Module):
    """Two linear memories with a softmax over tokens and a sum over memory slots, which shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q = nn.Linear(C, 24), nn.Linear(24, 16)
        self.mk, self.mv, self.out = nn.Linear(16, 12, bias=False), nn.Linear(12, 24, bias=False), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = self.mk(self.q(x)).softmax(1)
        weights = weights / (1e-3 + weights.sum(-1, keepdim=True))
        return self.out(x + self.mv(weights))
