"""What a trap is: a small network with a construction that pruning tools get wrong, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

Make = TypeVar("Make", bound=Callable[[], nn.Module])
IMAGE = (2, 3, 8, 8)
TOKENS = (2, 6, 16)


@dataclass(frozen=True)
class Trap:
    """One network of the list.

    Attributes:
        make: builds it.
        inputs: example inputs.
        shrinks: parameter and dim, as in "conv.weight 0", of all that must get smaller.
        held: parameter and dim -> words of the reason why nothing of it goes.
        macs: the budget.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    shrinks: tuple[str, ...]
    held: Mapping[str, str] = field(default_factory=dict)
    macs: float = 0.5


TRAPS: dict[str, Trap] = {}


def trap(
    name: str,
    shape: tuple[int, ...],
    shrinks: str,
    *,
    held: Mapping[str, str] | None = None,
    macs: float = 0.5,
    entries: int = 0,
) -> Callable[[Make], Make]:
    """Enter a network in the list.

    Args:
        name: what the trap is.
        shape: of the example input.
        shrinks: `Trap.shrinks`, separated by commas.
        held: `Trap.held`.
        macs: the budget.
        entries: the input is integers below this number instead of floats.
    """

    def register(make: Make) -> Make:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(entries, shape, generator=generator) if entries else torch.randn(shape, generator=generator)
        assert name not in TRAPS
        sites = tuple(site.strip() for site in shrinks.split(","))
        TRAPS[name] = Trap(make, (x,), sites, dict(held or {}), macs)
        return make

    return register


class Between(nn.Module):
    """A convolution, a function (or a layer) of what it returns, a layer that reads the result, and one more."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.use = nn.Conv2d(3, 24, 3, padding=1), use
        shape = use(torch.rand(2, 24, 8, 8)).shape
        layer = nn.Conv2d if len(shape) == 4 else nn.Linear
        size = (1,) if len(shape) == 4 else ()
        self.last: nn.Module = layer(shape[1] if size else shape[-1], 12, *size)
        self.out: nn.Module = layer(12, 6, *size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.last(self.use(torch.relu(self.first(x))))))
