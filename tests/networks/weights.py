"""Op kinds whose weights are computed from other tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks.ops import MAP, TOKENS, VECTOR, WIDTHS, Args, Op, Picker, Shape, divisors, widened, width

WRAPS: tuple[Any, ...] = (
    parametrizations.weight_norm,
    nn.utils.weight_norm,
    lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]  # None: all of it
    lambda layer: parametrizations.weight_norm(layer, dim=1),
)


class WeightNormed(Op, ranks=(MAP, VECTOR, TOKENS), weight=4, shared=True):
    """args: out, groups, wrap: a convolution or a linear layer under weight norm."""

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        groups = pick.choice([1, *divisors(shapes[0][0])]) if len(shapes[0]) == MAP else 1
        return groups * pick.choice((2, 4, 6)), groups, pick.integer(0, len(WRAPS) - 1)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        (out, groups, wrap), c = args, width(shapes[0])
        layer = nn.Conv2d(c, out, 3, padding=1, groups=groups) if len(shapes[0]) == MAP else nn.Linear(c, out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hook is deprecated, and still in use
            self.layer = WRAPS[wrap](layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class StandardisedConv(Op, weight=3, shared=True):
    """args: out, groups, style: weight standardisation, as moments or by batch norm, or a sum of kernels."""

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        return x[0] >= 4

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        groups = pick.choice([1, *divisors(shapes[0][0])])
        return groups * pick.choice((2, 4, 6)), groups, pick.integer(0, 3)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return (widened(shapes[0], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        self.conv = nn.Conv2d(shapes[0][0], args[0], 3, padding=1, groups=args[1])
        if args[2] == 2:
            self.scale = nn.Parameter(torch.empty(args[0], 1, 1, 1))

    def kernel(self) -> Tensor:
        w, style = self.conv.weight, self.args[2]
        if style == 0:
            mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
            return (w - mean) / (var + 1e-3).sqrt() * 0.3
        if style == 1:
            flat = w.reshape(1, self.conv.out_channels, -1)
            return F.batch_norm(flat, None, None, training=True, eps=1e-3).reshape_as(w) * 0.3
        return w * self.scale if style == 2 else w + w.flip(-1).roll(1, -2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.conv.bias, padding=1, groups=self.args[1])


class LowRank(Op, ranks=(VECTOR, TOKENS), weight=3, shared=True):
    """args: out, rank, style: a product of two matrices, alone, added to a weight, or masked."""

    scale: Tensor

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        return pick.choice(WIDTHS), pick.choice((3, 4)), pick.integer(0, 3)

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        return ((*shapes[0][:-1], args[0]),)

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__(shapes, args)
        c, (out, rank, style) = shapes[0][-1], args
        if style < 3:
            self.base = nn.Linear(c, out)
        self.a, self.b = nn.Parameter(torch.empty(rank, c)), nn.Parameter(torch.empty(out, rank))
        if style == 2:
            self.register_buffer("scale", torch.empty(out, c))

    def forward(self, x: Tensor) -> Tensor:
        style = self.args[2]
        if style == 3:
            return F.linear(F.relu(F.linear(x, self.a)), torch.cat([self.b, self.b.flip(0)], 1)[:, : self.a.shape[0]])
        w = self.base.weight
        if style == 0:
            return F.linear(x, self.b @ self.a, self.base.bias) + F.linear(x, w)
        if style == 1:
            return F.linear(x, w + 0.5 * self.b @ self.a, self.base.bias)
        return F.linear(x, w * self.scale, self.base.bias) + F.linear(F.linear(x, self.a), self.b)
