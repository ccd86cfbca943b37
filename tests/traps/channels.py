"""Channels that change place: shuffles, flips, slices, views, copies, joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traps.spec import IMAGE, TOKENS, Between, trap

THROUGH = "first.weight 0, first.bias 0, last.weight 1"


def written(x: Tensor, where: tuple[Any, ...], value: Tensor | float) -> Tensor:
    """Return a copy in which a value is written somewhere."""
    y = x.clone()
    y[where] = value
    return y


ON_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "channel shuffle by views": lambda x: (
        x.view(x.size(0), 4, x.size(1) // 4, x.size(2), x.size(3)).transpose(1, 2).contiguous().view(*x.size())
    ),
    "channel shuffle by a reshape to -1": lambda x: x.reshape(-1, 4, 6, 8, 8).transpose(1, 2).reshape(-1, 24, 8, 8),
    "flip": lambda x: x.flip(1),
    "flip added to itself": lambda x: x + x.flip(1),
    "spatial attention with max()[0]": lambda x: x * (x.max(1, True)[0] + x.mean(1, True)).sigmoid(),
    "spatial attention with min().values": lambda x: x - torch.min(x, dim=1, keepdim=True).values,
    "squeezed in place": lambda x: x.clone().unsqueeze(1).squeeze_(1),
    "unsqueezed in place": lambda x: x.clone().unsqueeze_(-4).squeeze(1),
    "transposed in place": lambda x: x.clone().transpose_(1, -1).flip(1).swapaxes_(-1, 1),
    "quantile": lambda x: torch.stack([x, x.tanh()]).quantile(0.5, dim=0),
    "roll": lambda x: x.roll(5, 1),
    "roll back and forth": lambda x: torch.roll(x, (-3, 1), (1, 2)),
    "constant index": lambda x: x[:, [5, 3, 17, 3, 20, 21, 22, 7]],
    "constant index_select": lambda x: torch.index_select(x, 1, torch.arange(0, 24, 2)),
    "slices": lambda x: x[:, 4:20] * x[:, 8:],
    "strided slices": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "flatten of channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "flatten in two steps": lambda x: x.flatten(2).flatten(1),
    "flatten in two steps the other way": lambda x: x.flatten(1, 2).flatten(1),
    "unflatten": lambda x: x.unflatten(1, (4, 6)).sum(1),
    "F.glu": lambda x: F.glu(x, 1),
    "chunk times sigmoid": lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)),
    "maxout by a view": lambda x: x.view(x.shape[0], 12, 2, *x.shape[2:]).amax(2),
    "maxout with torch.max": lambda x: x.view(x.shape[0], 12, 2, *x.shape[2:]).max(2)[0],
    "maxout of two halves": lambda x: torch.maximum(*x.chunk(2, 1)),
    "concat of channels": lambda x: torch.cat([x, x.sigmoid()], 1),
    "concat of batches": lambda x: sum(torch.cat([x, x.tanh()], 0).chunk(2, 0)),  # type: ignore[arg-type,return-value]
    "concat in space": lambda x: torch.cat([x, x.tanh()], 3),
    "concat of a tensor with itself": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x.tanh(), x.sigmoid()], 1).flatten(1, 2),
    "stack as the last dim": lambda x: torch.stack([x, x.tanh()], -1).amax(-1),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel shuffle by views": lambda x: (
        x.view(x.shape[0], 6, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(x.shape[0], 6, 16, 16)
    ),
    "space to depth": lambda x: torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "interpolate to a size": lambda x: F.interpolate(x, size=(x.shape[2] * 2, 5)) * 2,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "expand and flatten": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "einsum over space": lambda x: torch.einsum("bchw,bchw->bc", x, x.sigmoid()),
    "movedim and unbind": lambda x: x.movedim(1, -1).unsqueeze(0).unbind(0)[0].movedim(-1, 1),
    "mean by hand": lambda x: x / (x.sum(1, keepdim=True) / x.shape[1] + 2.0),
    "unfold of patches": lambda x: F.unfold(x, 2, stride=2).transpose(1, 2),
    "fold of patches": lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1),
    "Tensor.unfold of windows": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)),
    "masked in place": lambda x: x.clone().masked_fill_(torch.arange(8) > 5, -torch.inf).amax(3, keepdim=True) + x,
    "lines filled": lambda x: x.index_fill(2, torch.tensor([1, 4]), 2.0).mean(3, keepdim=True).softmax(1) + x,
    "written through a mask": lambda x: written(x, (slice(None), slice(None), torch.arange(8) > 5), 2.0),
    "written at positions": lambda x: written(x, (slice(None), slice(None), torch.tensor([1, 4])), x[:, :, :2] * 2),
    "Gram matrix of positions": lambda x: (lambda y: y.transpose(1, 2) @ y)(x.flatten(2)),
}  # fmt: skip

for _name, _use in ON_MAPS.items():
    trap(_name, IMAGE, THROUGH if "Gram" not in _name else "first.weight 0, first.bias 0")(
        lambda use=_use: Between(use)
    )
trap("nn.ChannelShuffle", IMAGE, THROUGH)(lambda: Between(nn.ChannelShuffle(4)))
trap("nn.PixelShuffle", IMAGE, THROUGH)(lambda: Between(nn.PixelShuffle(2)))
trap("nn.GLU", IMAGE, THROUGH)(lambda: Between(nn.GLU(1)))
trap("nn.Unflatten and nn.Flatten", IMAGE, THROUGH)(
    lambda: Between(nn.Sequential(nn.Unflatten(1, (4, 6)), nn.Flatten(1, 2)))
)

HELD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gather": (
        lambda x: x.gather(1, torch.arange(23, -1, -1).view(1, 24, 1, 1).expand(2, 24, 8, 8)), "is indexed by data",
    ),
    "take_along_dim": (
        lambda x: torch.take_along_dim(x, torch.arange(11, -1, -1).view(1, 12, 1, 1), 1), "is indexed by data",
    ),
    "topk over channels": (lambda x: x.topk(12, 1)[0], "is ordered by its values"),
    "cumsum over channels": (lambda x: x.cumsum(1), "cumsum cannot shorten"),
    "a convolution along the channels": (
        lambda x: x * F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3), padding=1)[:, 0, :, None, None],
        "convolution cannot shorten",
    ),
    "local response norm": (lambda x: F.local_response_norm(x, 3), "avg_pool3d cannot shorten"),
    "a count of channels": (lambda x: x / ((x > 0).sum(1, keepdim=True) + 1), "a constant that aten.sum takes"),
    "positions of the largest": (lambda x: x * x.max(1, keepdim=True)[1], "`amax` finds the values alone"),
    "unbind of channels": (lambda x: torch.stack(x.unbind(1)[2:14], 1), "is selected by its position"),
}  # fmt: skip
for _name, (_held, _why) in HELD.items():
    trap(_name, IMAGE, "last.weight 0, out.weight 1", held={"first.weight 0": _why}, macs=0.9)(
        lambda use=_held: Between(use)
    )


@trap(
    "C2f: chunk, list, concat", IMAGE, "cv1.weight 0, blocks.0.weight 0, blocks.1.weight 0, cv2.weight 1, cv2.weight 0"
)
class C2f(nn.Module):
    """YOLO's block: half of the channels is processed again and again, and all of it is joined."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 12
        self.cv1, self.cv2 = nn.Conv2d(3, 24, 1), nn.Conv2d(48, 16, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(F.silu(block(y[-1])) for block in self.blocks)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))))


@trap("C2f by split sizes", IMAGE, "cv1.weight 0, blocks.0.weight 0, cv2.weight 1")
class C2fSplit(C2f):
    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(y[-1] + F.silu(block(y[-1])) for block in self.blocks)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))))


@trap("CSP: two ways joined", IMAGE, "left.weight 0, right.weight 0, inner.weight 0, join.weight 1, join.weight 0")
class CSP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.inner, self.join = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.bn, self.head = nn.BatchNorm2d(24), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        y = y + self.inner(F.silu(y))
        return self.head(F.silu(self.join(self.bn(torch.cat((y, self.right(x)), 1)))))


@trap("dense block", IMAGE, "layers.0.weight 0, layers.1.weight 1, layers.2.weight 1, head.weight 1")
class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 11, 19))
        self.head = nn.Conv2d(27, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(torch.relu(layer(torch.cat(seen, 1))))
        return self.head(torch.cat(seen, 1))


@trap("zero-padded shortcut", IMAGE, "stem.weight 0, down.weight 0, down.weight 1, head.weight 1")
class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is subsampled, and padded with zeros along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, 2, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, 6), "constant", 0)
        return self.head(torch.relu(y).mean((2, 3)))


@trap("concat of tokens", TOKENS, "first.weight 0, token 2, last.weight 1")
class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.token = nn.Linear(16, 24), nn.Linear(24, 5), nn.Parameter(torch.randn(1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x, x.flip(1)], 1)
        return self.last(torch.relu(x))


@trap("Gram matrix of channels", IMAGE, "first.weight 0, mid.weight 0, mid.weight 1, last.weight 1", macs=0.5)
class Gram(nn.Module):
    """Style features: the product of all pairs of channels, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(torch.relu(self.first(x))).flatten(2)
        return self.last((y @ y.transpose(1, 2) / (y.shape[1] * y.shape[2])).flatten(1))


@trap("bilinear pooling", IMAGE, "left.weight 0, right.weight 0, last.weight 1")
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 8, 1), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bihw,bjhw->bij", self.left(x), self.right(x))
        return self.last(torch.sqrt(y.abs() + 1.0).reshape(x.shape[0], -1))


@trap("maxout of linear layers", TOKENS, "first.weight 0, out.weight 1")
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(16, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).view(*x.shape[:-1], 12, 3).max(-1).values)
