"""Weights that are shared, reparametrised, frozen, or no parameters at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from traps.spec import IMAGE, TOKENS, trap


@trap("tied embeddings", (2, 6), "embed.weight 1, up.weight 0, up.weight 1, down.weight 0", entries=40, macs=0.6)
class TiedEmbedding(nn.Module):
    """The table that reads the input is the projection onto the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.out(y + self.down(F.gelu(self.up(y))))


@trap("tied embeddings, functional", (2, 6), "embed.weight 1, up.weight 1", entries=40, macs=0.6)
class TiedFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) * self.embed.embedding_dim**0.5
        return F.linear(y + self.down(F.gelu(self.up(y))), self.embed.weight)


@trap("bag of embeddings", (2, 6), "bag.weight 1, most.weight 1, up.weight 0", entries=40)
class Bag(nn.Module):
    """Rows of a table are summed, or their maximum is taken, as in networks that recommend."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.most = nn.EmbeddingBag(40, 16, mode="sum"), nn.EmbeddingBag(40, 8, mode="max")
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(torch.cat([self.bag(x), self.most(x)], 1))))


@trap("bilinear layer", (4, 5), "left.weight 0, right.weight 0, meet.weight 0, meet.weight 1, meet.weight 2")
class BilinearLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.meet = nn.Linear(5, 12), nn.Linear(5, 10), nn.Bilinear(12, 10, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.meet(self.left(x), self.right(x))))


@trap("tied autoencoder", (4, 16), "w 0, bias 0, deep.weight 0")
class TiedAutoencoder(nn.Module):
    """The decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(24, 16) / 4), nn.Parameter(torch.randn(24))
        self.deep, self.back = nn.Linear(24, 12), nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.linear(x, self.w, self.bias))
        return F.linear(self.back(torch.relu(self.deep(y))), self.w.t())


@trap("buffers in forward", IMAGE, "first.weight 0, scale 1, shift 1, last.weight 1")
class Buffered(nn.Module):
    """Buffers along the channels, one of them not saved, an index, and a plain tensor."""

    scale: Tensor
    shift: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(1, 16, 1, 1), persistent=False)
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(3)))
        self.gain = torch.rand(16) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = (torch.relu(self.first(x)) - self.shift) / self.scale
        return self.last(y[:, self.order] * self.gain.view(1, -1, 1, 1))


@trap(
    "a buffer of truth values",
    IMAGE,
    "last.weight 0, out.weight 1",
    held={"first.weight 0": "is combined with a dim whose size cannot change"},
    macs=0.9,
)
class BooleanBuffer(nn.Module):
    """Which channels are negated; only what holds numbers has channels."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 5, 1)
        self.register_buffer("mask", torch.arange(16) % 3 == 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.out(torch.relu(self.last(torch.where(self.mask[:, None, None], y, -y))))


@trap("frozen parameters", IMAGE, "first.weight 0, first.bias 0, mid.weight 0, mid.weight 1, last.weight 1")
class Frozen(nn.Module):
    """What does not train is pruned like anything else, and goes on not training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 5, 1)
        self.first.requires_grad_(False)
        self.mid.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.mid(torch.relu(self.first(x)))))


@trap("a layer used several times", IMAGE, "stem.weight 0, body.weight 0, body.weight 1, norm.weight 0, head.weight 1")
class Several(nn.Module):
    """One convolution and one norm at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.relu(self.norm(self.body(x)))
        return self.head(x)


@trap(
    "a layer used at two resolutions",
    IMAGE,
    "stem.weight 0, down.weight 0, tower.weight 0, tower.weight 1, out.weight 1",
)
class SharedHead(nn.Module):
    """One head on two levels of a pyramid, as in RetinaNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, 2, 1)
        self.tower, self.out = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.relu(self.stem(x))
        second = torch.relu(self.down(first))
        return self.out(torch.relu(self.tower(first))), self.out(torch.relu(self.tower(second)))


class Reparametrised(nn.Module):
    """Two convolutions and a linear layer under a reparametrisation."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = wrap(nn.Conv2d(3, 16, 3, padding=1)), wrap(nn.Conv2d(16, 24, 3, padding=1, groups=groups))
        self.up, self.c = wrap(nn.ConvTranspose2d(24, 12, 2, 2)), wrap(nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.c(x.mean((2, 3)))


NEW = "{0}.parametrizations.weight.original{1} {2}"
OLD = "{0}.weight_{1} {2}"


def sites(form: str, parts: str) -> str:
    return ", ".join(form.format(*part.split()) for part in parts.split(", ")) + ", a.bias 0, b.bias 0, up.bias 0"


VG = "a 1 0, b 1 0, b 1 1, up 1 0, up 1 1, c 1 1, a 0 0, b 0 0, up 0 0"
trap("weight_norm", IMAGE, sites(NEW, VG))(lambda: Reparametrised(parametrizations.weight_norm))
trap("weight_norm with groups", IMAGE, sites(NEW, VG))(lambda: Reparametrised(parametrizations.weight_norm, 4))
trap("weight_norm over all of a weight", IMAGE, sites(NEW, "a 1 0, b 1 0, b 1 1, up 1 0, up 1 1, c 1 1"))(
    lambda: Reparametrised(lambda layer: parametrizations.weight_norm(layer, dim=None))  # type: ignore[arg-type]
)
WG = sites(OLD, "a v 0, b v 0, b v 1, up v 0, up v 1, c v 1, a g 0, b g 0, up g 0")
trap("weight_norm by a hook", IMAGE, WG)(lambda: Reparametrised(nn.utils.weight_norm))
trap("weight_norm by a hook, with groups", IMAGE, WG)(lambda: Reparametrised(nn.utils.weight_norm, 4))
SPECTRAL = "a.parametrizations.weight.0._u 0, b.parametrizations.weight.0._v 0, a.bias 0, b.bias 0, up.bias 0, "
trap("spectral_norm", IMAGE, SPECTRAL + ", ".join(
    NEW.format(n, "", d) for n, d in (("a", 0), ("b", 0), ("b", 1), ("up", 0), ("up", 1), ("c", 1))
))(lambda: Reparametrised(parametrizations.spectral_norm))  # fmt: skip
trap("spectral_norm with groups", IMAGE, "a.bias 0, b.bias 0, up.bias 0, b.parametrizations.weight.original 0")(
    lambda: Reparametrised(parametrizations.spectral_norm, 4)
)
trap("spectral_norm by a hook", IMAGE, sites(OLD, "a orig 0, b orig 0, b orig 1, a u 0, b v 0, c orig 1"))(
    lambda: Reparametrised(nn.utils.spectral_norm)
)
trap("spectral_norm by a hook, with groups", IMAGE, sites(OLD, "a orig 0, b orig 0, b orig 1, a u 0, b v 0, c orig 1"))(
    lambda: Reparametrised(nn.utils.spectral_norm, 4)
)


class Squared(nn.Module):
    """A parametrisation of one's own."""

    def forward(self, w: Tensor) -> Tensor:
        return w * w.abs()


@trap(
    "a parametrisation of one's own",
    TOKENS,
    "a.parametrizations.weight.original 0, b.parametrizations.weight.original 1",
)
class OwnParametrisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 5)
        parametrize.register_parametrization(self.a, "weight", Squared())
        parametrize.register_parametrization(self.b, "weight", Squared())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Heads(nn.Module):
    """A layer of one's own with a size in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.heads = nn.Parameter(torch.randn(24, 16) / 4), 4

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).reshape(x.shape[0], -1, self.heads, 24 // self.heads).amax(2)


@trap("a parametrised layer of one's own", TOKENS, "inner.parametrizations.weight.original 0, out.weight 1")
class ParametrisedOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Heads(), nn.Linear(6, 5)
        parametrize.register_parametrization(self.inner, "weight", Squared())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


@trap(
    "orthogonal weights",
    TOKENS,
    "b.bias 0, c.weight 0, c.weight 1, last.weight 1",
    held={"a.weight 0": "whose size cannot change", "b.parametrizations.weight.original 0": "tril cannot shorten"},
    macs=0.8,
)
class Orthogonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 24)
        self.c, self.last = nn.Linear(24, 24), nn.Linear(24, 5)
        parametrizations.orthogonal(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.c(self.b(torch.relu(self.a(x))))))


@trap("low-rank adapters", TOKENS, "base.weight 0, a 0, b 0, b 1, out.weight 1")
class Lora(nn.Module):
    """LoRA, merged in forward: the weight of a frozen layer plus a product."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(16, 24), nn.Linear(24, 5)
        self.a, self.b = nn.Parameter(torch.randn(8, 16) / 4), nn.Parameter(torch.randn(24, 8) / 3)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)))
