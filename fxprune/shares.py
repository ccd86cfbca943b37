"""The batches of all ranks: which of them this one has, and in which order one process would read them all.

That order is the first batch of every rank, by rank, then the second of every rank, and so on: what
`torch.utils.data.DistributedSampler` deals out, with one sample per batch or any other number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from fxprune import sharing

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Share(Sequence[Any]):
    """Batches of this rank, and their places among those of all. A sequence where `batches` is one.

    Attributes:
        batches: of this rank, in their order.
        places: of each of them, from 0.
        total: how many batches all ranks have; None where one process was given some without a length.
    """

    batches: Iterable[Any]
    places: Sequence[int]
    total: int | None

    @staticmethod
    def of(batches: Iterable[Any]) -> Share:
        """Return batches with their places; every rank gives its own."""
        if isinstance(batches, Share):
            return batches
        count = _count(batches)
        if sharing.size() == 1:
            return Share(batches, range(sys.maxsize if count is None else count), count)
        if count is None:
            batches = list(batches)
            count = len(batches)
        counts = sharing.gather("the number of batches", count)
        before = range(sharing.rank())
        places = [sum(min(n, i + (r in before)) for r, n in enumerate(counts)) for i in range(count)]
        return Share(batches, places, sum(counts))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]  # a TypeError, as of the batches themselves

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]  # pyright: ignore[reportIndexIssue]  # likewise

    def __bool__(self) -> bool:
        return self.total != 0

    def where(self, chosen: Callable[[int], bool]) -> Share:
        """Return the batches whose places are chosen; `total` must be known."""
        of_all = [place for place in range(self.total or 0) if chosen(place)]
        at = {place: i for i, place in enumerate(of_all)}
        mine = [(at[place], batch) for place, batch in zip(self.places, self.batches, strict=False) if place in at]
        return Share([batch for _, batch in mine], [place for place, _ in mine], len(of_all))

    def in_order(self, what: str, values: Iterable[T]) -> list[T]:
        """Return what all ranks have found for their batches, by the place of the batch.

        Args:
            what: the values are, for messages.
            values: one for each batch of this rank, or for the first few.
        """
        parts = sharing.gather(what, list(zip(self.places, values, strict=False)))
        return [value for _, value in sorted(chain.from_iterable(parts), key=itemgetter(0))]

    def everywhere(self, batches: Iterable[Any], device: torch.device) -> list[Any]:
        """Return the first few batches of all ranks, on every rank, in their order.

        Args:
            batches: the first few of this rank.
            device: where tensors go that were not on the CPU.
        """
        if sharing.size() == 1:
            return list(batches)
        packed = [pytree.tree_map(_packed, batch) for batch in batches]
        return [pytree.tree_map(lambda t: _unpacked(t, device), b) for b in self.in_order("batches", packed)]

    def every(self, work: Callable[[Any], Sequence[torch.Tensor | None]]) -> Iterator[Sequence[torch.Tensor | None]]:
        """Yield, on every rank, what `work` gives for each batch of all ranks; each rank works on its own."""
        if sharing.size() == 1:
            yield from map(work, self.batches)
            return
        parts = sharing.gather("places", list(self.places))
        owners = [r for _, r in sorted((place, r) for r, places in enumerate(parts) for place in places)]
        todo = map(work, self.batches)
        ready: Sequence[torch.Tensor | None] | None = None
        served: set[int] = set()
        for owner in owners:
            if not served or owner in served:  # a new turn: all work at the same time
                served, ready = set(), next(todo, None) if ready is None else ready
            served.add(owner)
            yield sharing.send("gradients", owner, ready or ())
            if owner == sharing.rank():
                ready = None


@dataclass(frozen=True, slots=True)
class _Packed:
    """A tensor that was not on the CPU."""

    tensor: torch.Tensor


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    copy = leaf.detach().cpu().clone()  # a view would take its whole storage along
    return copy if leaf.device.type == "cpu" else _Packed(copy)


def _unpacked(leaf: Any, device: torch.device) -> Any:
    return leaf.tensor.to(device) if isinstance(leaf, _Packed) else leaf


def _count(batches: Iterable[Any]) -> int | None:
    """Return how many batches there are, if they tell; a DataLoader of an iterable data set has a length and raises."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None
