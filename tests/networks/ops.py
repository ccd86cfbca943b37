"""What an op of a random network is, and the table of all of them.

A value is a tensor whose shape, without its batch dim, is a map (C, H, W), tokens (N, C) or a vector (C,).
An op kind is one subclass of `Op`: defining it enters it in `OPS`, and nothing else needs to know about it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import nn

Shape = tuple[int, ...]
Args = tuple[int, ...]
T = TypeVar("T")

VECTOR, TOKENS, MAP = 1, 2, 3
ALL = (MAP, VECTOR, TOKENS)
WIDTHS = (4, 6, 8, 12, 16, 24)


class Picker(Protocol):
    """A source of choices; smaller integers and earlier items are the simpler ones."""

    def integer(self, low: int, high: int) -> int:
        """Pick an integer in [low, high]."""
        ...

    def choice(self, items: Sequence[T]) -> T:
        """Pick one of the items."""
        ...

    def boolean(self) -> bool:
        """Pick False or True."""
        ...


class Op(nn.Module):
    """One step of a network: integers in `args` and the shapes of its inputs say everything about it.

    `forward` takes the inputs and returns one value, or a tuple where `outputs` names several.

    Class keywords:
        ranks: the ranks (`VECTOR`, `TOKENS`, `MAP`) that the first input may have.
        arity: how many inputs; the second and third must satisfy `pairs` with the first.
        weight: how often it is drawn, relative to the others of its rank.
        head: whether it may end a network.
        shared: whether its module may be called again on another value.
    """

    ranks: ClassVar[tuple[int, ...]] = (MAP,)
    arity: ClassVar[int] = 1
    weight: ClassVar[int] = 1
    head: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        ranks: tuple[int, ...] = (MAP,),
        arity: int = 1,
        weight: int = 1,
        head: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init_subclass__()
        cls.ranks, cls.arity, cls.weight, cls.head, cls.shared = ranks, arity, weight, head, shared
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if name in OPS:
            raise ValueError(f"two ops are called {name}: {OPS[name]} and {cls}")
        OPS[name] = cls

    def __init__(self, shapes: tuple[Shape, ...], args: Args) -> None:
        super().__init__()
        self.shapes, self.args = shapes, args

    @classmethod
    def accepts(cls, x: Shape) -> bool:
        """Whether the first input may have this shape; its rank is known to fit."""
        return True

    @classmethod
    def pairs(cls, x: Shape, other: Shape) -> bool:
        """Whether `other` may be a further input next to `x`."""
        return x == other

    @classmethod
    def draw(cls, pick: Picker, *shapes: Shape) -> Args:
        """Draw the integers that define the step."""
        return ()

    @classmethod
    def outputs(cls, shapes: tuple[Shape, ...], args: Args) -> tuple[Shape, ...]:
        """Shapes of the values that the step makes; by default one like the first input."""
        return (shapes[0],)


OPS: dict[str, type[Op]] = {}


def divisors(n: int, candidates: Sequence[int] = (2, 3, 4)) -> list[int]:
    """Candidates that split n into rows of more than one.

    >>> divisors(12), divisors(6), divisors(4)
    ([2, 3, 4], [2, 3], [2])
    """
    return [d for d in candidates if n % d == 0 and n > d]


def where(x: Shape) -> int:
    """The dim of the channels, in a tensor with a batch dim."""
    return 2 if len(x) == TOKENS else 1


def width(x: Shape) -> int:
    """The number of channels."""
    return x[where(x) - 1]


def widened(x: Shape, channels: int) -> Shape:
    """The shape with another number of channels."""
    return (*x[: where(x) - 1], channels, *x[where(x) :])


def resized(size: int, kernel: int, stride: int) -> int:
    """Spatial size after a convolution padded by half its kernel."""
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def shaped(x: Shape, channels: int, kernel: int = 1, stride: int = 1) -> tuple[Shape, ...]:
    """The output shapes of a padded convolution of a map."""
    return ((channels, resized(x[1], kernel, stride), resized(x[2], kernel, stride)),)


def area(x: Shape) -> int:
    """Number of positions of a map."""
    return x[1] * x[2]


def rows(x: torch.Tensor, shape: Shape, groups: int, style: int) -> torch.Tensor:
    """View a value (C, ...) as (groups, C / groups, ...), written in one of four ways."""
    if style == 0:
        return x.reshape(-1, groups, shape[0] // groups, *shape[1:])
    if style == 1:
        return x.contiguous().view(x.size(0), groups, -1, *shape[1:])
    if style == 2:
        return x.unflatten(1, (groups, -1))
    space = [x.shape[i + 1] for i in range(1, len(shape))]
    return torch.reshape(x, (x.shape[0], groups, x.size(1) // groups, *space))
