"""Random networks: `networks()` for hypothesis, `random_network(seed)` for long runs.

To replay one, `build(random_network(17))`, or `build(Network.from_json(text))` with what was printed; to make a failing
one smaller, `shrink(network, fails)`. `python tests/strategies.py 17` prints the network of a seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st
from networks import Network, build, example_inputs, grow, shrink

__all__ = ["Network", "build", "example_inputs", "networks", "random_network", "shrink"]

T = TypeVar("T")


class Dice:
    """Choices by a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return low + int(self.random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.random.random() * len(items))]

    def boolean(self) -> bool:
        return self.random.random() < 0.5


class Drawn:
    """Choices by hypothesis, so that examples shrink and replay."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choice(self, items: Sequence[T]) -> T:
        return items[self.draw(st.integers(0, len(items) - 1))]

    def boolean(self) -> bool:
        return self.draw(st.booleans())


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Draw a random network."""
    return grow(Drawn(draw))


def random_network(seed: int) -> Network:
    """Draw the random network of a seed; the same on every machine."""
    return grow(Dice(seed))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(random_network(int(argument)))
